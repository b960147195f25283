"""What a run has left behind when it ends by itself: ended and named, or kept on request."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Box, wait_until
from proc import alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a child subreaper and /proc")

#: Starts a server, a session of its own that says when it is told to go, and something in the
#: background. $1: a file for the server's pid; what it says goes beside it.
SERVER = """
import os, signal, sys, time
if os.fork():
    os._exit(0)
def told(*_):
    open(sys.argv[1] + ".told", "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, told)
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
START = """
setsid "$2" -c "$3" "$1" > /dev/null 2>&1 < /dev/null
sleep 600 > /dev/null 2>&1 &
echo $! > "$1.background"
while [ ! -e "$1" ]; do sleep 0.02; done
"""


@pytest.fixture
def keeping(stopped_box: Box) -> Box:
    stopped_box.configure(
        '[queue]\nstop_grace = "60s"\n'  # all of it hears TERM, and has the time to say so
        '[runners.keep]\nkind = "command"\nleftovers = "keep-until-daemon"\n'
        '[runners.keep-tty]\nkind = "command"\ntty = true\nleftovers = "keep-until-daemon"\n'
    )
    stopped_box.start()
    return stopped_box


def _start(box: Box, runner: str, name: str, after: str = "") -> tuple[str, int, int]:
    """(the run, the server's pid, that of what is in the background)"""
    file = box.path / name
    argv = ("sh", "-c", START + after, "sh", str(file), sys.executable, SERVER)
    run = box.runctl("submit", name, "--runner", runner, "--", *argv).strip()
    background = Path(f"{file}.background")
    pids = wait_until(
        lambda: (
            all(x.exists() and x.read_text() for x in (file, background))
            and (int(file.read_text()), int(background.read_text()))
        ),
        "both are there",
    )
    return run, *pids


def test_a_server_ends_with_its_run_and_is_named(keeping: Box) -> None:
    box = keeping
    run, server, background = _start(box, "shell", "t")
    box.runctl("wait", run)
    assert not alive(server)
    assert not alive(background)
    assert (box.path / "t.told").exists()
    (line,) = (x for x in box.log.read_text().splitlines() if "which had left it behind" in x)
    assert f"({server})" in line
    assert f"sleep ({background})" in line
    assert run in line
    box.runctl("wait", box.submit("t", "true"))
    assert box.log.read_text().count("which had left it behind") == 1


def test_a_server_that_is_kept_goes_with_the_daemon(keeping: Box) -> None:
    box = keeping
    servers = {}
    for runner in ("keep", "keep-tty"):
        run, server, background = _start(box, runner, runner)
        box.runctl("wait", run)
        assert box.show(run)["note"] is None
        assert alive(server)
        assert not alive(background)
        servers[runner] = server
        assert f"goes on until this daemon ends: {Path(sys.executable).name}"[:40] in (
            box.log.read_text()
        )
        assert f"({server})" in box.log.read_text()
    # An abort ends all of its run, and no other's.
    run, server, background = _start(box, "keep", "aborted", "sleep 600")
    box.runctl("abort", "aborted")
    assert not alive(server)
    assert not alive(background)
    box.runctl("wait", box.submit("keep", "true"))
    assert all(map(alive, servers.values()))
    assert box.term() == 0
    assert not any(map(alive, servers.values()))
    assert all((box.path / f"{name}.told").exists() for name in servers)


def test_a_server_that_is_kept_does_not_outlive_a_killed_daemon(keeping: Box) -> None:
    box = keeping
    run, server, _ = _start(box, "keep", "t")
    box.runctl("wait", run)
    assert alive(server)
    box.kill()
    wait_until(lambda: not alive(server), "it is gone")
