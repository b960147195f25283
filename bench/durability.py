"""What it costs that nothing is lost by a power cut, rather than by a kill."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from pathlib import Path

from .harness import Daemon, running, wired
from .output import BLOCKS
from .report import Table
from .runs import first_outputs

COMMITS = 300
SUBMITS = 60
ALWAYS = '[stream]\nsync = "always"\n'


async def bench_durability() -> list[Table]:
    database = Table("sqlite", "SQLite, a commit of one row in WAL mode")
    with tempfile.TemporaryDirectory(prefix="runctl-bench-") as name:
        floor = database.add("write of 4 KiB and fsync", _fsyncs(Path(name)), "ms", "floor")
        for level in ("FULL", "NORMAL"):
            samples = _commits(Path(name) / level, level)
            ours = level == "FULL"
            row = f"synchronous = {level}" + (", as runctl has it" if ours else "")
            database.add(row, samples, "ms", "ours" if ours else "peer", floor)
    database.note(
        "FULL syncs at each commit, NORMAL at checkpoints: a power cut then takes the last"
        " submits and outcomes with it. A run makes three commits, one of them before its submit"
        " is answered"
    )
    stream = Table("sync", 'JetStream, `[stream] sync = "always"` and the default')
    for name, settings in (("default", ""), ("always", ALWAYS)):
        async with running(settings) as daemon:
            submits = await first_outputs(daemon, SUBMITS, ["/bin/echo", "x"])
            rate = await _rate(daemon)
        stream.add(f"{name}: submit → first output", submits, "ms")
        stream.add(f"{name}: blocks of 64 KiB", [rate], "MB/s", "count")
    stream.note(
        "the default leaves syncing to the server, each two minutes: a killed process loses"
        " nothing by it, a power cut may. The database is synced in both cases"
    )
    return [database, stream]


def _fsyncs(folder: Path) -> list[float]:
    samples = []
    with (folder / "file").open("wb", buffering=0) as file:
        for _ in range(COMMITS):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            samples.append((time.perf_counter() - began) * 1000)
    return samples


def _commits(path: Path, level: str) -> list[float]:
    samples = []
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={level}")
        db.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)")
        for n in range(COMMITS):
            began = time.perf_counter()
            db.execute("INSERT INTO t VALUES (?, ?)", (n, "x" * 400))
            samples.append((time.perf_counter() - began) * 1000)
    finally:
        db.close()
    return samples


async def _rate(daemon: Daemon) -> float:
    """MB/s."""
    count = 400
    async with wired(daemon, listen=False) as link:
        began = time.monotonic()
        command = BLOCKS.format(count=count)
        await link.ended(await link.submit("blocks", ["/bin/sh", "-c", command]))
        return count * 65536 / 1e6 / (time.monotonic() - began)
