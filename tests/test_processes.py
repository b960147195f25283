"""Process trees: whatever a run starts is gone when its end is said to be over."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from conftest import SLACK, wait_until
from proc import alive
from runctl.protocol.errors import RunFailed, Unavailable
from runctl.protocol.model import RunSpec
from runctl.supervisor.execution.registry import Live
from runctl.supervisor.execution.work import Work
from runctl.supervisor.processes.environments import Answer, read_environment
from runctl.supervisor.processes.keeper_client import Keeper
from runctl.supervisor.processes.keeper_link import KeeperLost
from runctl.supervisor.processes.keeper_start import open_keeper
from runctl.supervisor.processes.process import Process
from runctl.supervisor.processes.proctable import Row, read_row, scan, scan_ps, walk_descendants
from runctl.supervisor.processes.signalling import (
    kill_processes,
    signal_process,
    terminate_processes,
)
from runctl.supervisor.processes.trees import STUCK, Forest, Tree

LINUX = sys.platform == "linux"
linux_only = pytest.mark.skipif(not LINUX, reason="needs a child subreaper and /proc")
DEADLINE = 60.0 * SLACK
#: A grace that no test waits out, seconds.
NEVER = 3600.0
PYTHON = (sys.executable, "-I", "-S", "-c")

# Every script names its processes in a file, one pid a line, before it does its deed.
NOTE = """
import os, signal, sys, time
def note():
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
def idle():
    while True:
        time.sleep(60)
def strip():
    "Become a process without any mark."
    note()
    code = "import time; time.sleep(600)"
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", code], {})
def daemonize():
    "Fork twice, each time into a new session; the caller goes on as it was."
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            note()
            idle()
        os._exit(0)
    os.wait()
"""


#: Leaves a server behind, in a session of its own.
SERVING = """
if os.fork() == 0:
    os.setsid()
    note()
    idle()
"""


#: ``pids()``: how many have said theirs.
COUNT = """
def pids():
    with open(sys.argv[1], "a+") as file:
        file.seek(0)
        return len(file.readlines())
"""


def pids_in(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def state_mark(path: Path) -> bytes:
    return b"RUNCTL_STATE=" + os.fsencode(path.resolve())


def marked(mark: bytes) -> list[int]:
    """The live processes that have ``mark`` in their environment."""
    return [pid for pid in scan() if mark in read_environment(pid)]


async def until(what: Callable[[], Any], why: str, deadline: float = DEADLINE) -> None:
    with trio.move_on_after(deadline):
        while not what():  # noqa: ASYNC110 (of other processes there is no event)
            await trio.sleep(0.005)
        return
    raise AssertionError(f"not within {deadline} s: {why}")


@contextmanager
def taking(at_least: float) -> Iterator[None]:
    """And much less than NEVER."""
    began = time.monotonic()
    with trio.fail_after(DEADLINE):
        yield
    took = time.monotonic() - began
    assert took >= at_least, f"took {took:.3f} s"


async def spawn(keeper: Keeper, *argv: str, mark: str = "run-1", **more: Any) -> Process:
    """Spawn on the null device, with our PATH."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    given = {"env": {"PATH": os.environ["PATH"]}, "cwd": None, "stdin": null, "stdout": null}
    try:
        return await keeper.spawn(argv, mark=mark, **{**given, "stderr": null, **more})
    finally:
        os.close(null)


async def script(
    keeper: Keeper, code: str, log: Path, members: int, mark: str = "run-1"
) -> tuple[Process, list[int]]:
    """Run ``code`` until ``members`` processes have said their pids."""
    process = await spawn(keeper, *PYTHON, NOTE + code, str(log), mark=mark)
    await until(lambda: len(pids_in(log)) >= members, f"{members} pids in {log}")
    return process, pids_in(log)


@asynccontextmanager
async def output(keeper: Keeper, *argv: str, **more: Any) -> AsyncIterator[Callable[[], Any]]:
    """Run ``argv``; yields an async function that gives its output and exit code."""
    read, write = os.pipe()
    async with trio.lowlevel.FdStream(read) as stream:
        try:
            process = await spawn(keeper, *argv, stdout=write, **more)
        finally:
            os.close(write)

        async def result() -> tuple[str, int]:
            text = b"".join([data async for data in stream])
            return text.decode(), await process.wait()

        yield result
        await process.end(0)


@pytest.fixture
async def keeper(tmp_path: Path) -> AsyncIterator[Keeper]:
    with trio.fail_after(DEADLINE):
        async with open_keeper(tmp_path, wait=5) as keeper:
            yield keeper


# --- spawning ---------------------------------------------------------------------------


