"""The nats-server is killed: when does an attached watcher say so, and go on?"""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import nats.errors
from runctl.config.load import load
from runctl.protocol import records, subjects

from .harness import PATIENCE, Daemon, dialled, running, watching, wired
from .processes import process_tree
from .report import Table

KILLS = 10

WRITER = """
import os, time
while True:
    os.write(1, b"%d\\n" % time.time_ns())
    time.sleep(0.0005)
"""


async def bench_resume() -> list[Table]:
    said, back, resumed = await watcher_alone()
    table = Table("resume", "SIGKILL of the nats-server")
    floor = table.add("kill → the stream takes a record again", back, "ms", "floor")
    table.add("its ack → that chunk at an attached watcher", resumed, "ms", against=floor)
    table.add("kill → said so on a terminal", said, "ms", against=floor)
    whole = await whole_way()
    table.add("return → first new chunk of a running command", whole, "ms", against=floor)
    return [table]


async def watcher_alone() -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of each kill. We write the run's chunks ourselves, so that how soon the
    daemon writes again is left out."""
    said, back, resumed = [], [], []
    async with running() as daemon:
        async with wired(daemon) as link:
            subject = await link.submit("resume", ["sleep", "600"])
            await asyncio.wait_for(link.records(subject).get(), PATIENCE)  # its reset
        await put(daemon, subject, 1)
        with terminal(daemon, "resume") as screen:
            async with watching(daemon, "resume") as watcher:
                await watcher.wait_event(lambda event: event["type"] == "chunk")
                await asyncio.to_thread(screen.wait, b"chunk 1\r\n")
                for n in range(2, KILLS + 2):
                    killed = kill_server(daemon)
                    returned = await put(daemon, subject, n)
                    seen = await watcher.wait_event(lambda event, n=n: event.get("seq") == n)
                    lost = await asyncio.to_thread(screen.wait, b"connection lost")
                    await asyncio.to_thread(screen.wait, b"chunk %d\r\n" % n)
                    back.append((returned - killed) * 1000)
                    resumed.append((seen - returned) * 1000)
                    said.append((lost - killed) * 1000)
    return said, back, resumed


async def whole_way() -> list[float]:
    """A run that writes all the time: the daemon has to find its stream again as well."""
    samples = []
    async with running() as daemon:
        async with wired(daemon) as link:
            await link.submit("resume", [sys.executable, "-c", WRITER])
        async with watching(daemon, "resume") as watcher:
            await watcher.wait_event(lambda event: event["type"] == "chunk")
            for _ in range(KILLS):
                killed = kill_server(daemon)
                returned = await stream_back(daemon)
                seen = await watcher.wait_event(lambda event, t=killed: newer(event, t))
                samples.append((seen - returned) * 1000)
    return samples


def newer(event: dict[str, object], than: float) -> bool:
    """Whether it is a chunk that was written after ``than`` (Unix seconds)."""
    if event["type"] != "chunk":
        return False
    return any(int(line) > than * 1e9 for line in str(event["data"]).split())


def kill_server(daemon: Daemon) -> float:
    """Unix seconds at which it was killed."""
    (pid,) = (pid for pid, name in process_tree(daemon).items() if name == "nats-server")
    os.kill(pid, signal.SIGKILL)
    return time.time()


async def stream_back(daemon: Daemon, subject: str = "", data: bytes = b"") -> float:
    """Unix seconds at which JetStream answers: that it stored ``data``, or what it has."""
    config = load(daemon.config, client=True)
    async with asyncio.timeout(PATIENCE):
        while True:
            link = await dialled(config)
            try:
                stream = link.nc.jetstream(timeout=1)
                if data:
                    await stream.publish(subject, data)
                else:
                    await stream.stream_info(subjects.STREAM)
                return time.time()
            except (OSError, nats.errors.Error, TimeoutError):
                await asyncio.sleep(0.005)
            finally:
                await link.close()


async def put(daemon: Daemon, subject: str, seq: int) -> float:
    chunk = records.Chunk("stdout", b"chunk %d\n" % seq)
    record = records.encode_record(records.Chunks(1, seq, time.time(), [chunk]))
    return await stream_back(daemon, subject, record)


class Screen:
    """What comes on a pseudo-terminal, with the time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pieces: list[tuple[float, bytes]] = []
        self._came = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                return
            with self._came:
                self._pieces.append((time.time(), data))
                self._came.notify()

    def wait(self, text: bytes) -> float:
        """Unix seconds at which it came; what came up to then is forgotten."""
        end = time.monotonic() + PATIENCE
        seen = b""
        with self._came:
            while text not in seen:
                if not self._came.wait_for(lambda: self._pieces, end - time.monotonic()):
                    raise RuntimeError(f"{text!r} did not come on the terminal")
                at, piece = self._pieces.pop(0)
                seen += piece
            rest = seen.partition(text)[2]
            if rest:
                self._pieces.insert(0, (at, rest))
            return at


@contextmanager
def terminal(daemon: Daemon, thread: str) -> Iterator[Screen]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        daemon.runctl("attach", thread),
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Screen(master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
