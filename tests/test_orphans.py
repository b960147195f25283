"""After SIGKILL of the daemon, with nobody to restart it, nothing of it lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, wait_until
from house import Bus
from proc import alive, read_proc
from runctl.supervisor.processes.proctable import scan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="subreaper and /proc")

# Each run is one of several kinds of tree that do not want to end; every process notes
# its pid. argv: folder, kind.
TREE = r"""
import os, signal, sys, time
folder, kind = sys.argv[1], int(sys.argv[2])
def note(name):
    open(f"{folder}/{os.environ.get('RUNCTL_RUN', 'none')}-{name}-{os.getpid()}", "w").close()
def deaf():
    for number in signal.valid_signals():
        try: signal.signal(number, signal.SIG_IGN)
        except OSError: pass
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
def busy():
    while True: pass
def idle():
    while True: time.sleep(60)
deaf()
note("root")
if kind == 0:                       # a chain of sessions
    for depth in range(4):
        if os.fork(): idle()
        os.setsid(); note(f"session{depth}")
    idle()
elif kind == 1:                     # a daemon of the old kind, with nothing left open
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        os.chdir("/"); note("daemon"); os.closerange(0, 1024); idle()
    os.wait(); idle()
elif kind == 2:                     # without our mark, session and parent
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        note("bare")
        os.closerange(0, 1024)
        os.execve(sys.executable, ["bare", "-S", "-c", "import time; time.sleep(600)"], {})
    os.wait(); idle()
elif kind == 3:                     # a root that is gone, and its crowd
    for n in range(3):
        if os.fork() == 0:
            os.setsid(); note(f"crowd{n}"); idle()
    idle()
else:
    note("busy"); busy()
"""
PER_KIND = (5, 2, 2, 4, 2)


def _pids(folder: Path) -> list[int]:
    return [int(file.name.rpartition("-")[2]) for file in folder.iterdir()]


@pytest.fixture
def forest(
    stopped_box: Box, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Box, int, list[int]]]:
    """(a daemon with many hostile runs, its keeper, the pids of all its processes)"""
    runs: int = getattr(request, "param", 10)
    box = stopped_box
    box.configure('[queue]\nstop_grace = "100ms"\n')
    box.start()
    folder = tmp_path / "pids"
    folder.mkdir()
    bus = Bus(box.state)
    assert box.daemon is not None
    try:
        for n in range(runs):
            argv = [sys.executable, "-S", "-c", TREE, str(folder), str(n % 5)]
            bus.submit(f"t{n}", argv)
        members = sum(PER_KIND[n % 5] for n in range(runs))
        wait_until(lambda: len(_pids(folder)) >= members, "all trees are there", 120)
    finally:
        bus.close()
    rows = scan()
    (keeper,) = (pid for pid, row in rows.items() if row.parent == box.daemon.pid)
    servers = [
        pid
        for pid, row in rows.items()
        if row.parent == keeper and b"nats-server" in read_proc(pid, "cmdline")
    ]
    assert len(servers) == 1
    pids = [*_pids(folder), *servers]
    try:
        yield box, keeper, pids
    finally:
        for pid in filter(alive, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _gone(pids: list[int], what: str) -> None:
    began = time.monotonic()
    wait_until(lambda: not [pid for pid in pids if alive(pid)], what)
    took = time.monotonic() - began
    print(f"{what}: {len(pids)} processes in {took:.2f} s, load {os.getloadavg()[0]:.0f}")


@pytest.mark.parametrize("forest", [60], indirect=True)
def test_the_daemon_is_killed(forest: tuple[Box, int, list[int]]) -> None:
    box, keeper, pids = forest
    box.kill()
    _gone([*pids, keeper], "daemon killed")


def test_the_keeper_is_killed(forest: tuple[Box, int, list[int]]) -> None:
    """The daemon ends what that has left, and itself."""
    box, keeper, pids = forest
    os.kill(keeper, signal.SIGKILL)
    assert box.daemon is not None
    _gone([*pids, box.daemon.pid], "keeper killed")
    assert box.daemon.wait(DEADLINE) == 69
    assert "the process keeper " in box.log.read_text()


def test_both_are_killed(forest: tuple[Box, int, list[int]], tmp_path: Path) -> None:
    """Roots and the NATS server end with the keeper; what they have left behind ends with
    the next start, except what has left its environment as well."""
    box, keeper, pids = forest
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGSTOP)  # neither sees the other go
    os.kill(keeper, signal.SIGKILL)
    box.kill()
    names = [file.name for file in (tmp_path / "pids").iterdir()]
    roots = [int(name.rpartition("-")[2]) for name in names if "-root-" in name]
    bare = [int(name.rpartition("-")[2]) for name in names if "-bare-" in name]
    _gone([*roots, pids[-1]], "both killed")
    box.start()
    assert not [pid for pid in pids if pid not in bare and alive(pid)]


def test_a_stopped_keeper_is_waited_for(stopped_box: Box, tmp_path: Path) -> None:
    """It has a lock on everything; the next daemon says what it waits for, and ends."""
    box = stopped_box
    box.start()
    box.configure('start_timeout = "1s"\n')  # of the next one
    assert box.daemon is not None
    (keeper,) = (pid for pid, row in scan().items() if row.parent == box.daemon.pid)
    os.kill(keeper, signal.SIGSTOP)
    try:
        box.kill()
        done = subprocess.run(
            [sys.executable, "-m", "runctl.supervisor.main", "-c", str(box.config)],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 69
        assert "still alive after 1 s" in done.stderr
    finally:
        os.kill(keeper, signal.SIGCONT)
    wait_until(lambda: not alive(keeper), "the keeper has ended")
    box.configure("")
    box.start()
