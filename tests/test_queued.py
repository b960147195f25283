"""Runs that wait for their turn: whoever watches one is told what it waits for."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys

import pytest
from conftest import DEADLINE, SLACK, Box, wait_until
from terminal import Terminal

AHEAD = "run second waits behind run first of its thread, which is running"


@pytest.fixture
def busy(stopped_box: Box) -> Box:
    """Thread "t" runs "first", and "second" waits for it."""
    box = stopped_box
    box.configure("[queue]\nmax_running = 1\n")
    box.start()
    box.submit("t", "sh", "-c", "echo one; until [ -e go ]; do sleep 0.02; done", run="first")
    wait_until(lambda: box.show("first")["status"] == "running", "it runs")
    box.submit("t", *SECOND, run="second")
    return box


SECOND = ("sh", "-c", "echo two; until [ -e over ]; do sleep 0.02; done")
AGAIN = ("submit", "t", "--id", "second", "-a", "--", *SECOND)


def test_a_watcher_is_told_what_a_run_waits_for(busy: Box) -> None:
    hint = "detached; the run stays queued. Attach again: runctl attach --run second t"
    for args in (AGAIN, ("attach", "t", "--run", "second")):
        said = busy.path / "said"
        with said.open("wb") as err:
            client = busy.popen(*args, stderr=err)
        wait_until(lambda f=said: AHEAD in f.read_text(), "it is told")
        client.send_signal(signal.SIGINT)
        out, _ = client.communicate(timeout=DEADLINE)
        assert (client.returncode, out) == (130, b"")
        assert hint in said.read_text()
    again = shlex.split(hint.partition("runctl ")[2])
    with said.open("wb") as err:
        client = busy.popen(*again, stderr=err)
    wait_until(lambda: AHEAD in said.read_text(), "it is told")
    (busy.path / "go").touch()
    assert client.stdout is not None
    assert client.stdout.readline() == b"two\n", "the command that was suggested shows this run"
    client.send_signal(signal.SIGINT)
    assert client.wait(DEADLINE) == 130
    assert "detached; the run goes on." in said.read_text(), "it has begun meanwhile"
    (busy.path / "over").touch()
    assert busy.runctl(*again) == "two\n"


@pytest.mark.nightly
def test_what_has_not_begun_does_not_go_on(busy: Box) -> None:
    for args in (AGAIN, ("attach", "t", "--run", "second"), ("wait", "second")):
        assert busy.runctl(args[0], "--timeout", "300ms", *args[1:], code=1) == ""
        assert busy.stderr.endswith("runctl: run second has not begun yet; it stays queued\n")
    busy.runctl("wait", "first", "--timeout", "300ms", code=1)
    assert busy.stderr == "runctl: run first has not ended yet; it goes on\n"
    assert busy.runctl("attach", "t", "--run", "second", "--no-follow") == ""
    assert busy.stderr == f"runctl: no output yet: {AHEAD}\n"
    # On another thread, for which the executor has no room.
    busy.submit("u", "echo", "three", run="third")
    room = "run third is queued; it begins when an executor has room"
    for which in ((), ("--run", "third")):
        busy.runctl("attach", "u", *which, "--no-follow")
        assert busy.stderr == f"runctl: no output yet: {room}\n"
    busy.runctl("attach", "t", "u", "--timeout", f"{3 * SLACK}s", code=1)
    assert busy.stderr.splitlines()[-2:] == [
        f"u | runctl: {room}",
        "runctl: not all runs have ended yet; those that have begun go on",
    ]


def test_a_wait_says_what_is_before_its_run(busy: Box) -> None:
    busy.submit("u", "true", run="third")
    terminals = {
        run: Terminal(busy, "wait", run, columns=100) for run in ("third", "second", "first")
    }
    terminals["second"].until("run second: queued behind run first; waited")
    terminals["third"].until("run third: queued; waited")
    terminals["first"].until("run first: running, attempt 1; waited")
    terminals["third"].send("\x03")
    assert terminals["third"].wait() == 130
    assert "stopped waiting; the run stays queued. Wait again: runctl wait third" in (
        terminals["third"].text()
    )
    (busy.path / "go").touch()
    assert terminals["first"].wait() == 0
    terminals["second"].until("run second: running, attempt 1; waited")
    terminals["second"].send("\x03")
    assert terminals["second"].wait() == 130
    assert "stopped waiting; the run goes on. Wait again: runctl wait second" in (
        terminals["second"].text()
    )


#: Has the patience of a busy machine, and says whether it has any.
PATIENT = """
import sys
from runctl.cli.following import follow
from runctl.cli.main import main
follow.PATIENCE = 600.0
wait = follow._next_events
def say(watcher, output, patience):
    print("no patience" if patience is None else "patience", file=sys.stderr, flush=True)
    return wait(watcher, output, patience)
follow._next_events = say
sys.exit(main())
"""


def test_nothing_is_said_of_a_run_that_begins_soon(busy: Box) -> None:
    """Nothing but the executor's room is before it."""
    code = "echo three; until [ -e last ]; do sleep 0.02; done"
    busy.submit("u", "sh", "-c", code, run="third")
    said = busy.path / "said"
    argv = [sys.executable, "-c", PATIENT, "-c", str(busy.config), "attach", "u"]
    with said.open("wb") as err:
        client = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err)
    busy.clients.append(client)
    wait_until(lambda: said.read_text().count("patience\n"), "it waits")
    for file in ("go", "over"):
        (busy.path / file).touch()
    wait_until(lambda: "no patience\n" in said.read_text(), "it has begun")
    (busy.path / "last").touch()
    out, _ = client.communicate(timeout=DEADLINE)
    lines = said.read_text().splitlines()
    assert (client.returncode, out) == (0, b"three\n")
    assert set(lines) == {"patience", "no patience"}, "only what this test has it say"
    assert lines == sorted(lines, reverse=True), "none is left once the run has begun"
