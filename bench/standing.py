"""What a daemon costs that has nothing to do, and ``runctl list`` of many threads."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

from .harness import Daemon, running, time_processes, wired
from .processes import process_tree, usage
from .report import Table
from .rows import multiply

RUNS = 1000
LISTS = 15
LOOKED = 8.0
LISTED = 10, 1000, 10_000


async def bench_idle() -> list[Table]:
    """A daemon with nothing to do, fresh and after ``RUNS`` runs."""
    table = Table("idle", "A daemon that has nothing to do")
    table.aim = "at most 1 % of a core; at most 100 MiB, daemon and nats-server together"
    plain = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(600)"
    )
    try:
        floor = usage([plain.pid], 1)
    finally:
        plain.kill()
        await plain.wait()
    table.add("a sleeping python", [floor.pss_mib], "MiB", "floor")
    async with running() as daemon:
        await _idle(table, "fresh", daemon, judged=True)
        async with wired(daemon) as link:
            gate = asyncio.Semaphore(50)

            async def one(n: int) -> None:
                async with gate:
                    await link.chunks(await link.submit(f"idle-{n}", ["true"]))

            await asyncio.gather(*(one(n) for n in range(RUNS)))
        await _idle(table, f"after {RUNS:,} runs", daemon)
    return [table]


async def _idle(table: Table, when: str, daemon: Daemon, *, judged: bool = False) -> None:
    await asyncio.sleep(2)  # what has just been started or run comes to rest
    tree = process_tree(daemon)
    found = await asyncio.to_thread(usage, tree, LOOKED)
    table.add(f"runctl, {when}", [found.pss_mib], "MiB")
    for pid, name in tree.items():
        size = usage([pid], 0.01).pss_mib
        table.add(f"{when}, of it {name}", [size], "MiB", "count")
    table.add(f"{when}, processor", [found.cpu], "% of a core", "count")
    table.add(f"{when}, context switches", [found.wakeups], "/s", "count")
    if judged:
        table.judge("at most 1 % of a core", found.cpu <= 1)
        table.judge("at most 100 MiB (proportional set size)", found.pss_mib <= 100)


async def bench_list() -> list[Table]:
    """``runctl list`` as a whole process."""
    table = Table("list", "`runctl list` and `--version`, whole process")
    table.aim = "at most 3 × the interpreter's own start for 10 threads; then sub-linear"
    baseline = time_processes(LISTS, [sys.executable, "-c", "pass"])
    floor = table.add("python -c pass", baseline, "ms", "floor")
    medians = []
    async with running() as daemon:
        version = time_processes(LISTS, daemon.runctl("--version"))
        table.add("runctl --version", version, "ms", against=floor)
        async with wired(daemon) as link:
            subject = await link.submit("seed", ["true"])
            await link.chunks(subject)
        stored = 1
        for count in LISTED:
            multiply(daemon, subject.rpartition(".")[2], count - stored, first=stored)
            stored = count
            found = _listed(daemon, count)
            if found != count:
                raise RuntimeError(f"{count} threads are there, {found} were listed")
            samples = time_processes(LISTS, daemon.runctl("list"))
            medians.append(
                table.add(f"runctl list, {count:,} threads", samples, "ms", against=floor).median
            )
    table.note(
        "the interpreter with click and nats-py, without which there is no command line and no"
        " connection, is most of it: see the floors of the reply of 20,000 chunks"
    )
    table.note("the threads are copies of a real run's rows; all of them are listed")
    table.judge("10 threads: at most 3 × python -c pass", medians[0] <= 3 * floor.median)
    table.judge("10,000 threads: less than 10 × 1,000", medians[2] < 10 * medians[1])
    return [table]


def _listed(daemon: Daemon, count: int) -> int:
    argv = daemon.runctl("--json", "list", "--limit", str(count))
    return len(json.loads(subprocess.run(argv, check=True, capture_output=True).stdout))
