"""A process whose environment cannot be read, since its memory hangs, is in nobody's way."""

from __future__ import annotations

import errno
import os
import selectors
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Box, wait_until
from hanging import OWN_MOUNTS, hanging_environment
from proc import alive, find_keeper
from runctl.supervisor.processes import environments
from runctl.supervisor.processes.environments import Environments
from runctl.supervisor.processes.keeper_client import Keeper
from runctl.supervisor.processes.proctable import read_row, scan
from test_processes import NOTE, PYTHON, keeper, pids_in, script, spawn

__all__ = ["keeper"]  # a fixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

#: Nothing but its environment says of which run each of the last two processes is. argv[1]: where
#: their pids go.
LOOSE = """
for _ in range(2):
    if os.fork() == 0:
        if os.fork():
            os._exit(0)
        os.setsid()
        while os.getppid() != int(os.environ["KEEPER"]):
            time.sleep(0.01)
        note()
        idle()
    os.wait()
idle()
"""


def _readers(keeper: int) -> list[int]:
    """Children of ``keeper`` that stay in its session, as no command does."""
    rows = scan()
    return [
        x for x, r in rows.items() if r.parent == keeper and r.session == keeper and not r.zombie
    ]


@pytest.fixture
def apart(stopped_box: Box) -> Box:
    """A daemon with mounts of its own."""
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
        pytest.skip("only root can make a mount namespace")
    stopped_box.prefix = OWN_MOUNTS
    stopped_box.start()
    return stopped_box


@pytest.mark.long  # an end waits for an answer, and a process is not asked all the time
@pytest.mark.nightly
def test_other_runs_end_and_start_meanwhile(apart: Box, tmp_path: Path) -> None:
    box = apart
    keeper = find_keeper(box.pid)
    log = tmp_path / "pids"
    box.submit("t", "env", f"KEEPER={keeper}", *PYTHON, NOTE + LOOSE, str(log))
    wait_until(lambda: len(pids_in(log)) == 2, "both are there")
    hung, well = sorted(pids_in(log))  # in the order in which they are read
    with hanging_environment(box.pid, hung, tmp_path):
        box.submit("other", "sleep", "600")
        box.runctl("abort", "other")
        box.runctl("wait", box.submit("other", "true"))
        assert alive(well)
        said = f"process {hung} (python"
        assert box.log.read_text().count(said) == 1
        box.runctl("abort", "t")
        assert not alive(well)
        box.runctl("wait", box.submit("t", "true"))
        assert alive(hung)
        wait_until(lambda: not _readers(keeper), "what reads is ended")
        wait_until(lambda: _readers(keeper), "it is asked again")
        wait_until(lambda: not _readers(keeper), "that ends as well")
    wait_until(lambda: not alive(hung), "it ends, as its run has")
    assert box.log.read_text().count(said) == 1
    assert box.term() == 0


async def test_one_that_nobody_catches_holds_up_no_end(keeper: Keeper, tmp_path: Path) -> None:
    """Whenever it is asked, it is gone, and another is there."""
    code = "note()\nwhile True:\n    if os.fork(): os._exit(0)\n    os.setsid()"
    for number in range(4):
        await script(keeper, code, tmp_path / f"pids{number}", 1, mark=f"chain{number}")
    for _ in range(2):
        other = await spawn(keeper, "sleep", "600", mark="other")
        await other.end(60)


def test_where_no_process_can_be_made_it_reads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a machine that has as many as it may would stay so: nobody could be ended."""

    def fork() -> int:
        raise OSError(errno.EAGAIN, "as many as there may be")

    row = read_row(os.getpid())
    assert row is not None
    mark = b"HOME=" + os.environb[b"HOME"]
    with selectors.DefaultSelector() as selector:
        asked = Environments(selector, set())
        monkeypatch.setattr(environments.os, "fork", fork)
        wanted = [(os.getpid(), row.start), (os.getpid(), row.start - 1)]
        asked.ask(wanted, {mark, b"X=y"})
        assert [asked.answers[x].mark for x in wanted] == [mark, b""]
        assert not any(answer.silent for answer in asked.answers.values())
