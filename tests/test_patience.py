"""Commands that come while the daemon restarts: each waits for it, and is answered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from conftest import DEADLINE, Box, wait_until
from house import House
from proc import alive, children
from runctl.client.patience import Patience
from runctl.client.shared_link import SharedLink
from runctl.config.load import load
from runctl.protocol import messages
from runctl.protocol.endpoint import LOCK_FILE
from runctl.supervisor.cluster.file_lease import hold_file_lease
from terminal import Terminal

#: So patient that a test that waited for nobody would not end in time.
FOR_EVER = ["--wait", "1h"]
WAITING = "waiting for runctld to come back"


def ends(client: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = client.communicate(timeout=DEADLINE)
    return client.returncode, (out + err).decode()


def test_a_lock_that_changes_hands_is_never_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it between two of the calls would take the daemon for one that was stopped."""
    lock, seen = tmp_path / LOCK_FILE, []
    lock.write_text("executor 'of-a-longer-name', pid 12345678\n")

    def spy(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            done = real(*args)
            seen.append(lock.read_text())
            return done

        monkeypatch.setattr(os, name, call)

    spy("ftruncate")
    spy("pwrite")
    with hold_file_lease(tmp_path, "x"):
        assert lock.read_text() == f"executor 'x', pid {os.getpid()}\n"
        assert seen
        assert all(text.strip() for text in seen)
    assert lock.read_text() == ""


def test_each_verb_that_comes_while_the_daemon_restarts(box: Box) -> None:
    done = box.submit("done", "echo", "hello")
    box.runctl("wait", done)
    failed = box.submit("failed", "false")
    box.runctl("wait", failed, code=1)
    box.runctl("wait", box.submit("old", "true"))
    box.submit("busy", "sleep", "600", run="busy")
    wait_until(lambda: box.show("busy")["status"] == "running", "it runs")
    box.submit("busy", "true", run="next")
    asked = {
        "list": 0,
        "list busy": 0,
        "list --status running": 0,
        f"show {done}": 0,
        f"show {done[:-1]}": 0,
        "status": 0,
        f"wait {done}": 0,
        f"retry {failed}": 0,
        "submit new -- true": 0,
        "submit seen -a -- echo hello": 0,
        "attach done": 0,
        "attach done failed": 1,
        "attach --all --no-follow": 0,
        "abort busy --run next": 0,
        "purge old --yes": 0,
        "show nothing-like-this": 3,
        "list nothing-like-this": 3,
    }
    box.kill()
    clients = {line: box.popen(*line.split(), *FOR_EVER) for line in asked if " -- " not in line}
    for line in asked:
        if " -- " in line:
            before, command = line.split(" -- ")
            clients[line] = box.popen(*before.split(), *FOR_EVER, "--", *command.split())
    batch = box.popen("submit", "--batch", "-", *FOR_EVER, stdin=subprocess.PIPE)
    assert batch.stdin is not None
    batch.stdin.write(b'{"thread": "batch", "argv": ["true"]}\n')
    batch.stdin.close()
    batch.stdin = None
    for client in (*clients.values(), batch):
        assert client.poll() is None, ends(client)
    box.start()
    found = {line: ends(client) for line, client in clients.items()}
    assert {line: code for line, (code, _) in found.items()} == asked, found
    assert "hello" in found["submit seen -a -- echo hello"][1]
    code, said = ends(batch)
    assert (code, '"thread":"batch"' in said) == (0, True), said


@pytest.mark.parametrize("how", ["stopped in order", "never ran"])
def test_a_daemon_that_is_not_to_come_is_reported_at_once(stopped_box: Box, how: str) -> None:
    if how == "stopped in order":
        stopped_box.start()
        assert stopped_box.term() == 0
    said = "no runctld has run" if how == "never ran" else "runctld is not running"
    for verb in ("list", "status"):
        stopped_box.runctl(verb, *FOR_EVER, code=4)
        assert said in stopped_box.stderr


def test_how_long_a_command_waits(box: Box) -> None:
    (server,) = children(box.pid, "nats-server")
    box.kill()
    wait_until(lambda: not alive(server), "its server has gone with it")
    for wait in ("0", "0.3s", "300ms"):
        box.runctl("list", "--wait", wait, code=4)
        assert "runctld is not running" in box.stderr
    box.runctl("list", "--wait", "soon", code=2)
    assert "--wait" in box.stderr


@pytest.mark.parametrize("wait", ["0", "1s", "3s"])
def test_a_server_that_hangs_is_not_waited_for_without_end(box: Box, wait: str) -> None:
    """Each attempt takes seconds there, and the last one ends after the time is over."""
    (server,) = children(box.pid, "nats-server")
    hung = (box.pid, server)
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    try:
        code, said = ends(box.popen("list", "--wait", wait))
    finally:
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
    assert code == 4
    assert "does not answer: the embedded NATS server hangs" in said


def test_a_nats_server_that_is_replaced(box: Box) -> None:
    """The daemon is there all the time."""
    for _ in range(3):
        (server,) = wait_until(
            lambda: [x for x in children(box.pid, "nats-server") if alive(x)], "it runs"
        )
        os.kill(server, signal.SIGKILL)
        box.runctl("list", *FOR_EVER)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        # It is given up after three pings.
        pytest.param(signal.SIGSTOP, id="stopped", marks=[pytest.mark.long, pytest.mark.nightly]),
    ],
)
def test_a_connection_that_ends_while_something_waits_to_be_sent(
    box: Box, number: signal.Signals
) -> None:
    """nats-py fails at that, or waits for room, and told nobody of the end: what was asked
    afterwards was lost on the dead connection."""
    (server,) = children(box.pid, "nats-server")
    config = load(box.config, client=True)

    async def main() -> messages.DaemonStatus:
        links = SharedLink(config, Patience(config, 3600))
        link = await links.dial()

        async def say() -> None:
            while True:
                with contextlib.suppress(nats.errors.OutboundBufferLimitError):
                    await link.nc.publish("of.no.interest", b"x" * 4096)
                await asyncio.sleep(0)

        saying = asyncio.create_task(say())
        await asyncio.sleep(0.1)  # it is under way
        os.kill(box.pid, signal.SIGSTOP)  # which would begin another server
        os.kill(server, number)
        try:
            async with asyncio.timeout(DEADLINE):
                await link.closed.wait()
        finally:
            os.kill(box.pid, signal.SIGCONT)
            if number == signal.SIGSTOP:
                os.kill(server, signal.SIGCONT)
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)
        try:
            async with asyncio.timeout(DEADLINE):
                return await links.ask(messages.StatusRequest(brief=True), messages.DaemonStatus)
        finally:
            await links.close()

    assert asyncio.run(main()).pid == box.pid


