"""Does a run cost more the more of them there are?"""

from __future__ import annotations

import asyncio
import time

from .harness import PATIENCE, Daemon, running, wired
from .processes import cpu_seconds
from .report import Table
from .rows import multiply

BACKLOGS = 100, 1000, 10_000
#: Runs that are looked at, of each backlog.
RUNS = 400
PLACES = 16


async def bench_growth() -> list[Table]:
    """Each thread with one queued run: what does it cost to run one of them?"""
    table = Table("growth", f"Threads with a queued run each, {PLACES} places: a run's cost")
    table.aim = "flat per run"
    for count in BACKLOGS:
        wall, cpu = await _backlog(count)
        table.add(f"runctl: {count:,} queued threads, time per run", [wall], "ms")
        table.add(f"runctl: {count:,} queued threads, processor time per run", [cpu], "ms", "count")
    table.judge(
        "10,000 queued: at most 1.5 × the time per run of 100",
        table.rows[-2].median <= 1.5 * table.rows[0].median,
    )
    table.note(
        "the threads are copies of a real run's rows. 100,000 finished runs are what"
        " `[history] max_runs` keeps by default; about 1 kB of database each"
    )
    return [table]


async def _backlog(count: int) -> tuple[float, float]:
    """(ms from one end to the next, ms of the daemon's processor time) per run"""
    async with running() as daemon:
        async with wired(daemon) as link:
            subject = await link.submit("seed", ["/bin/true"])
            await link.chunks(subject)
        daemon.configure(f"max_running = {PLACES}\n")
        daemon.stop()
        multiply(daemon, subject.rpartition(".")[2], count, queued=True)
        daemon.start()
        await daemon.wait_ready()
        first = min(count // 4, 50)
        await _ended(daemon, first)
        began, used = time.monotonic(), cpu_seconds(daemon.process.pid)
        begun = await _ended(daemon, first)
        ended = await _ended(daemon, min(count, begun + RUNS))
        runs = ended - begun
        wall = (time.monotonic() - began) / runs
        cpu = (cpu_seconds(daemon.process.pid) - used) / runs
        return wall * 1000, cpu * 1000


async def _ended(daemon: Daemon, count: int) -> int:
    """Wait until so many of the copies have ended; how many have."""
    import sqlite3

    deadline = time.monotonic() + 4 * PATIENCE
    db = sqlite3.connect(f"file:{daemon.state / 'runctl.sqlite'}?mode=ro", uri=True, timeout=30)
    query = "SELECT count(*) FROM workflow_status WHERE status = 'SUCCESS'"
    try:
        while True:
            found = int(db.execute(query).fetchone()[0])
            if found >= count:
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {found} of {count} runs have ended")
            await asyncio.sleep(0.05)
    finally:
        db.close()
