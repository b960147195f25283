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
from pathlib import Path

#: Seconds until a daemon that ended is started again.
PAUSE = 0.2


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


class Executor:
    """A daemon, started again whenever it ends. ``exits``: the codes that it ended with."""

    def __init__(self, config: Path, log: Path) -> None:
        self.config, self.log = config, log
        self.exits: list[int] = []
        self.skew = 0
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._released = False
        self._offset = 0
        #: Set when the process that runs now has ended; then another one is made.
        self.ended = asyncio.Event()

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
            with self.log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "runctl.supervisor.main", "-c", str(self.config)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                    cwd=self.config.parent,
                )
            self.exits.append(await self._process.wait())
            self.ended.set()
            self.ended = asyncio.Event()
            await asyncio.sleep(PAUSE)

    @property
    def ready(self) -> bool:
        """Whether the process that runs now has said so."""
        if self.pid is None:
            return False
        with self.log.open("rb") as log:
            log.seek(self._offset)
            return b"ready: " in log.read()

    async def wait_ready(self) -> None:
        while not self.ready:
            if self.exits[-1:] == [78]:
                raise RuntimeError(f"{self.config} is not usable; see {self.log}")
            await asyncio.sleep(0.03)  # its log is a file, as a service's is

    def signal(self, number: int) -> bool:
        return strike(self.pid, number)

    def keeper(self) -> int | None:
        pid = self.pid
        found = descendants(pid, words=b"keeper") if pid else []
        return found[0] if found else None

    def broker(self) -> int | None:
        pid = self.pid
        found = descendants(pid, name="nats-server") if pid else []
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
