"""What a house is made of: executors that are restarted as a process supervisor would,
and what the machine permits."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from proc import read_proc

from .history import History

#: Seconds until a daemon that ended is started again.
PAUSE = 0.2
#: Between two looks at a daemon's log, seconds.
LOOK = 0.05
#: What a daemon says when it is there, when it becomes the next one, and when it ends in order.
READY, AGAIN, STOPPING = b"ready: ", b": starting again", b": stopping"


@functools.cache
def clock_library() -> str:
    """Path of a libfaketime that works here, else ""."""
    spec = importlib.util.find_spec("libfaketime")
    places = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "vendor/libfaketime/src/libfaketime.so.1")
    for place in places:
        seen = subprocess.run(
            [sys.executable, "-S", "-c", "import time; print(time.time() < 1)"],
            env={"LD_PRELOAD": str(place), "FAKETIME": "1969-01-01 00:00:00"},
            capture_output=True,
            check=False,
        )
        if seen.stdout.strip() == b"True":
            return str(place)
    return ""


def skewed(seconds: int) -> dict[str, str]:
    """Environment of a process whose wall clock, and its children's, is wrong; the
    monotonic one stays."""
    return {
        "LD_PRELOAD": clock_library(),
        "FAKETIME": f"{seconds:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


class SmallDisk:
    """A file system of a few MB at ``path``. Raises OSError where that is not permitted."""

    SIZE = "96m"

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.SIZE},mode=0700", "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise OSError("there is no mount") from None
        if done.returncode:
            path.rmdir()
            raise OSError(done.stderr.strip())

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self) -> None:
        """Leave no byte free."""
        fd = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with contextlib.suppress(OSError):
            for block in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(fd, b"\0" * block)
        os.close(fd)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=False)


def descendants(pid: int, name: str = "", words: bytes = b"") -> list[int]:
    """Those of ``pid`` whose executable is called ``name`` and whose command line holds
    ``words``, parents first."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop(0)
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in map(int, tasks.read_text().split()):
                    todo.append(child)
                    called = Path(f"/proc/{child}/comm").read_text().strip()
                    line = Path(f"/proc/{child}/cmdline").read_bytes()
                    if name in ("", called) and words in line:
                        found.append(child)
    return found


def strike(pid: int | None, number: int) -> bool:
    """Whether there was such a process."""
    if pid is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def find_processes(state: Path) -> dict[int, str]:
    """pid -> what is said of it, of the keeper of that state directory and all that it began."""
    real = os.path.realpath(state)
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            environment = read_proc(int(entry.name), "environ").split(b"\0")
            if f"RUNCTL_KEEPER={real}".encode() in environment:
                found[int(entry.name)] = "keeper"
            elif f"RUNCTL_STATE={real}".encode() in environment:
                words = read_proc(int(entry.name), "cmdline").split(b"\0")
                found[int(entry.name)] = b" ".join(words).decode(errors="replace")
    return found


def has_connection(pid: int) -> bool:
    """Whether it holds one of TCP."""
    sockets = set()
    with contextlib.suppress(OSError):
        for fd in os.scandir(f"/proc/{pid}/fd"):
            sockets.add(os.readlink(fd.path))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(f"socket:[{row[9]}]" in sockets for row in rows)