def test_whoever_waits_is_told_so(box: Box) -> None:
    box.kill()
    terminal = Terminal(box, "list", *FOR_EVER)
    terminal.until(WAITING)
    box.start()
    assert terminal.wait() == 0
    assert terminal.text() == "runctl: no threads yet; start one: runctl submit THREAD -- COMMAND"


def test_an_executor_that_restarts_while_its_nats_goes_on(house: House) -> None:
    box = house.box("a")
    box.kill()

    def is_gone() -> bool:
        """NATS knows, too: until then a request is lost on its way to the daemon."""
        box.runctl("list", "--wait", "0", code=4)
        return "no daemon answers" in box.stderr

    wait_until(is_gone, "nobody answers")
    client = box.popen("list", *FOR_EVER)
    assert is_gone()
    assert client.poll() is None
    box.start()
    assert ends(client)[0] == 0
    assert box.term() == 0
    box.runctl("list", *FOR_EVER, code=4)
    assert "no daemon answers" in box.stderr


def test_a_client_elsewhere_waits_for_an_executor_that_was_there(house: House) -> None:
    """It sees NATS alone, and no state directory."""
    box = house.box("a")
    other = house.box("b")
    away = house.box("away", start=False)

    def is_gone() -> bool:
        away.runctl("list", "--wait", "0", code=4)
        return "no daemon answers" in away.stderr

    assert other.term() == 0
    box.kill()
    wait_until(is_gone, "nobody answers")
    terminal = Terminal(away, "list", *FOR_EVER)
    terminal.until(WAITING)
    away.runctl("list", "--wait", "3s", code=4)
    assert terminal.process.poll() is None
    box.start()
    assert terminal.wait() == 0
    assert box.term() == 0
    away.runctl("list", *FOR_EVER, code=4)
    assert "no daemon answers" in away.stderr
