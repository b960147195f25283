"""How large the state gets over many runs, housekeeping on: ``python -m bench history``,
with RUNCTL_BENCH_RUNS runs (100,000: about 20 minutes)."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from .harness import Daemon, Wire, running, wired
from .processes import cpu_seconds, process_tree, pss_mib
from .report import Table

RUNS = int(os.environ.get("RUNCTL_BENCH_RUNS", "100000"))
THREADS = 500
#: Finished runs that are kept, and of how many of each thread the output.
KEPT, OUTPUTS = 10_000, 20
STEPS = 10
AT_ONCE = 64
SETTINGS = f"max_running = 16\n[history]\nmax_runs = {KEPT}\n[stream]\nmax_runs = {OUTPUTS}\n"


async def bench_history() -> list[Table]:
    table = Table("history", f"{RUNS:,} runs of /bin/true on {THREADS} threads, {KEPT:,} kept")
    table.aim = "bounded"
    async with running(SETTINGS) as daemon, wired(daemon, listen=False) as link:
        pid = daemon.process.pid
        for step in range(1, STEPS + 1):
            began, used = time.monotonic(), cpu_seconds(pid)
            count = RUNS // STEPS
            await _runs(link, (step - 1) * count, count)
            wall = (time.monotonic() - began) / count * 1000
            cpu = (cpu_seconds(pid) - used) / count * 1000
            stored, messages = await link.stored()
            done = f"{step * count:,} runs"
            table.add(f"{done}: time per run", [wall], "ms")
            table.add(f"{done}: processor time per run", [cpu], "ms", "count")
            table.add(f"{done}: database", [_size(daemon.state, "runctl.sqlite*")], "MiB", "count")
            table.add(
                f"{done}: output stream, {messages:,} records", [stored / 1024**2], "MiB", "count"
            )
            memory = _memory(daemon)
            table.add(f"{done}: memory of all processes", [memory], "MiB", "count")
            size = _size(daemon.state, "runctl.sqlite*")
            print(
                f"  {done}: {wall:.1f} ms each, database {size:.1f} MiB, stream"
                f" {stored / 1024**2:.1f} MiB, memory {memory:.0f} MiB",
                flush=True,
            )
    return [table]


async def _runs(link: Wire, first: int, count: int) -> None:
    """Submit them, never much more than what is done, and wait until all are."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(n: int) -> None:
        async with gate:
            await link.submit(f"history-{n % THREADS}", ["/bin/true"])

    for start in range(first, first + count, 1000):
        async with asyncio.TaskGroup() as tasks:
            for n in range(start, min(start + 1000, first + count)):
                tasks.create_task(one(n))
        await link.idle(below=2000)
    await link.idle(below=1)


def _size(state: Path, pattern: str) -> float:
    return sum(file.stat().st_size for file in state.glob(pattern)) / 1024**2


def _memory(daemon: Daemon) -> float:
    found = 0.0
    for pid in process_tree(daemon):
        try:
            found += pss_mib(pid)
        except (OSError, RuntimeError):  # a run's, which has just ended
            continue
    return found
