"""What a command that runs as the daemon's own user can do to the daemon, its keeper, its
nats-server and its clients."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import DEADLINE, Box, daemon_with, wait_until
from pgserver import free_port
from proc import alive, children, find_keeper
from runctl.protocol import messages
from test_metrics import get

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

#: root may look into everybody, unless it has given that up: CAP_SYS_PTRACE, CAP_SYS_ADMIN and
#: CAP_PERFMON (the numbers of these).
UNPRIVILEGED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
data = (ctypes.c_uint32 * 6)()
assert libc.capget(header, data) == 0
for number in (19, 21, 38):
    for at in (0, 1, 2):
        data[at + 3 * (number // 32)] &= ~(1 << number % 32)
    if os.geteuid() == 0:
        libc.prctl(24, number, 0, 0, 0)
if os.geteuid() == 0:
    assert libc.capset(header, data) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
#: A line for each way into a process that is open: its environment, memory, and ptrace.
LOOK = """
import ctypes, sys
libc = ctypes.CDLL(None)
for pid in sys.argv[1:]:
    for name in ("environ", "mem"):
        try:
            with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
                if name == "environ" and not file.read(1):
                    continue  # it opens, and shows nothing
        except OSError:
            continue
        print(pid, name)
    if libc.ptrace(0x4206, int(pid), None, None) == 0:
        print(pid, "ptrace")
"""


def test_a_run_cannot_look_into_daemon_keeper_and_clients(stopped_box: Box) -> None:
    box = stopped_box
    box.prefix = [sys.executable, "-c", UNPRIVILEGED]
    box.start()
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    other = box.submit_py("other", code)
    said = lambda: box.runctl("attach", "other", "--no-follow", code=None)  # noqa: E731
    victim = int(wait_until(said, "it runs"))
    watcher = box.popen("attach", "other", through=box.prefix)
    assert watcher.stdout is not None
    watcher.stdout.readline()
    closed = [box.pid, find_keeper(box.pid), watcher.pid]
    run = box.submit("t", sys.executable, "-c", LOOK, *map(str, [*closed, victim]))
    box.runctl("wait", run)
    found = [line.split() for line in box.runctl("attach", "t", "--no-follow").splitlines()]
    assert [str(victim), "environ"] in found, "another run is open, or this shows nothing"
    assert [str(victim), "mem"] in found
    assert not [line for line in found if int(line[0]) in closed]
    assert box.show(other)["status"] == "running"


# ---- what is stopped -----------------------------------------------------------------------

#: The root of a tree of two, one of which has left it.
TREE = """
import os, time
if os.fork() == 0:
    os.setsid()
os.write(1, b"%d\\n" % os.getpid())  # in one piece, as print does not
time.sleep(600)
"""


@pytest.mark.long  # as long as silence is borne
def test_a_keeper_that_is_stopped_ends_the_daemon_and_all_it_runs(box: Box) -> None:
    run = box.submit_py("t", TREE)

    def pids() -> list[int]:
        found = box.runctl("attach", "t", "--no-follow", code=None).split()
        return [int(pid) for pid in found] if len(found) == 2 else []

    tree = wait_until(pids, "both run")
    keeper = find_keeper(box.pid)
    os.kill(keeper, signal.SIGSTOP)
    aborted = box.popen("abort", "t")
    assert box.daemon is not None
    assert box.daemon.wait(DEADLINE) == 69
    last = box.log.read_text().splitlines()[-1]
    assert last.startswith("runctld: the process keeper has not answered for 10 s, as when a run")
    assert last.endswith("start runctld again")
    assert not [pid for pid in [keeper, *tree] if alive(pid)]
    assert aborted.wait(DEADLINE) == 4
    box.start()
    assert box.show(run)["status"] == "aborted", "it was asked for before"


def test_a_silent_keeper_is_told_of_meanwhile(stopped_box: Box) -> None:
    box, port = stopped_box, free_port()
    box.configure(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
    box.prefix = daemon_with("processes.keeper_client.SILENCE", 600.0)
    box.start()
    keeper = find_keeper(box.pid)

    def healthy() -> bool:
        return get(port, "/healthz") == (200, "ready\n")

    wait_until(healthy, "all is well")
    os.kill(keeper, signal.SIGSTOP)
    try:
        wait_until(lambda: box.ask(messages.StatusRequest())[0].keeper_silent >= 2, "it is silent")
        wait_until(lambda: not healthy(), "it is not ready")
        assert "warning:  the process keeper has not answered for " in box.runctl("status")
        said = box.runctl("doctor", code=None)
        assert "no run begins or ends" in said
        assert "see whether a run has stopped it (SIGSTOP)" in said
    finally:
        os.kill(keeper, signal.SIGCONT)
    wait_until(lambda: box.ask(messages.StatusRequest())[0].keeper_silent == 0, "it answers")
    wait_until(healthy, "it is ready again")
    assert "warning" not in box.runctl("status")
    box.runctl("wait", box.submit("t", "true"))


@pytest.mark.long  # as long as silence is borne
@pytest.mark.nightly
def test_a_nats_server_that_is_stopped_is_replaced(box: Box) -> None:
    (server,) = children(box.pid, "nats-server")
    run = box.submit_py("t", "import sys; print(sys.stdin.read())")
    box.runctl("wait", run)
    os.kill(server, signal.SIGSTOP)

    def replaced() -> bool:
        found = children(box.pid, "nats-server")
        return bool(found) and found != [server]

    wait_until(replaced, "another one")
    assert "nats-server has not answered for 10 s, and is killed" in box.log.read_text()

    def answered() -> bool:
        client = box.popen("show", run, stderr=subprocess.DEVNULL)
        client.communicate(timeout=DEADLINE)
        return client.returncode == 0

    wait_until(answered, "it is asked again")
    box.runctl("wait", box.submit("t", "true"))