async def test_exit_codes_and_signals(keeper: Keeper) -> None:
    for argv, code in (
        (("true",), 0),
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -9 $$"), -9),
    ):
        process = await spawn(keeper, *argv)
        assert await process.wait() == code
        await process.end(1)
        assert await process.wait() == code


async def test_what_the_child_gets(keeper: Keeper, tmp_path: Path) -> None:
    """Its marks, directory, session, standard descriptors; default signals; no other fd."""
    work = tmp_path / "wörk"
    work.mkdir()
    # Python itself ignores SIGPIPE and SIGXFSZ, so what was inherited is read in a shell.
    sh = 'grep -E "^Sig(Blk|Ign)" /proc/self/status'
    env = {"PATH": os.environ["PATH"], "X": "ä\udcff"}
    kept = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(kept, True)
    try:
        more = {"mark": "r-7", "env": env, "cwd": str(work)}
        async with output(keeper, "sh", "-c", sh, **more) as result:
            text, _ = await result()
            # 32 and 33 are libc's own: nobody can set them, and some hosts hand them down ignored.
            ours = sum(1 << (number - 1) for number in signal.valid_signals())
            assert [int(x, 16) & ours for x in re.findall(r"Sig\w+:\s+(\w+)", text)] == [0, 0]
        code = """
import os
names = os.listdir("/proc/self/fd")  # one is of the listing itself, and closed by now
print(sorted(name for name in names if os.path.exists(f"/proc/self/fd/{name}")))
print(os.environb, os.getcwdb(), os.getsid(0) == os.getpid() == os.getpgrp())
"""
        async with output(keeper, *PYTHON, code, **more) as result:
            text, status = await result()
    finally:
        os.close(kept)
    assert status == 0
    assert text.startswith("['0', '1', '2']\n")
    assert "b'RUNCTL_RUN': b'r-7'" in text
    assert f"b'RUNCTL_STATE': {state_mark(tmp_path).partition(b'=')[2]!r}" in text
    assert f"b'X': {os.fsencode(env['X'])!r}" in text
    assert f"{os.fsencode(work)!r} True" in text


async def test_what_cannot_be_started_is_said_plainly(keeper: Keeper, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("true")
    lost = tmp_path / "lost"
    lost.write_text("#!/no/such/interpreter\n")
    lost.chmod(0o700)
    none = str(tmp_path / "none")
    cases: list[tuple[tuple[str, ...], dict[str, Any], int, str]] = [
        (("no-such-command",), {}, 127, "command not found: 'no-such-command'"),
        ((none,), {}, 127, "command not found"),
        ((str(plain / "x"),), {}, 127, "command not found"),
        ((str(plain),), {}, 126, "not executable"),
        ((str(tmp_path),), {}, 126, "not executable"),
        ((str(lost),), {}, 126, "interpreter"),
        (("true",), {"cwd": none}, 126, "none' does not exist"),
        (("true",), {"cwd": str(plain)}, 126, "is not a directory; change cwd"),
        (("true", "x" * (1 << 17)), {}, 126, "pass the prompt on stdin"),
        (("true", "nul\0"), {}, 126, "no argument"),
        (("true", "\ud800"), {}, 126, "no argument"),
        (("true",), {"env": {"a=b": "c"}}, 126, "cannot be started"),
    ]
    for argv, more, code, words in cases:
        with pytest.raises(RunFailed, match=re.escape(words)) as caught:
            await spawn(keeper, *argv, **more)
        assert caught.value.exit_code == code
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await spawn(keeper, "true", stdin=9999)
    assert await (await spawn(keeper, "true")).wait() == 0


async def test_a_megabyte_of_arguments(keeper: Keeper) -> None:
    """Many at once, so that one message's end and the next one's start come together."""
    argv = [*PYTHON, "import sys; print(sum(map(len, sys.argv[1:])))", *["x" * 100_000] * 10]

    async def one() -> None:
        async with output(keeper, *argv) as result:
            assert await result() == ("1000000\n", 0)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(one)


@linux_only
async def test_messages_that_arrive_together(keeper: Keeper) -> None:
    """Each keeps its own descriptors, though one's end comes with the next one's start."""
    sleeper = await spawn(keeper, "sleep", "60")
    served = scan()[sleeper.pid].parent

    async def one(number: int) -> None:
        async with output(keeper, "sh", "-c", f"echo {number}", "x" * 60_000) as result:
            assert await result() == (f"{number}\n", 0)

    async with trio.open_nursery() as nursery:
        os.kill(served, signal.SIGSTOP)
        for number in range(6):
            nursery.start_soon(one, number)
        await trio.testing.wait_all_tasks_blocked(0.05)
        os.kill(served, signal.SIGCONT)


async def test_two_hundred_at_once(keeper: Keeper) -> None:
    """Each gets its own descriptors and its own exit code, and all are ended."""

    async def one(number: int) -> None:
        code = f"echo {number}; sleep 60 & exit {number}"
        read, write = os.pipe()
        async with trio.lowlevel.FdStream(read) as stream:
            try:
                process = await spawn(keeper, "sh", "-c", code, mark=f"n{number}", stdout=write)
            finally:
                os.close(write)
            assert await process.wait() == number
            await process.end(5)
            text = b"".join([data async for data in stream])  # ends, so nobody holds it
            assert text == f"{number}\n".encode()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one, number)


