"""What a service manager hears of the daemon, by a socket in its place."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from conftest import DEADLINE, Box, wait_until
from runctl.supervisor.host.systemd_notify import open_notifier


class Manager:
    """Listens at ``address``; ``heard`` are the messages in their order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while (message := self._socket.recv(65536).decode()) != "":
            self.heard.append(message.split("\n"))

    def count(self, line: str) -> int:
        return sum(line in message for message in list(self.heard))

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._thread.join(10)
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"@runctl-{os.getpid()}-{tmp_path.name}"
    made = Manager(name if request.param == "abstract" else str(tmp_path / "notify"))
    yield made
    made.close()


@pytest.mark.parametrize("manager", ["abstract"], indirect=True)
def test_the_life_of_a_daemon(stopped_box: Box, manager: Manager, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    box = stopped_box
    box.start()
    wait_until(lambda: manager.count("STATUS=0 running, 0 queued"), "the first status")
    firsts = [message[0].partition("=")[0] for message in manager.heard]
    assert "EXTEND_TIMEOUT_USEC" in firsts[: firsts.index("READY")], "it asks while it starts"
    run = box.submit("t", "sh", "-c", "env; echo over; sleep 600")
    wait_until(lambda: manager.count("STATUS=1 running, 0 queued"), "the run is counted")
    beats = manager.count("WATCHDOG=1")
    wait_until(lambda: manager.count("WATCHDOG=1") >= beats + 3, "the watchdog is fed")

    os.kill(box.pid, signal.SIGHUP)
    wait_until(lambda: manager.count("READY=1") == 2, "reloaded")
    at = next(i for i, m in enumerate(manager.heard) if m[0] == "RELOADING=1")
    assert manager.heard[at][1].startswith("MONOTONIC_USEC=")

    def said() -> str:
        return box.runctl("attach", "t", "--run", run, "--no-follow")

    wait_until(lambda: said().endswith("over\n"), "all of its environment is there")
    reply = said()
    assert "RUNCTL_RUN" in reply
    assert "NOTIFY_SOCKET" not in reply
    assert "WATCHDOG" not in reply
    assert box.term() == 0
    wait_until(lambda: manager.count("STOPPING=1"), "it says that it stops")
    at = next(i for i, m in enumerate(manager.heard) if m[0] == "STOPPING=1")
    wait_until(
        lambda: any(m[0].startswith("EXTEND_TIMEOUT_USEC=") for m in manager.heard[at:]),
        "it asks for time",
    )


@pytest.mark.short
async def test_to_either_kind_of_socket(manager: Manager):
    async with open_notifier(trio.Event(), 0, 0, {"NOTIFY_SOCKET": manager.address}) as notifier:
        await notifier.ready("idle")
    wait_until(lambda: manager.count("READY=1"), "ready was heard")


@pytest.mark.short
@pytest.mark.parametrize(
    "env",
    [{}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}],
    ids=["none", "of another process", "zero"],
)
@pytest.mark.parametrize("manager", ["path"], indirect=True)
async def test_no_watchdog(manager: Manager, env: dict[str, str]):
    env = {**env, "NOTIFY_SOCKET": manager.address}
    async with open_notifier(trio.Event(), 0, 0, env) as notifier:
        await trio.testing.wait_all_tasks_blocked()
        await notifier.ready("idle")
    wait_until(lambda: manager.count("READY=1"), "all that came before is heard")
    assert not manager.count("WATCHDOG=1")


@pytest.mark.short
async def test_a_manager_that_is_gone_is_no_fault(tmp_path: Path):
    """The one that comes in its place hears what is said from then on, each kind of it."""
    address = tmp_path / "notify"
    Manager(str(address)).close()
    env = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "1000"}
    async with open_notifier(trio.Event(), 0, 0, env) as notifier:
        await notifier.ready("nobody hears this")
        address.unlink()
        await notifier.ready("nor this")
        manager = Manager(str(address))
        try:
            await notifier.ready("idle")
            with trio.fail_after(DEADLINE):
                while not manager.count("STATUS=idle") or manager.count("WATCHDOG=1") < 3:  # noqa: ASYNC110
                    await trio.sleep(0.01)
        finally:
            manager.close()
    assert not [message for message in manager.heard if "nobody" in str(message)]
