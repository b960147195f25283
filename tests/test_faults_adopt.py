"""What fault rounds have found of runs that outlive their daemon."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import Box, wait_until
from proc import alive

OUTLIVE = "start_timeout = '600s'\n[queue]\noutlive = '600s'\nstop_grace = '600s'\n"
#: Says when TERM comes, and ends only when it may.
STUBBORN = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (here / "termed").touch())
def stay():
    (here / "pid").write_text(str(os.getpid()))
    while not (here / "go").exists():
        time.sleep(0.01)
"""
BEGIN = """
with (here / "begun").open("a") as file:
    print("begun", file=file)
"""
#: Ends with 7, and leaves one such behind.
LEAVES = f"""{STUBBORN}{BEGIN}
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 3)
    stay()
    os._exit(0)
sys.exit(7)
"""
STAYS = f"""{STUBBORN}{BEGIN}
stay()
"""


@pytest.fixture
def living(stopped_box: Box) -> Box:
    stopped_box.configure(OUTLIVE)
    stopped_box.start()
    return stopped_box


def is_there(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def test_a_command_has_ended_and_what_it_left_is_being_ended(living: Box, tmp_path: Path) -> None:
    """The daemon dies then: nothing of the command is done once more."""
    run = living.submit_py("t", LEAVES, str(tmp_path))
    wait_until(lambda: (tmp_path / "termed").exists(), "what it left is being ended")
    living.kill()
    living.start()
    (tmp_path / "go").touch()
    living.runctl("wait", run, code=1)
    shown = living.show(run)
    assert (shown["attempt"], shown["exit_code"]) == (1, 7)
    assert (tmp_path / "begun").read_text() == "begun\n"
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_command_is_ended_by_a_stop_in_order(living: Box, tmp_path: Path) -> None:
    """The daemon is killed before it has stopped: what its TERM made of the command is no end of
    its own, and it is done anew."""
    run = living.submit_py("t", STAYS, str(tmp_path))
    wait_until(lambda: is_there(tmp_path / "pid"), "it runs")
    os.kill(living.pid, signal.SIGTERM)
    wait_until(lambda: (tmp_path / "termed").exists(), "it is being ended")
    living.kill()
    pid = int((tmp_path / "pid").read_text())
    (tmp_path / "go").touch()
    wait_until(lambda: not alive(pid), "it ends")
    living.start()
    living.runctl("wait", run)
    assert living.show(run)["attempt"] == 2
    assert (tmp_path / "begun").read_text() == "begun\nbegun\n"
