"""Processes that the daemon may not signal: said at once, waited for, and in nobody else's way."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, wait_until
from proc import alive
from runctl.supervisor.processes.environments import read_environment
from runctl.supervisor.processes.proctable import scan

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0,
    reason="only root can have a process that the daemon may not signal",
)

NOBODY = 65534
#: CAP_KILL is what lets root signal everybody: who has it not may signal its own user's.
WITHOUT_CAP_KILL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
data = (ctypes.c_uint32 * 6)()
assert libc.capget(header, data) == 0
for at in (0, 1, 2):
    data[at] &= ~(1 << 5)
assert libc.prctl(24, 5, 0, 0, 0) == 0
assert libc.capset(header, data) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
#: A child of another user, whose pid is noted; it ends when $2 is there.
FOREIGN = f"""
import os, sys, time
if os.fork() == 0:
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
    print("up", os.getpid(), flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def bound(request: pytest.FixtureRequest) -> Iterator[Box]:
    """A daemon, run by root, that may not signal other users. Its parameter is the grace."""
    path = Path(tempfile.mkdtemp(prefix="runctl-held-"))
    path.chmod(0o755)
    box = Box(path)
    box.prefix = [sys.executable, "-c", WITHOUT_CAP_KILL]
    grace = getattr(request, "param", "200ms")
    box.configure(f'[queue]\nstop_grace = "{grace}"\n')
    try:
        box.start()
        yield box
    finally:
        (path / "go").touch()
        box.close()
        mark = b"RUNCTL_STATE=" + os.fsencode(box.state)
        wait_until(lambda: not [x for x in scan() if mark in read_environment(x)], "all are gone")
        shutil.rmtree(path)


def _foreign(box: Box, thread: str) -> tuple[str, int]:
    """(a run with a process that the daemon may not signal, that process)"""
    run = box.submit(thread, sys.executable, "-c", FOREIGN, str(box.path / "go"))
    wait_until(lambda: "up" in box.runctl("attach", thread, "--no-follow"), "it is there")
    return run, int(box.runctl("attach", thread, "--no-follow").split()[1])


@pytest.mark.parametrize("bound", ["1h"], indirect=True)  # an abort waits for no shorter
def test_an_abort_says_whom_it_waits_for(bound: Box) -> None:
    box = bound
    run, pid = _foreign(box, "t")
    after = box.submit("t", "true")
    abort = box.popen("abort", "t", "--run", run)
    assert abort.stderr is not None
    said = abort.stderr.readline().decode()
    assert said.startswith(f"runctl: waits for process {pid} (")
    assert said.endswith(f") belongs to user id {NOBODY}, and this daemon may not signal it\n")
    words = said.removeprefix("runctl: waits for ").strip()
    assert abort.poll() is None

    assert box.show(run)["waits_for"] == words
    assert f"waits for: {words}\n" in box.runctl("show", run)
    waiting = box.show(after)
    assert waiting["status"] == "queued"
    assert waiting["started_at"] is None
    assert waiting["waits_for"] == f"run {run}, which has not ended yet: {words}"
    assert [x["status"] for x in box.json("list", "t")] == ["queued", "aborted"]
    (thread,) = box.json("list")
    assert (thread["status"], thread["queued"]) == ("queued", 1)
    wait_until(lambda: f"run {run} cannot be ended: {words}" in box.log.read_text(), "it is told")
    box.runctl("abort", "t", code=6)
    assert f"run {run} is being aborted already: {words}" in box.stderr

    box.runctl("wait", box.submit("other", "true"))
    assert alive(pid)
    (box.path / "go").touch()
    assert abort.wait(DEADLINE) == 0
    box.runctl("wait", after)
    assert box.show(run)["waits_for"] is None
    assert box.log.read_text().count("cannot be ended") == 1


@pytest.mark.long  # as an abort waits
@pytest.mark.nightly
def test_an_abort_does_not_wait_for_ever(bound: Box) -> None:
    box = bound
    run, pid = _foreign(box, "t")
    after = box.submit("t", "true")
    box.runctl("abort", "t", code=1)
    *_, line = box.stderr.splitlines()
    assert line.startswith(
        f"runctl: run {run} is aborted, and not gone after 15.2 s: process {pid} ("
    )
    assert line.endswith(
        f"belongs to user id {NOBODY}, and this daemon may not signal it; it will not be replayed,"
        f" its thread goes on when it is gone. See what it waits for: runctl show {run}"
    )
    assert box.show(run)["status"] == "aborted"
    assert box.show(after)["status"] == "queued"
    (box.path / "go").touch()
    box.runctl("wait", after)


def test_the_daemon_stops_and_the_next_one_waits(bound: Box) -> None:
    """Nothing of an earlier attempt is alive when one starts."""
    box = bound
    _, pid = _foreign(box, "t")
    assert box.term() == 0
    assert "the next start waits until these are gone: process " in box.log.read_text()
    assert "of an earlier daemon" not in box.log.read_text()
    assert alive(pid)
    usual = box.config.read_text()
    box.config.write_text('start_timeout = "1s"\n' + usual)
    assert box.start(ready=False).wait(DEADLINE) == 69
    box.config.write_text(usual)
    line = box.log.read_text().splitlines()[-1]
    assert f" alive after 1 s: process {pid} (" in line
    assert line.endswith(
        f") belongs to user id {NOBODY}, and this daemon may not signal it; end them, or that"
        " daemon, and start again"
    )
    found = json.loads(box.runctl("doctor", "--json", code=1))["findings"]
    (left,) = [x["said"] for x in found if x["check"] == "keeper"]
    assert left == "processes of an earlier daemon are alive, and no start goes on before they end"
    keeper = scan()[pid].parent
    (box.path / "go").touch()
    wait_until(lambda: not alive(keeper), "the keeper is done")
    box.start()


def test_what_a_killed_daemon_could_not_end_is_waited_for(bound: Box) -> None:
    """By a start that says so at once, and begins no second attempt meanwhile."""
    box = bound
    run, pid = _foreign(box, "t")
    box.kill()
    box.configure("")
    waits = f"the start waits for processes of an earlier daemon: process {pid} ("
    box.start(ready=False)
    wait_until(lambda: waits in box.log.read_text(), "it says whom it waits for")
    assert alive(pid)
    (box.path / "go").touch()
    box.wait_ready()
    assert not alive(pid)
    wait_until(lambda: box.show(run)["attempt"] == 2, "it is replayed")


def test_one_that_is_stopped_meanwhile_is_ended_when_it_may(bound: Box) -> None:
    """Killed by its own user, it is gone for the abort as well."""
    box = bound
    run, pid = _foreign(box, "t")
    abort = box.popen("abort", "t", stderr=subprocess.PIPE)
    assert abort.stderr is not None
    assert f"process {pid} (" in abort.stderr.readline().decode()
    os.kill(pid, signal.SIGKILL)
    assert abort.wait(DEADLINE) == 0
    assert box.show(run)["status"] == "aborted"


#: Begins the end of a tree with a process of another user and one that does not hear TERM, and
#: says whenever it changes what ``held`` says. argv: a directory; "go" there ends the first one.
ENDING = f"""
import os, sys, trio
from pathlib import Path
from runctl.supervisor.processes.keeper_start import open_keeper
TREE = '''
import os, signal, sys, time
if os.fork() == 0:
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
    while not os.path.exists(sys.argv[1] + "/go"):
        time.sleep(0.02)
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + "/deaf", "w").close()
time.sleep(600)
'''
async def main():
    path = Path(sys.argv[1])
    async with open_keeper(path, wait=5) as keeper, trio.open_nursery() as nursery:
        null = os.open(os.devnull, os.O_RDWR)
        process = await keeper.spawn(
            [sys.executable, "-c", TREE, str(path)], mark="m", env=os.environ, cwd=None,
            stdin=null, stdout=null, stderr=null,
        )
        while not (path / "deaf").exists():
            await trio.sleep(0.01)
        nursery.start_soon(process.end, 3600)
        while not (held := keeper.held("m")):
            await trio.sleep(0.01)
        print(held, flush=True)
        while keeper.held("m"):
            await trio.sleep(0.01)
        print("nobody", flush=True)
        await process.end(0)
trio.run(main)
"""


def test_it_is_said_when_nobody_is_in_the_way_any_more() -> None:
    """Though others of its tree are waited for."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        command = [sys.executable, "-c", WITHOUT_CAP_KILL, sys.executable, "-c", ENDING, folder]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ending,
            selectors.DefaultSelector() as selector,
        ):
            assert ending.stdout is not None
            assert f"belongs to user id {NOBODY}" in ending.stdout.readline()
            selector.register(ending.stdout, selectors.EVENT_READ)
            Path(folder, "go").touch()
            if not selector.select(DEADLINE):
                ending.kill()
            assert ending.stdout.readline() == "nobody\n"
            assert ending.wait(DEADLINE) == 0
