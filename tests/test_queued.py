"""Runs that wait for their turn: whoever watches one is told what it waits for."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys

import pytest
from conftest import DEADLINE, Box, wait_until
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
    box.submit("t", "echo", "two", run="second")
    return box


AGAIN = ("submit", "t", "--id", "second", "-a", "--", "echo", "two")


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
    (busy.path / "go").touch()
    assert busy.runctl(*again) == "two\n", "the command that was suggested shows this run"


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
    busy.runctl("attach", "u", "--no-follow")
    assert busy.stderr == f"runctl: no output yet: {room}\n"
    busy.runctl("attach", "t", "u", "--timeout", "3s", code=1)
    assert busy.stderr.splitlines()[-2:] == [
        f"u | runctl: {room}",
        "runctl: not all runs have ended yet; those that have begun go on",
    ]


def test_a_wait_says_what_is_before_its_run(busy: Box) -> None:
    terminal = Terminal(busy, "wait", "second", columns=100)
    terminal.until("run second: queued behind run first; waited")
    terminal.send("\x03")
    assert terminal.wait() == 130
    assert "stopped waiting; the run stays queued. Wait again: runctl wait second" in (
        terminal.text()
    )


#: Has the patience of a busy machine.
PATIENT = """
import sys
from runctl.cli import follow
from runctl.cli.main import main
follow.PATIENCE = 600.0
sys.exit(main())
"""


def test_nothing_is_said_of_a_run_that_begins_at_once(box: Box) -> None:
    argv = ("submit", "t", "-a", "--id", "one", "--", "echo", "hello")
    done = subprocess.run(
        [sys.executable, "-c", PATIENT, "-c", str(box.config), *argv],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "runctl: run one\n")