class Executor:
    """A daemon, started again whenever it ends. ``state``: its state directory, whose name is the
    executor's. ``shared``: its database is a server. ``exits``: the codes that daemons ended
    with."""

    def __init__(self, config: Path, log: Path, state: Path, *, shared: bool) -> None:
        self.shared = shared
        self.config, self.log, self.state = config, log, state
        self.name = state.name
        self.history = History(self.name)
        self.exits: list[int] = []
        self.skew = 0
        #: Whether the process that runs now has said that it is.
        self.ready = False
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._released = False
        self._stopping = False  # in order, from when it was ready on
        #: How much of the log was read, and the last line, which was not whole.
        self._offset, self._line = 0, b""
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._holds = 0
        #: Set when the process that runs now has ended; then another one is made.
        self.ended = asyncio.Event()
        #: Set when a process has been made; anew for each.
        self.begun = asyncio.Event()

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._released:
            env = {k: v for k, v in os.environ.items() if not k.startswith("FAKETIME")}
            if self.skew:
                env |= skewed(self.skew)
            self._offset = self.log.stat().st_size if self.log.exists() else 0
            self._line = b""
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "runctl.supervisor.main", "-c", str(self.config)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                    cwd=self.config.parent,
                )
            self.begun.set()
            watching = asyncio.create_task(self._watch_log())
            try:
                code = await self._process.wait()
            finally:
                watching.cancel()
            self._note_end(code)
            self.begun.clear()
            self.ended.set()
            self.ended = asyncio.Event()
            await asyncio.sleep(PAUSE)
            await self._may_start.wait()

    async def _watch_log(self) -> None:
        """Its log is a file, as a service's is."""
        while True:
            self._read_log()
            await asyncio.sleep(LOOK)

    def _read_log(self) -> None:
        with self.log.open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        self._offset += len(data)
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if READY in line and not self.ready:
                self.ready = True
                self.history.note_ready(time.monotonic())
            elif AGAIN in line:
                self.ready = False
                self.history.note_again(time.monotonic())
            elif line.endswith(STOPPING) and self.ready:
                self._stopping = True

    def _note_end(self, code: int) -> None:
        now = time.monotonic()
        self._read_log()
        self.exits.append(code)
        self.ready = False
        self.history.note_end(now, code)
        if self._stopping and code == 0:
            self.history.silence(now, now, "it was stopped in order")
            if left := find_processes(self.state):
                self.history.wrong.append(f"alive after an orderly stop: {left}")
        self._stopping = False

    async def wait_ready(self) -> None:
        while not self.ready:
            if self.exits[-1:] == [78]:
                raise RuntimeError(f"{self.config} is not usable; see {self.log}")
            await asyncio.sleep(0.03)

    def signal(self, number: int) -> bool:
        if number == signal.SIGTERM and self.pid is not None:
            self.history.end_runs(time.monotonic(), "told to stop")
        return strike(self.pid, number)

    def begin_history(self) -> None:
        """Of a round. When it begins the daemon is ready."""
        self.history = History(self.name)
        self.history.note_ready(time.monotonic())

    def kill(self) -> bool:
        """Whether there was one. Who dies while it takes its lease from the keeper takes what
        runs along."""
        pid = self.pid
        if self.shared and pid is not None and not self.ready:
            strike(pid, signal.SIGSTOP)
            keeper = self.keeper()
            if keeper is not None and not has_connection(keeper):
                self.history.end_runs(time.monotonic(), "it was killed while it took its lease")
        return strike(pid, signal.SIGKILL)

    def hold(self) -> None:
        """No other daemon is started when this one ends, until each who holds has ``let``."""
        self._holds += 1
        self._may_start.clear()

    def let(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._may_start.set()

    def keeper(self) -> int | None:
        """It may have outlived the daemon that began it."""
        found = find_processes(self.state)
        return next((pid for pid, what in found.items() if what == "keeper"), None)

    async def wait_keeper_gone(self, until: float) -> None:
        """``until``: on the monotonic clock. Raises TimeoutError."""
        async with asyncio.timeout(until - time.monotonic()):
            while True:
                if self.keeper() is None:
                    return
                await asyncio.sleep(LOOK)

    def broker(self) -> int | None:
        keeper = self.keeper()
        found = descendants(keeper, name="nats-server") if keeper else []
        return found[0] if found else None

    def starve(self, spare: int) -> int | None:
        """Leave it ``spare`` file descriptors; the pid that ``feed`` takes."""
        pid = self.pid
        if pid is None:
            return None
        with contextlib.suppress(OSError):
            used = len(os.listdir(f"/proc/{pid}/fd"))
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + spare, hard))
            return pid
        return None

    @staticmethod
    def feed(pid: int) -> None:
        with contextlib.suppress(OSError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(hard, 65536), hard))

    async def close(self) -> None:
        self._released = True
        self._may_start.set()
        if self._task is None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(20):
                await asyncio.shield(self._task)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self._task