@linux_only
async def test_a_keeper_out_of_descriptors_stays(keeper: Keeper, tmp_path: Path) -> None:
    """What it cannot do is said; what it cannot see is not taken for gone."""
    process, pids = await script(keeper, STUBBORN, tmp_path / "pids", 2)
    served = scan()[process.pid].parent
    old = resource.prlimit(served, resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir(f"/proc/{served}/fd")))
    started, said = [], set()
    for limit in range(3, used + 10):
        resource.prlimit(served, resource.RLIMIT_NOFILE, (limit, old[1]))
        try:
            other = await spawn(keeper, "true", mark="other")
        except RunFailed as error:
            said.add(str(error))
        else:
            started.append(limit)
            assert await other.wait() == 0
    assert started
    assert started[0] > 3
    assert said == {"'true' cannot be started: Too many open files; raise the limit or run less"}
    resource.prlimit(served, resource.RLIMIT_NOFILE, (3, old[1]))
    with trio.move_on_after(0.2) as scope:
        await process.end(0)
    assert scope.cancelled_caught
    assert all(map(alive, pids))
    resource.prlimit(served, resource.RLIMIT_NOFILE, old)
    await process.end(0)
    assert not [pid for pid in pids if alive(pid)]


async def test_a_cancelled_spawn_leaves_nothing(keeper: Keeper, tmp_path: Path) -> None:
    """Neither when the keeper has not answered yet, nor when it just has."""
    log = tmp_path / "pids"

    async def one() -> None:
        process = await spawn(keeper, *PYTHON, NOTE + "note(); idle()", str(log))
        with trio.CancelScope(shield=True):  # it was not cancelled in time
            await process.end(0)

    for number in range(30):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one)
                for _ in range(2):
                    await trio.lowlevel.checkpoint()
                await trio.sleep(number / 10_000)
                scope.cancel()
    later = await spawn(keeper, "true")  # all that was asked for before has been started
    await later.end(1)
    await until(lambda: not marked(state_mark(tmp_path)), "all are gone")


