"""What a peer is: it is started, measured and ended, and says what it cannot do."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

from ..processes import Usage, usage
from .install import Absent, Installed
from .jobs import PATIENCE, WARM, Watch

#: Every process of a peer carries it in its environment, those it starts included.
MARK = "RUNCTL_BENCH_PEER"


class Unable(Exception):
    """The peer has nothing that does this; the text says what it lacks."""


class Peer(ABC):
    """Use it as a context manager. All times are in milliseconds.

    Its methods block: from asyncio, call them with ``asyncio.to_thread``.
    """

    name: ClassVar[str]
    #: What of a started command outlives the death of the peer, or of the machine.
    durable: ClassVar[str]
    #: How each figure is taken: the name of the method -> a line.
    how: ClassVar[dict[str, str]]

    def __init__(self, installed: Installed) -> None:
        self.installed = installed
        self.version = installed.version

    def __enter__(self) -> Self:
        # A short name: a path of a Unix socket has 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="rb-"))
        self.gates = 0
        self.daemons: list[subprocess.Popen[bytes]] = []
        for name in ("home", "tmp"):
            (self.folder / name).mkdir()
        home = str(self.folder / "home")
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "SHELL": "/bin/sh",
            "HOME": home, "TMPDIR": str(self.folder / "tmp"), "NO_PROXY": "127.0.0.1",
            "XDG_CONFIG_HOME": home, "XDG_DATA_HOME": home, "XDG_STATE_HOME": home,
            "XDG_CACHE_HOME": home, "XDG_RUNTIME_DIR": home, MARK: str(self.folder),
        }  # fmt: skip
        try:
            self.start()
        except Absent:
            self._end()
            raise
        except Exception as error:
            self._end()
            raise Absent(f"it does not start: {type(error).__name__}: {error}") from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    def _end(self) -> None:
        """Whatever of it is still alive is killed: forks of the dying ones as well."""
        end = time.monotonic() + PATIENCE
        while (pids := self.processes()) and time.monotonic() < end:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for daemon in self.daemons:
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[int]:
        """Everything alive that was started in this peer's environment."""
        mark = os.fsencode(f"{MARK}={self.folder}")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    @staticmethod
    @abstractmethod
    def install() -> Installed:
        """``Absent`` when that cannot be done here."""

    @abstractmethod
    def start(self) -> None:
        """Its daemon, if it has one, is ready."""

    @abstractmethod
    def first_output(self, count: int) -> list[float]:
        """From a client's request to start a trivial job to its output, where it is read."""

    @abstractmethod
    def watch_latency(self, lines: int, interval: float) -> list[float]:
        """From a job's write, each ``interval`` seconds, to the peer's own watcher."""

    @abstractmethod
    def replay(self, lines: int = 20_000, count: int = 7) -> list[float]:
        """The process that prints the output of a finished job, ``count`` times."""

    @abstractmethod
    def listing(self, count: int, jobs: int = 10) -> list[float]:
        """The process that shows the state of ``jobs`` finished jobs, ``count`` times."""

    def idle(self, seconds: float) -> Usage:
        """What its daemons use while nothing runs."""
        time.sleep(1)  # what has just been started comes to rest
        if not (pids := self.processes()):
            raise Unable("it has no daemon")
        return usage(pids, seconds)

    # What the peers are made of.

    def spawn(self, argv: list[str], log: str = "daemon.log") -> subprocess.Popen[bytes]:
        """A daemon in the foreground, what it says in a file."""
        with (self.folder / log).open("wb") as file:
            process = subprocess.Popen(
                argv, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.daemons.append(process)
        return process

    def run(self, argv: list[str], codes: tuple[int, ...] = (0,)) -> bytes:
        """A client's output. ``RuntimeError`` when it ends otherwise than with ``codes``."""
        # A file, no pipe: the jobs of some inherit it, and keep it open.
        with tempfile.TemporaryFile(dir=self.folder) as out:
            process = subprocess.Popen(
                argv, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
            wait_end(process)
            out.seek(0)
            said = out.read()
        if process.returncode not in codes:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{' '.join(argv[:3])} ended with {process.returncode}: {last}")
        return said

    def time_processes(
        self,
        count: int,
        argv: list[str],
        holds: Callable[[bytes], bool],
        codes: tuple[int, ...] = (0,),
    ) -> list[float]:
        """Each from spawn to exit; the output of each must be what is expected."""
        samples = []
        for n in range(-1, count):  # the first one warms the files up
            began = time.perf_counter()
            said = self.run(argv, codes)
            took = (time.perf_counter() - began) * 1000
            if not holds(said):
                raise RuntimeError(f"{' '.join(argv[:3])} did not print what it should")
            if n >= 0:
                samples.append(took)
        return samples

    def gate(self) -> Path:
        """A new name; a writer waits until the file exists."""
        self.gates += 1
        return self.folder / f"gate-{self.gates}"

    def watched(self, argv: list[str], gate: Path, lines: int) -> list[float]:
        """The watcher as a process: how late each line of the writer is."""
        try:
            with self.watcher(argv) as watch:
                watch.wait_line()
                time.sleep(0.5)  # it may print what there was before it begins to follow
                gate.touch()
                samples = [(at - int(line)) / 1e6 for line, at in watch.lines(lines + WARM)]
        finally:
            gate.touch()  # the writer ends in any case
        return samples[WARM:]

    @contextmanager
    def client(self, argv: list[str]) -> Iterator[Callable[[str], None]]:
        """A client that stays, has said "ready", and does a request for each line it is given."""
        with (self.folder / "client.log").open("wb") as log:
            process = subprocess.Popen(
                argv, env=self.environment, cwd=self.folder, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        pipe = process.stdin

        def request(text: str) -> None:
            pipe.write(text.encode() + b"\n")
            pipe.flush()

        try:
            if process.stdout.readline() != b"ready\n":
                said = (self.folder / "client.log").read_text(errors="replace").strip()
                raise RuntimeError(f"the client ended early: {said[-200:]}")
            yield request
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    @contextmanager
    def watcher(self, argv: list[str]) -> Iterator[Watch]:
        process = subprocess.Popen(
            argv, env=self.environment | {"PYTHONUNBUFFERED": "1"}, cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield Watch(process)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def wait_end(process: subprocess.Popen[bytes]) -> None:
    """Reap it the moment it ends: ``Popen.wait`` with a time-out looks every 50 ms only."""
    fd = os.pidfd_open(process.pid)
    try:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        if not ended.poll(PATIENCE * 1000):
            process.kill()
    finally:
        os.close(fd)
        process.wait()
