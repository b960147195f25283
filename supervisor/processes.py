"""A run's process tree, from the daemon's side: spawn, wait, end.

All children belong to the keeper (``keeper.py``), which outlives a killed daemon just
long enough to end them. ``keeper.lock`` is held while any of them may be alive.
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from .errors import RunctlError, RunFailed, Unavailable

log = logging.getLogger("runctld.processes")


class KeeperLost(RunctlError):
    """The keeper was killed; what it kept is being killed with it."""


class Process:
    """The root of a tree. ``pid``: its process id, which is also its session."""

    def __init__(self, keeper: Keeper, pid: int) -> None:
        self._keeper = keeper
        self.pid = pid
        self._status: int | None = None
        self._exited = trio.Event()

    async def wait(self) -> int:
        """Exit code of the root, or minus the signal that ended it. Raises KeeperLost."""
        await self._exited.wait()
        if self._status is None:
            raise KeeperLost("the process keeper was killed")
        return self._status

    async def end(self, grace: float) -> None:
        """TERM the whole tree, KILL it after ``grace`` seconds; returns when it is
        verified empty. A later call with a shorter grace hastens it. Raises KeeperLost."""
        await self._keeper._request({"op": "end", "pid": self.pid, "grace": grace})


class Keeper:
    def __init__(self, sock: trio.socket.SocketType, popen: subprocess.Popen[bytes]) -> None:
        self._sock = sock
        self._popen = popen
        self._lock = trio.Lock()
        self._next = 0
        self._replies: dict[int, dict[str, Any] | None] = {}
        self._waiting: dict[int, trio.Event] = {}
        self._processes: dict[int, Process] = {}
        self.dead = trio.Event()

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        mark: str,
        env: Mapping[str, str],
        cwd: str | None,
        stdin: int,
        stdout: int,
        stderr: int,
    ) -> Process:
        """Start ``argv`` in a session of its own; ``mark`` becomes RUNCTL_RUN.

        Raises: RunFailed when it cannot be executed, KeeperLost."""
        message = {"op": "spawn", "argv": list(argv), "mark": mark, "env": dict(env), "cwd": cwd}
        reply = await self._request(message, (stdin, stdout, stderr))
        if "pid" not in reply:
            raise _failure(argv[0], cwd, reply["step"], reply["errno"])
        process: Process = reply["process"]
        return process

    async def _request(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        self._next += 1
        number = self._next
        data = json.dumps({**message, "id": number}).encode()
        event = self._waiting[number] = trio.Event()
        try:
            with trio.CancelScope(shield=True):  # a half-written message would end the keeper
                async with self._lock:
                    await self._send(struct.pack(">I", len(data)) + data, fds)
            await event.wait()
            reply = self._replies.get(number)
        except OSError:
            reply = None
        finally:
            self._waiting.pop(number, None)
            self._replies.pop(number, None)
        if reply is None:
            raise KeeperLost("the process keeper was killed")
        return reply

    async def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        if self.dead.is_set():
            raise OSError(errno.EPIPE, "keeper is gone")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = await self._sock.sendmsg([data], rights)
        while sent < len(data):
            sent += await self._sock.send(data[sent:])

    async def _read(self) -> None:
        buffer = b""
        while True:
            try:
                data = await self._sock.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            buffer += data
            while len(buffer) >= 4:
                (size,) = struct.unpack(">I", buffer[:4])
                if len(buffer) < 4 + size:
                    break
                self._handle(json.loads(buffer[4 : 4 + size]))
                buffer = buffer[4 + size :]
        self.dead.set()
        for event in self._waiting.values():
            event.set()
        for process in self._processes.values():
            process._exited.set()

    def _handle(self, message: dict[str, Any]) -> None:
        if "exit" in message:
            process = self._processes.pop(message["exit"], None)
            if process is not None:
                process._status = message["status"]
                process._exited.set()
            return
        if "pid" in message:  # known before its exit can be reported
            message["process"] = self._processes[message["pid"]] = Process(self, message["pid"])
        number = message["id"]
        if number in self._waiting:
            self._replies[number] = message
            self._waiting[number].set()


def _failure(name: str, cwd: str | None, step: str, number: int) -> RunFailed:
    if step == "chdir":
        return RunFailed(f"directory {cwd} cannot be entered: {os.strerror(number)}", 126)
    if number == errno.ENOENT:
        return RunFailed(f"command not found: {name!r}; check its spelling and PATH", 127)
    if number in (errno.EACCES, errno.ENOEXEC, errno.EPERM):
        return RunFailed(f"{name!r} is not executable; chmod +x it, or give it a #! line", 126)
    if number == errno.E2BIG:
        return RunFailed(
            f"the arguments of {name!r} are too long for this system; pass the prompt on stdin"
            " (an argv without {prompt})",
            126,
        )
    return RunFailed(f"{name!r} cannot be started: {os.strerror(number) if number else step}", 126)


@asynccontextmanager
async def open_keeper(state_dir: Path, wait: float) -> AsyncIterator[Keeper]:
    """Start the keeper once nothing of an earlier one is alive; kill all at the end.

    Raises: Unavailable, when the earlier one is not gone after ``wait`` seconds."""
    state = os.path.realpath(state_dir)
    lock = os.open(state_dir / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    ours, theirs = socket.socketpair()
    try:
        await _take(lock, wait)
        await trio.to_thread.run_sync(_sweep, state, wait)
        popen = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py"))),
                *(str(theirs.fileno()), str(lock), state),
            ],
            pass_fds=(theirs.fileno(), lock),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(lock)
    ours.setblocking(False)
    keeper = Keeper(trio.socket.from_stdlib_socket(ours), popen)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper._read)
            try:
                yield keeper
            finally:
                nursery.cancel_scope.cancel()
    finally:
        keeper._sock.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(popen.wait)


async def _take(lock: int, wait: float) -> None:
    with trio.move_on_after(wait):
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                await trio.sleep(0.005)  # flock has no event that can be cancelled
    raise Unavailable(f"processes of an earlier daemon are still alive after {wait:g} s")


def _sweep(state: str, wait: float) -> None:
    """Kill what a keeper that was itself killed left behind, found by its mark."""
    if sys.platform != "linux":
        return
    mark = b"RUNCTL_STATE=" + os.fsencode(state)
    for _ in range(int(wait * 100)):
        left = [pid for pid in _mine() if _has(pid, mark)]
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError as error:
                log.debug("sweep %d: %s", pid, error)
        trio.from_thread.run(trio.sleep, 0.01)
    raise Unavailable(f"processes {left} of an earlier daemon do not die")


def _mine() -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if pid != os.getpid()]


def _has(pid: int, mark: bytes) -> bool:
    try:
        if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in b"ZX":
            return False
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