@linux_only
async def test_a_spawn_cancelled_when_its_answer_is_there(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = keeper._link.send

    async def send_and_await(data: bytes, fds: tuple[int, ...]) -> None:
        await send(data, fds)
        await until(lambda: keeper._link._replies, "it is answered")
        scope.cancel()

    monkeypatch.setattr(keeper._link, "send", send_and_await)
    with trio.CancelScope() as scope:
        await spawn(keeper, "sleep", "60")
    monkeypatch.undo()
    assert scope.cancelled_caught
    await until(lambda: not marked(state_mark(tmp_path)), "it is gone")


# --- ending -----------------------------------------------------------------------------


@linux_only
async def test_daemonized_grandchildren_are_ended(keeper: Keeper, tmp_path: Path) -> None:
    code = """
daemonize()
if os.fork() == 0:
    os.setsid()
    strip()  # known by its parent alone
note()
idle()
"""
    process, pids = await script(keeper, code, tmp_path / "pids", 3)
    await until(lambda: any(not read_environment(p)[0] for p in pids), "one has no mark")
    with taking(0):
        await process.end(NEVER)
    assert not [pid for pid in pids if alive(pid)]
    assert await process.wait() == -signal.SIGTERM


@linux_only
async def test_leftovers_of_an_exited_root_are_ended(keeper: Keeper, tmp_path: Path) -> None:
    """In its session, or in their own and known by their mark."""
    code = """
open(sys.argv[1], "a").close()
daemonize()
if os.fork() == 0:
    strip()  # known by its session alone
while sum(1 for _ in open(sys.argv[1])) < 2: time.sleep(0.001)
"""
    process, pids = await script(keeper, code, tmp_path / "pids", 2)
    assert await process.wait() == 0
    await until(lambda: any(not read_environment(p)[0] for p in pids), "one has no mark")
    assert all(map(alive, pids))
    with taking(0):
        await process.end(NEVER)
    assert not [pid for pid in pids if alive(pid)]


@linux_only
async def test_what_is_kept_is_forgotten_when_it_ends_by_itself(
    keeper: Keeper, tmp_path: Path
) -> None:
    log = tmp_path / "pids"
    process, (server,) = await script(keeper, SERVING, log, 1)
    await process.wait()
    left = await process.end(0, keep=True)
    assert f"({server})" in left.kept[0]
    assert len(keeper._kept) == len(keeper._marks) == 1
    os.kill(server, signal.SIGKILL)
    await until(lambda: server not in scan(), "it is gone")
    other = await spawn(keeper, "true")  # the keeper looks when a tree is being ended
    await other.end(0)
    await until(lambda: not keeper._kept and not keeper._marks, "it is forgotten")


@linux_only
async def test_what_an_end_names(keeper: Keeper, tmp_path: Path) -> None:
    """What a root has left behind, once: neither the root, nor what another end named."""
    process, _ = await script(keeper, SERVING + "idle()", tmp_path / "living", 1)
    assert await process.end(NEVER) == ([], [])
    code = SERVING + "if os.fork() == 0: note(); idle()\nwhile pids() < 2: time.sleep(0.001)"
    log = tmp_path / "left"
    process, pids = await script(keeper, COUNT + code, log, 2)
    await process.wait()
    (server,) = (pid for pid in pids if os.getsid(pid) == pid)
    (other,) = {*pids} - {server}
    ended, kept = await process.end(NEVER, keep=True)
    assert [re.findall(r"\((\d+)\)", x) for x in (*ended, *kept)] == [[str(other)], [str(server)]]
    assert await process.end(0) == ([], [])


async def test_only_the_tree_itself_is_ended(keeper: Keeper, tmp_path: Path) -> None:
    code = "daemonize(); note(); idle()"
    one, ones = await script(keeper, code, tmp_path / "one", 2, mark="one")
    two, twos = await script(keeper, code, tmp_path / "two", 2, mark="two")
    await one.end(5)
    assert not [pid for pid in ones if alive(pid)]
    assert all(map(alive, twos))
    await two.end(5)


@linux_only
async def test_term_ignored_kill_comes_after_the_grace(keeper: Keeper, tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); daemonize(); note(); idle()"
    process, pids = await script(keeper, code, tmp_path / "pids", 2)
    with taking(0.5):
        await process.end(0.5)
    assert not [pid for pid in pids if alive(pid)]
    assert await process.wait() == -signal.SIGKILL


@linux_only
async def test_a_tree_may_use_its_grace(keeper: Keeper, tmp_path: Path) -> None:
    """TERM comes once, to stopped ones too, and what a handler starts is of the tree."""
    code = """
def handler(*_):
    open(sys.argv[1] + ".term", "a").write("t")
    # Blocked in the child until it has said its pid; then it dies of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.fork() == 0:
        os.setsid()
        note()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        idle()
    time.sleep(0.2)
    os._exit(3)
signal.signal(signal.SIGTERM, handler)
note()
os.kill(os.getpid(), signal.SIGSTOP)
idle()
"""
    log = tmp_path / "pids"
    process, pids = await script(keeper, code, log, 1)
    await until(lambda: scan()[pids[0]].state == "T", "it is stopped")
    with taking(0.2):
        await process.end(NEVER)
    assert await process.wait() == 3
    assert (tmp_path / "pids.term").read_text() == "t"
    assert len(pids_in(log)) == 2
    assert not [pid for pid in pids_in(log) if alive(pid)]


@linux_only
async def test_what_comes_loose_from_a_handler_hears_of_it(keeper: Keeper, tmp_path: Path) -> None:
    """A daemon that a handler has started, and one that was never told, get a TERM of their
    own; what the handler waits for gets none."""
    code = """
def child(mark, seconds):
    def heard(*_):
        open(sys.argv[1] + "." + mark, "a").write("t")
        os._exit(0)
    signal.signal(signal.SIGTERM, heard)
    note()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if mark == "loose":
        os.kill(os.getpid(), signal.SIGSTOP)  # which hears nothing before it is continued
    time.sleep(seconds)
    open(sys.argv[1] + "." + mark, "a").write("done")
    os._exit(0)
def handler(*_):
    # A TERM that comes before a child has its own handler waits for that.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            child("loose", 600)
        os._exit(0)
    os.wait()
    waited = os.fork()
    if waited == 0:
        child("waited", 0.5)
    os.waitpid(waited, 0)
    os._exit(0)
signal.signal(signal.SIGTERM, handler)
note()
idle()
"""
    log = tmp_path / "pids"
    process, _ = await script(keeper, code, log, 1)
    await process.end(60)
    assert await process.wait() == 0
    assert (tmp_path / "pids.loose").read_text() == "t"
    assert (tmp_path / "pids.waited").read_text() == "done"
    assert len(pids_in(log)) == 3
    assert not [pid for pid in pids_in(log) if alive(pid)]


async def test_a_spawn_that_is_cancelled_with_its_keeper_ends(tmp_path: Path) -> None:
    """As when the daemon is stopped while it starts: nobody read the keeper's answer then, and
    the end of the tree was waited for for ever."""
    with trio.CancelScope() as scope:
        async with open_keeper(tmp_path, wait=5) as keeper, trio.open_nursery() as nursery:
            nursery.start_soon(spawn, keeper, "sleep", "600")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


@linux_only
async def test_a_shorter_grace_hastens_all_who_wait(keeper: Keeper, tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(); idle()"
    process, pids = await script(keeper, code, tmp_path / "pids", 1)
    with taking(0):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.end, NEVER)
            nursery.start_soon(process.end, NEVER)
            with trio.move_on_after(0.1):
                await process.end(NEVER)  # a cancelled one goes on
            assert alive(pids[0])
            await process.end(0)
            await process.end(NEVER)  # later still: a longer one does not slow it, nor hang
    assert not alive(pids[0])


@linux_only
async def test_a_longer_grace_does_not_slow_an_end(keeper: Keeper, tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(); idle()"
    process, pids = await script(keeper, code, tmp_path / "pids", 1)
    with taking(0.3):
        async with trio.open_nursery() as nursery:
            for grace in (NEVER, 0.3, NEVER):
                nursery.start_soon(process.end, grace)
                await trio.testing.wait_all_tasks_blocked()
    assert not alive(pids[0])


@linux_only
async def test_one_that_forks_and_exits_all_the_time(keeper: Keeper, tmp_path: Path) -> None:
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note()
while True:
    if os.fork(): os._exit(0)
"""
    process, _ = await script(keeper, code, tmp_path / "pids", 1, mark="chain")
    await process.wait()
    with trio.fail_after(DEADLINE):
        await process.end(0.05)
    assert not marked(state_mark(tmp_path))


@linux_only
async def test_a_leader_that_left_its_threads_running(keeper: Keeper, tmp_path: Path) -> None:
    """It looks like a zombie, yet its threads run on."""
    code = """
import ctypes, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=idle).start()
note()
ctypes.CDLL(None).syscall(ctypes.c_long(60 if os.uname().machine == "x86_64" else 93), 0)
"""
    process, pids = await script(keeper, code, tmp_path / "pids", 1)
    await until(lambda: scan()[pids[0]].state == "Z", "its leader has exited")
    with trio.fail_after(DEADLINE):
        await process.end(0.1)
    assert pids[0] not in scan()


@linux_only
async def test_a_tree_seen_once_may_drop_its_mark(keeper: Keeper, tmp_path: Path) -> None:
    """On TERM it re-executes itself without the mark, in a session and with a parent of
    its own making: still known from before."""
    code = """
def handler(*_):
    os.execve(sys.executable, [sys.executable, "-c", STUBBORN, sys.argv[1]], {})
STUBBORN = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + ".again", "w").write("x")
time.sleep(60)
'''
signal.signal(signal.SIGTERM, handler)
if os.fork() == 0:
    os.setsid()
    note()
    idle()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
note()
idle()
"""
    process, pids = await script(keeper, code, tmp_path / "pids", 2)
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.end, NEVER)
            await until((tmp_path / "pids.again").exists, "it has dropped its mark")
            await process.end(0.1)
    assert not [pid for pid in pids if alive(pid)]


# --- the ends of daemon and keeper ------------------------------------------------------

DAEMON = """
import os, sys, trio
from pathlib import Path
from runctl.supervisor.processes.keeper_start import open_keeper
async def main():
    async with open_keeper(Path(sys.argv[1]), wait=5) as keeper:
        null = os.open(os.devnull, os.O_RDWR)
        await keeper.spawn(sys.argv[2:], mark="m", env=os.environ, cwd=None,
                           stdin=null, stdout=null, stderr=null)
        await trio.sleep_forever()
trio.run(main)
"""


def start_daemon(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", DAEMON, *argv])


@asynccontextmanager
async def daemon_with_tree(state: Path, members: int, code: str) -> AsyncIterator[Any]:
    """(a daemon in a process of its own, its keeper's pid, the pids of its tree)"""
    log = state / "pids"
    daemon = start_daemon(str(state), *PYTHON, NOTE + code, str(log))
    try:
        await until(lambda: len(pids_in(log)) >= members, "the tree is there")
        keeper = next(pid for pid, row in scan().items() if row.parent == daemon.pid)
        yield daemon, keeper, pids_in(log)
    finally:
        daemon.kill()
        daemon.wait()


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); daemonize(); note(); idle()"


@linux_only
async def test_nothing_outlives_a_killed_daemon(tmp_path: Path) -> None:
    async with daemon_with_tree(tmp_path, 2, STUBBORN) as (daemon, keeper, pids):
        daemon.kill()
        await until(lambda: not any(map(alive, [keeper, *pids])), "all are gone")


@linux_only
async def test_the_keeper_is_not_ended_by_signals_for_the_daemon(tmp_path: Path) -> None:
    async with daemon_with_tree(tmp_path, 2, STUBBORN) as (daemon, keeper, pids):
        assert os.getsid(keeper) == keeper
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(keeper, number)
        daemon.kill()  # it is still there to do this
        await until(lambda: not any(map(alive, [keeper, *pids])), "all are gone")


@linux_only
async def test_setsid_chains_do_not_outlive_a_killed_daemon(tmp_path: Path) -> None:
    code = "note()\nwhile True:\n    if os.fork(): os._exit(0)\n    os.setsid()"
    async with daemon_with_tree(tmp_path, 1, code) as (daemon, keeper, _):
        daemon.kill()
        await until(lambda: not alive(keeper), "the keeper is done")
        assert not marked(state_mark(tmp_path))


@linux_only
async def test_a_start_waits_for_what_the_last_one_left(tmp_path: Path) -> None:
    async with daemon_with_tree(tmp_path, 2, STUBBORN) as (daemon, keeper, pids):
        with pytest.raises(Unavailable, match=r"still alive after 0\.1 s"):
            async with open_keeper(tmp_path, wait=0.1):
                raise AssertionError("two keepers at once")
        os.kill(keeper, signal.SIGSTOP)
        daemon.kill()
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_continue_later, keeper, pids)
                async with open_keeper(tmp_path, wait=DEADLINE):
                    assert not [pid for pid in [keeper, *pids] if alive(pid)]


async def _continue_later(keeper: int, pids: list[int]) -> None:
    await trio.sleep(0.1)
    assert all(map(alive, pids))
    os.kill(keeper, signal.SIGCONT)


@linux_only
async def test_a_start_sweeps_what_a_killed_keeper_left(tmp_path: Path) -> None:
    """And leaves alone what belongs to another state directory."""
    other = tmp_path / "other"
    other.mkdir()
    async with (
        daemon_with_tree(tmp_path, 2, STUBBORN) as (daemon, keeper, pids),
        open_keeper(other, wait=5) as neighbour,
    ):
        mine = await spawn(neighbour, "sleep", "600")
        daemon.send_signal(signal.SIGSTOP)  # so that it cannot clear up first
        os.kill(keeper, signal.SIGKILL)
        daemon.kill()
        await until(lambda: sum(map(alive, pids)) == 1, "the root dies with its keeper")
        (tmp_path / "link").symlink_to(tmp_path)
        async with open_keeper(tmp_path / "link", wait=DEADLINE):
            assert not [pid for pid in pids if alive(pid)]
        assert alive(mine.pid)


async def test_a_terminal_controls_the_session(keeper: Keeper) -> None:
    """Its end reads as EIO or as end of file; a descriptor that is none is said so."""
    master, slave = os.openpty()
    code = "import os; print(os.tcgetpgrp(os.open('/dev/tty', os.O_RDWR)) == os.getpid())"
    try:
        process = await spawn(keeper, *PYTHON, code, stdout=slave, tty=True)
    finally:
        os.close(slave)
    with os.fdopen(master, "rb", buffering=0) as file:
        text = b""
        while not text.endswith(b"\n"):  # it comes in one piece or in two
            text += (part := await trio.to_thread.run_sync(file.read, 100))
            assert part, text
        assert text == b"True\r\n"
        assert await process.wait() == 0
    with pytest.raises(RunFailed, match="cannot be started: Inappropriate ioctl"):
        await spawn(keeper, "true", tty=True)


@linux_only
async def test_a_lost_keeper_is_said_to_all_who_wait(tmp_path: Path) -> None:
    lost: list[str] = []

    async def expect(call: Callable[[], Any], name: str) -> None:
        with pytest.raises(KeeperLost):
            await call()
        lost.append(name)

    with trio.fail_after(DEADLINE):
        async with open_keeper(tmp_path, wait=5) as keeper:
            process, pids = await script(keeper, STUBBORN, tmp_path / "pids", 2)
            done = await spawn(keeper, "true")
            assert await done.wait() == 0
            pid = scan()[process.pid].parent
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect, process.wait, "wait")
                nursery.start_soon(expect, lambda: process.end(60), "end")
                await trio.testing.wait_all_tasks_blocked()
                os.kill(pid, signal.SIGKILL)
                await keeper.dead.wait()
            await expect(lambda: spawn(keeper, "true"), "spawn")
            assert await done.wait() == 0
    assert sorted(lost) == ["end", "spawn", "wait"]
    await until(lambda: not any(map(alive, pids)), "none lives")  # one that exits has no mark


@linux_only
async def test_closing_kills_all_and_lets_nobody_wait(tmp_path: Path) -> None:
    async def expect_lost(process: Process) -> None:
        with pytest.raises(KeeperLost):
            await process.wait()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with open_keeper(tmp_path, wait=5) as keeper:
                    process, pids = await script(keeper, STUBBORN, tmp_path / "pids", 2)
                    nursery.start_soon(expect_lost, process)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
                    await trio.sleep_forever()
            assert not [pid for pid in pids if alive(pid)]
    assert not keeper.dead.is_set()
    with pytest.raises(KeeperLost):
        await process.end(1)


# --- the keeper's own reasoning ---------------------------------------------------------


NOTHING = Answer(b"", False, 0.0)


def row(parent: int, session: int, start: int = 1, state: str = "S", threads: int = 1) -> Row:
    return Row(parent, session, session, start, state, threads)


@linux_only
def test_a_pid_that_comes_again_is_another_process() -> None:
    me = os.getpid()
    forest = Forest()
    forest.add(Tree(1, 100, 1, b"RUNCTL_RUN=old"))
    # Somebody else's process has the root's pid by now, and a session of that number.
    told = {(100, 2): NOTHING, (101, 3): NOTHING}
    look = forest.look({100: row(me, 100, start=2), 101: row(100, 100, start=3)}, {}, told)
    assert (look.members, look.proven) == ({}, True)
    # A later root has it: the earlier tree must not claim it, nor its removal lose it.
    forest.add(Tree(2, 100, 2, b"RUNCTL_RUN=new"))
    for _ in range(2):
        look = forest.look({100: row(me, 100, start=2)}, {}, {})
        assert (look.members, look.proven) == ({2: {100}}, True)
        if 1 in forest.trees:
            forest.remove(forest.trees[1])


@linux_only
def test_a_root_is_known_before_it_has_a_session_of_its_own() -> None:
    forest = Forest()
    forest.add(Tree(1, 100, 1, b"RUNCTL_RUN=x"))
    look = forest.look({100: row(os.getpid(), os.getsid(0))}, {}, {})
    assert (look.members, look.proven) == ({1: {100}}, True)


@linux_only
def test_an_unknown_zombie_spoils_a_scan() -> None:
    """Its children may have come after the listing and may not be in it."""
    forest, me = Forest(), os.getpid()
    forest.add(Tree(1, 100, 1, b"RUNCTL_RUN=x"))
    look = forest.look({200: row(me, 200, state="Z")}, {}, {})
    assert (look.members, look.proven, look.spoiled) == ({}, False, True)
    look = forest.look({100: row(me, 100, state="Z")}, {}, {})
    assert (look.members, look.proven, look.spoiled) == ({1: {100}}, True, False)


@linux_only
def test_one_that_was_not_asked_may_be_of_any_tree() -> None:
    """Until it has answered, or it is known that it does not: then absence is proven."""
    forest, me = Forest(), os.getpid()
    forest.add(Tree(1, 100, 1, b"RUNCTL_RUN=x"))
    table = {200: row(me, 200)}
    look = forest.look(table, {}, {})
    assert (look.proven, look.spoiled, look.unidentified) == (False, False, [(200, 1)])
    for answer in (NOTHING, Answer(b"", True, 0.0)):
        look = forest.look(table, {}, {(200, 1): answer})
        assert (look.members, look.proven, look.unidentified) == ({}, True, [(200, 1)])
    look = forest.look(table, {}, {(200, 1): Answer(b"RUNCTL_RUN=x", False, 0.0)})
    assert (look.members, look.proven, look.unidentified) == ({1: {200}}, True, [])
    look = forest.look(table, look.owners, {})
    assert look.members == {1: {200}}, "what was known once is not asked again"


@linux_only
def test_a_kill_hits_the_group_of_one_that_is_gone_already() -> None:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    kill_processes({child.pid: row(1, child.pid, start=0)}, [child.pid])
    assert child.wait(DEADLINE) == -signal.SIGKILL


@linux_only
def test_a_term_hits_what_its_group_has_forked_just_now() -> None:
    """And reaches those that are stopped."""
    code = "import os, sys, time; os.fork(); os.write(1, b'%d ' % os.getpid()); time.sleep(600)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        text = b""
        while text.count(b" ") < 2:
            text += os.read(child.stdout.fileno(), 100)
        (other,) = {int(pid) for pid in text.split()} - {child.pid}
        os.killpg(child.pid, signal.SIGSTOP)
        terminate_processes(
            {child.pid: row(1, child.pid, start=0)}, [child.pid]
        )  # which saw no other
        assert child.wait(DEADLINE) == -signal.SIGTERM
        wait_until(lambda: not alive(other), "the other heard it as well")


@linux_only
def test_a_signal_hits_only_the_process_that_was_seen() -> None:
    child = subprocess.Popen(["sleep", "60"])
    start = scan()[child.pid].start
    signal_process(child.pid, start - 1, signal.SIGKILL)
    signal_process(child.pid, start, signal.SIGTERM)
    assert child.wait(DEADLINE) == -signal.SIGTERM
    signal_process(child.pid, start, signal.SIGKILL)  # gone: nothing to say


@linux_only
def test_not_being_able_to_look_is_not_absence() -> None:
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, old[1]))
    try:
        for look in (read_row, read_environment):
            with pytest.raises(OSError, match="Too many open files"):
                look(os.getpid())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    assert read_row(2**22 + 1) is None


def test_a_scan_by_ps_agrees() -> None:
    me = os.getpid()
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        table = scan_ps()
        assert table[me].parent == os.getppid()
        assert table[child.pid].parent == me
        assert table[child.pid].session == child.pid
        assert child.pid in walk_descendants(table, me)
    finally:
        child.kill()
        child.wait()


@linux_only
def test_a_ps_that_hangs_is_given_up(tmp_path: Path) -> None:
    ps = tmp_path / "ps"
    ps.write_text("#!/bin/sh\nexec sleep 600\n")
    ps.chmod(0o700)
    code = """
from runctl.supervisor.processes import proctable
proctable.PS_LIMIT = 0.1
try:
    proctable.scan_ps()
except OSError as error:
    print(error.strerror)
"""
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, timeout=DEADLINE
    )
    assert done.stdout == "ps does not answer\n"


#: Nothing that is to be killed is reached, as in a system call that does not return. argv: "void"
#: for a child that never was a command.
UNREACHABLE = """
import os, sys, time
from runctl.supervisor.processes import signalling
from runctl.supervisor.processes.proctable import read_row
from runctl.supervisor.processes.trees import Forest, Tree
signalling.kill_processes = signalling.kill_children = lambda *_: None
pid = os.fork()
if pid == 0:
    os.setsid()
    time.sleep(600)
forest = Forest()
forest.add(Tree(1, pid, read_row(pid).start, b"RUNCTL_RUN=x"))
forest.trees[1].void = sys.argv[1] == "void"
print(pid, flush=True)
signalling.kill_all(forest, lambda held: None)
"""


@linux_only
@pytest.mark.parametrize("kind", ["void", "command"])
def test_whom_kill_does_not_reach_is_left_to_the_kernel(kind: str) -> None:
    """If it never was a command; a command is waited for."""
    with subprocess.Popen(
        [sys.executable, "-c", UNREACHABLE, kind], stdout=subprocess.PIPE, text=True
    ) as ending:
        assert ending.stdout is not None
        pid = int(ending.stdout.readline())
        try:
            if kind == "command":
                with pytest.raises(subprocess.TimeoutExpired):
                    ending.wait(2 * STUCK)
                os.kill(pid, signal.SIGKILL)
            assert ending.wait(DEADLINE) == 0
            assert alive(pid) == (kind == "void")
        finally:
            ending.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


#: A keeper whose daemon went away while three commands had just begun.
DESERTED = """
import os, socket
from runctl.supervisor.processes import keeper_server
from runctl.supervisor.processes.trees import Tree
ours, theirs = socket.socketpair()
keeper = keeper_server.Keeper(theirs, "/")
ours.close()
for number in range(3):
    tree = Tree(number, 2**22 + number, 1, b"RUNCTL_RUN=x")
    tree.report, end = os.pipe()
    os.close(end)
    os.set_blocking(tree.report, False)
    keeper.forest.add(tree)
    keeper.selector.register(tree.report, 1, tree)
keeper_server.kill_all = lambda forest, _: print([x.report for x in forest.trees.values()])
keeper.run()
"""


@linux_only
def test_who_became_a_command_is_known_when_all_is_killed() -> None:
    """Only what never did is left to the kernel; nobody takes the answer any more."""
    said = subprocess.run(
        [sys.executable, "-c", DESERTED], stdout=subprocess.PIPE, timeout=DEADLINE
    )
    assert said.stdout == b"[-1, -1, -1]\n"


async def test_the_end_of_a_daemon_is_no_failure_of_its_runs(tmp_path: Path) -> None:
    """Whoever still asks the keeper then learns that it is gone: the run is left to its replay."""
    async with open_keeper(tmp_path, wait=DEADLINE) as keeper:
        process = await spawn(keeper, "sleep", "600")
        assert not keeper.gone
    assert not keeper.dead.is_set(), "it was let go of"
    with pytest.raises(KeeperLost):
        await process.end(0)
    assert keeper.gone
    live = Live(RunSpec("r", "t", "shell"), 1)
    nothing: Any = None
    assert Work(nothing, nothing, keeper, nothing, nothing, nothing, nothing).is_ending(live)
