"""Many trees that do not want to end: how long until nothing of them is left?"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time

from .harness import PATIENCE, Daemon, running, wired
from .processes import alive, process_tree
from .report import Table

TREES = 200
#: Each is deaf, and has a child in a session of its own that is deaf as well.
DEAF = 'trap "" TERM INT HUP; setsid sleep 600 & while :; do sleep 600; done'


async def bench_stop() -> list[Table]:
    """SIGKILL of the daemon, SIGTERM, and SIGTERM hastened by a second one."""
    baseline = await asyncio.to_thread(_kill_sleepers)
    async with running('stop_grace = "1s"\n') as daemon:
        async with wired(daemon) as link:
            for n in range(TREES):
                await link.submit(f"t{n}", ["/bin/sh", "-c", DEAF])
        left = await _trees(daemon)
        began = time.monotonic()
        daemon.kill()
        killed = await asyncio.to_thread(_wait_gone, left, began)

        stopped = await _stop(daemon, again=False)
        daemon.configure('stop_grace = "10m"\n')
        hastened = await _stop(daemon, again=True)
    table = Table("stop", f"{TREES} trees that ignore TERM: until all processes are gone")
    floor = table.add(f"KILL for {3 * TREES} sleeping processes", baseline, "s", "floor")
    table.add("runctl: daemon killed", [killed], "s", against=floor)
    table.add("runctl: SIGTERM, stop_grace 1 s", [stopped], "s", against=floor)
    table.add("runctl: SIGTERM twice, stop_grace 10 min", [hastened], "s", against=floor)
    return [table]


async def _trees(daemon: Daemon) -> list[int]:
    """The pids of everything, once all trees are complete: shell, its sleep, its session."""
    end = time.monotonic() + PATIENCE
    while len(pids := list(process_tree(daemon))) < 3 * TREES:
        if time.monotonic() > end:
            raise RuntimeError(f"only {len(pids)} processes are there")
        await asyncio.sleep(0.2)
    return pids


def _wait_gone(pids: list[int], began: float) -> float:
    """Seconds from ``began`` until none of ``pids`` is alive."""
    while any(map(alive, pids)):
        time.sleep(0.005)
    return time.monotonic() - began


async def _stop(daemon: Daemon, *, again: bool) -> float:
    daemon.start()
    await daemon.wait_ready()
    pids = await _trees(daemon)
    began = time.monotonic()
    daemon.process.terminate()
    if again:
        await asyncio.sleep(0.2)
        daemon.process.terminate()
    await asyncio.to_thread(daemon.process.wait, PATIENCE)
    return await asyncio.to_thread(_wait_gone, pids, began)


def _kill_sleepers() -> list[float]:
    sleepers = [subprocess.Popen(["sleep", "600"]) for _ in range(3 * TREES)]
    began = time.monotonic()
    for process in sleepers:
        os.kill(process.pid, 9)
    for process in sleepers:
        process.wait()
    return [time.monotonic() - began]
