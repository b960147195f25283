"""Many watchers of one run: how late they see a write, and what each of them costs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .crowd import PLAIN_SUBJECT
from .harness import PATIENCE, Daemon, running, watching, wired
from .processes import process_tree, rss_mib
from .report import Table

COUNTS = 1, 100, 1000
#: Processes that the watchers are spread over.
CROWDS = 2
LINES, INTERVAL = 100, 0.1

WRITER = f"""
import os, time
while not os.path.exists({{gate!r}}):
    time.sleep(0.02)
for n in range({LINES}):
    os.write(1, b"%d\\n" % time.time_ns())
    time.sleep({INTERVAL})
"""


async def bench_watchers() -> list[Table]:
    """A line each 100 ms, to 1, 100 and 1,000 watchers, and to as many plain subscribers."""
    table = Table("watchers", "A process writes a line each 100 ms → 1 to 1,000 watchers have it")
    table.aim = "median at most 1.5 × nats-py; ahead of every peer"
    for count in COUNTS:
        async with running() as daemon:
            gate = daemon.folder / "gate"
            async with wired(daemon) as link:
                argv = [sys.executable, "-c", WRITER.format(gate=str(gate))]
                subject = await link.submit("watchers", argv)
            alone = await rss(daemon)
            async with crowd(daemon, subject, count) as members:
                crowded = await rss(daemon)
                gate.touch()
                samples = await latencies(members)
            if len(samples) != count * LINES:
                raise RuntimeError(f"{count * LINES} lines were to be seen, {len(samples)} were")
            async with crowd(daemon, "plain", count) as members:
                baseline = await plain(daemon, members)
        noun = "watcher" if count == 1 else "watchers"
        floor = table.add(f"nats-py: publish → {count:,} {noun}", baseline, "ms", "floor")
        ours = table.add(f"runctl: write → {count:,} {noun}", samples, "ms", against=floor)
        table.judge(f"{count:,} {noun}", ours.median <= 1.5 * floor.median)
    table.note(
        "nats-py's publisher has its line at once and its server stores nothing. runctl reads it"
        " from a pipe (0.2 ms), names the sequence before it, the server stores it, and a consumer"
        " delivers it; every watcher here is a client of Python's, 50 to 500 of them in a process"
    )
    table.note("the peers have one watcher each, of a plain file")
    memory = Table("watcher-memory", f"Memory for each of {COUNTS[-1]:,} watchers")
    for name in ("nats-server", "daemon"):
        size = (crowded[name] - alone[name]) * 1024 / count
        memory.add(f"{name}, RSS", [size], "kB", "count")
    await whole_process(memory)
    return [table, memory]


async def whole_process(table: Table) -> None:
    async with running() as daemon:
        async with wired(daemon) as link:
            await link.submit("watched", ["/bin/sh", "-c", "echo x; exec sleep 600"])
        bare = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "import click, nats, time; time.sleep(600)"
        )
        try:
            async with watching(daemon, "watched") as watcher:
                await watcher.wait_event(lambda event: event["type"] == "chunk")
                size, base = rss_mib(watcher.pid), rss_mib(bare.pid)
        finally:
            bare.kill()
            await bare.wait()
    floor = table.add("python, click and nats imported, RSS", [base], "MB", "floor")
    table.add("runctl attach, the whole process, RSS", [size], "MB", against=floor)


async def rss(daemon: Daemon) -> dict[str, float]:
    """MiB of the daemon and of the nats-server, once they have come to rest."""
    await asyncio.sleep(1)
    return {name: rss_mib(pid) for pid, name in process_tree(daemon).items()}


@asynccontextmanager
async def crowd(daemon: Daemon, subject: str, count: int) -> AsyncIterator[list[Member]]:
    """``count`` watchers of ``subject``, or "plain" subscribers, all of them there."""
    shares = [share for i in range(CROWDS) if (share := (count + i) // CROWDS)]
    members = [await member(daemon, subject, share) for share in shares]
    try:
        for one in members:
            await one.line()
        yield members
    finally:
        for one in members:
            await one.end()


class Member:
    """A process of ``bench.crowd``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> bytes:
        assert self._process.stdout is not None
        async with asyncio.timeout(2 * PATIENCE):
            if not (line := await self._process.stdout.readline()):
                raise RuntimeError("a crowd of watchers ended early")
        return line

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.communicate()


async def member(daemon: Daemon, subject: str, count: int) -> Member:
    argv = [sys.executable, "-m", "bench.crowd", str(daemon.config)]
    return Member(
        await asyncio.create_subprocess_exec(
            *argv, subject, str(count), str(LINES),
            stdout=asyncio.subprocess.PIPE, limit=64 * 1024**2,
        )
    )  # fmt: skip


async def latencies(members: list[Member]) -> list[float]:
    """Milliseconds, of each line at each watcher."""
    found: list[float] = []
    for lines in await asyncio.gather(*(one.line() for one in members)):
        found += json.loads(lines)
    return found


async def plain(daemon: Daemon, members: list[Member]) -> list[float]:
    """nats-py alone, at the same rate over the same server."""
    client = await daemon.connect()
    try:
        for _ in range(LINES):
            await client.publish(PLAIN_SUBJECT, b"%d\n" % time.time_ns())
            await client.flush()
            await asyncio.sleep(INTERVAL)
        return await latencies(members)
    finally:
        await client.close()
