"""Many submits: one batch over one connection, beside a process for each."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time

from .harness import Daemon, running, time_processes
from .report import Table

LINES = 1000
PROCESSES = 20


async def bench_batch() -> list[Table]:
    """The runs wait behind one that sleeps: what is measured is the submit alone."""
    async with running() as daemon:
        return await asyncio.to_thread(_measure, daemon)


def _measure(daemon: Daemon) -> list[Table]:
    submit = daemon.runctl("submit", "batch", "--", "sleep", "600")
    alone = time_processes(PROCESSES, submit)
    line = json.dumps({"thread": "batch", "argv": ["sleep", "600"]}) + "\n"
    began = time.perf_counter()
    done = subprocess.run(
        daemon.runctl("submit", "--batch", "-"),
        input=line.encode() * LINES,
        stdout=subprocess.PIPE,
        check=True,
    )
    took = time.perf_counter() - began
    if done.stdout.count(b'"run"') != LINES:
        raise RuntimeError("not every line was submitted")
    table = Table("batch", f"Submits: {LINES:,} in one batch, beside a process for each")
    table.aim = "at least 10 times as many a second"
    each = table.add("runctl submit, a process each", alone, "ms", "floor")
    batch = [took * 1000 / LINES]
    ours = table.add("runctl submit --batch, a line", batch, "ms", against=each)
    ratio = each.median / ours.median
    table.judge("at least 10 times as many a second", ratio >= 10)
    table.note(f"{1000 / ours.median:,.0f} submits a second, {ratio:.0f} times as many")
    return [table]
