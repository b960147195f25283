"""Many threads over three executors: ``python -m bench.scale [THREADS [AT_ONCE]]``.

10,000 threads with one run each are queued, 1,000 run at once (a third on each
executor). They wait at a gate until all are queued, and take 2 s each from then on.
Printed: the time to submit and to finish them, how long a freed place stays
empty, when the last thread began, and the daemons' memory and processor time.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from .machines import Machines

SLEEP = 2.0


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    at_once = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000
    with tempfile.TemporaryDirectory(prefix="runctl-bench-", ignore_cleanup_errors=True) as path:
        asyncio.run(measure(Path(path), threads, at_once))


async def measure(path: Path, threads: int, at_once: int) -> None:
    machines = Machines(path, f"[queue]\nmax_running = {-(-at_once // 3)}\n")
    try:
        await machines.start()
        idle = [x.peak_memory() for x in machines.executors]
        began = time.monotonic()
        door = path / "door"  # opening it for reading waits for who opens it for writing
        os.mkfifo(door)
        argv = ["/bin/sh", "-c", ': < "$0"; exec sleep "$1"', str(door), f"{SLEEP:g}"]
        gate = asyncio.Semaphore(32)

        async def submit(n: int) -> None:
            async with gate:
                await machines.submit(f"t{n}", argv)

        await asyncio.gather(*(submit(n) for n in range(threads)))
        print(f"submitted {threads} threads in {time.monotonic() - began:.1f} s", flush=True)
        opened, handle = time.monotonic(), os.open(door, os.O_RDWR)
        most = 0
        while True:
            states = await count(machines)
            most = max(most, states.get("PENDING", 0))
            if not set(states) - {"SUCCESS", "ERROR", "CANCELLED"}:
                break
            await asyncio.sleep(1)
        os.close(handle)
        print(f"all ended {time.monotonic() - opened:.1f} s after the gate opened: {states}")
        await report(machines, idle, most)
    finally:
        await machines.close()


async def count(machines: Machines) -> dict[str, int]:
    query = "SELECT status, count(*) AS n FROM dbos.workflow_status GROUP BY status"
    return {row["status"]: row["n"] for row in await ask(machines, query)}


async def ask(machines: Machines, query: str) -> list[dict[str, int]]:
    return await asyncio.to_thread(machines.postgres.sql, query, url=machines.url)


async def report(machines: Machines, idle: list[float], most: int) -> None:
    rows = await ask(
        machines,
        "SELECT executor_id AS executor, created_at AS made, started_at_epoch_ms AS started,"
        " completed_at AS ended FROM dbos.workflow_status ORDER BY started_at_epoch_ms",
    )
    first = min(row["made"] for row in rows)
    waits = [(row["started"] - row["made"]) / 1000 for row in rows]
    print(f"running at once, at most: {most}")
    print(f"the last thread began after {(rows[-1]['started'] - first) / 1000:.1f} s")
    print(f"queued: p50 {statistics.median(waits):.1f} s, max {max(waits):.1f} s")
    for executor, before in zip(machines.executors, idle, strict=True):
        own = [row for row in rows if row["executor"] == executor.name]
        print(
            f"{executor.name}: {len(own)} runs, peak memory {executor.peak_memory():.0f} MiB"
            f" (idle {before:.0f}), processor {executor.cpu():.1f} s"
        )
        empty = idle_places(own, most // 3)
        if empty:
            print(f"   a freed place was taken again after p50 {statistics.median(empty):.2f} s")


def idle_places(rows: list[dict[str, int]], places: int) -> list[float]:
    """How long each place was empty while more was queued: the nth start after the
    executor was full follows the nth end."""
    starts = sorted(row["started"] for row in rows)[places:]
    ends = sorted(row["ended"] for row in rows)
    return [max(0, s - e) / 1000 for s, e in zip(starts, ends, strict=False)]


if __name__ == "__main__":
    main()
