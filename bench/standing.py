"""What a daemon costs that has nothing to do, and ``runctl list`` of many threads."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from .harness import Daemon, running, time_processes, wired
from .processes import cpu_seconds, process_tree, rss_mib
from .report import print_row, print_title

THREADS = 1000
LISTS = 20


async def bench_idle() -> None:
    """What a fresh daemon with nothing to do costs."""
    async with running() as daemon:
        await idle("Idle, fresh", daemon)


async def idle(title: str, daemon: Daemon) -> None:
    plain = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(600)"
    )
    try:
        await asyncio.sleep(1)  # what has just been started or run comes to rest
        tree = process_tree(daemon)
        before, began = {pid: cpu_seconds(pid) for pid in tree}, time.monotonic()
        plain_before = cpu_seconds(plain.pid)
        await asyncio.sleep(5)
        wall = time.monotonic() - began
        cpu = sum(cpu_seconds(pid) - used for pid, used in before.items()) / wall * 100
        plain_cpu = (cpu_seconds(plain.pid) - plain_before) / wall * 100
        base = [rss_mib(plain.pid)]
        parts = {name: 0.0 for name in tree.values()}
        for pid, name in tree.items():
            parts[name] += rss_mib(pid)
    finally:
        plain.kill()
        await plain.wait()
    print_title(f"{title} (target: 1.5 % of a core, 120 MiB)")
    print_row("baseline: a sleeping python, CPU", [plain_cpu], "%", None)
    print_row("daemon with keeper and nats-server, CPU", [cpu], "%", [plain_cpu])
    print_row("baseline: a sleeping python, RSS", base, "MB", None)
    print_row("daemon with keeper and nats-server, RSS", [sum(parts.values())], "MB", base)
    for name, size in parts.items():
        print_row(f"  of it {name}", [size], "MB", base)


async def bench_list() -> None:
    """``runctl list`` as a whole process, a thousand threads in the database."""
    async with running() as daemon:
        async with wired(daemon) as link:
            gate = asyncio.Semaphore(50)

            async def one(n: int) -> None:
                async with gate:
                    await link.chunks(await link.submit(f"list-{n}", ["true"]))

            began = time.monotonic()
            await asyncio.gather(*(one(n) for n in range(THREADS)))
            filled = time.monotonic() - began
        argv = daemon.runctl("list")
        listing = await asyncio.create_subprocess_exec(
            *daemon.runctl("--json", "list", "--limit", str(THREADS + 1)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await listing.communicate()
        if listing.returncode:
            raise RuntimeError(f"runctl list: {err.decode(errors='replace').strip()}")
        rows = len(json.loads(out))
        baseline = time_processes(LISTS, [sys.executable, "-c", "pass"])
        samples = time_processes(LISTS, argv)
        whole = time_processes(LISTS, daemon.runctl("list", "--limit", str(THREADS)))
        print_title(f"runctl list, whole process, {THREADS} threads (target: 250 ms)")
        print_row("baseline: python -c pass", baseline, "ms", None)
        print_row("runctl list", samples, "ms", baseline)
        print_row(f"runctl list --limit {THREADS}", whole, "ms", baseline)
        print(f"  {rows} threads listed; {THREADS} runs of `true` took {filled:.1f} s", flush=True)
        await idle(f"Idle, after {THREADS} runs", daemon)
