"""A daemon that is killed and started again under commands that go on: when are they seen again?"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from runctl.protocol import records

from .harness import running, time_processes, watching, wired
from .last_records import all_are
from .peers import bare_dbos
from .report import Table
from .restarts import AT_ONCE

KILLS = 5
RUNS = 1000
#: Says so once it is there: what is killed while it is being started is replayed.
BEGUN = ["/bin/sh", "-c", "echo begun; exec sleep 600"]
STEPS, STEP = 20, 0.5
#: Tells the time, often.
TALKER = """
import sys, time
while True:
    print(time.time(), flush=True)
    time.sleep(0.01)
"""
STEPPER = f"""
import sys, time
for n in range(1, {STEPS} + 1):
    sys.stdout.write("step %d\\n" % n)
    sys.stdout.flush()
    time.sleep({STEP})
"""


async def bench_adopt() -> list[Table]:
    """SIGKILL, immediate restart, under a command that goes on."""
    baseline = time_processes(KILLS, [sys.executable, "-c", "import dbos, trio, nats"])
    samples = []
    async with running() as daemon:
        async with wired(daemon) as link:
            await link.submit("adopt", [sys.executable, "-c", TALKER])
        async with watching(daemon, "adopt") as watcher:
            for _ in range(KILLS):
                await watcher.wait_event(_is_written_after(time.time()))
                killed = time.time()
                daemon.kill()
                daemon.start()
                seen = await watcher.wait_event(_is_written_after(killed))
                samples.append((seen - killed) * 1000)
                await daemon.wait_ready()
    table = Table("adopt", "SIGKILL, restart at once → what a command writes is seen again")
    table.aim = "at most 700 ms"
    floor = table.add("python -c 'import dbos, trio, nats'", baseline, "ms", "floor")
    ours = table.add("runctl: kill → next line", samples, "ms", against=floor)
    table.judge("at most 700 ms", ours.median <= 700)
    return [table, await _time_steps()]


def _is_written_after(moment: float) -> Callable[[dict[str, Any]], bool]:
    def wanted(event: dict[str, Any]) -> bool:
        if event["type"] != "chunk":
            return False
        whole = event["data"].rpartition("\n")[0].split()
        return bool(whole) and float(whole[-1]) > moment

    return wanted


async def _time_steps() -> Table:
    """The work that a kill costs: none."""
    async with running() as daemon:
        async with wired(daemon) as link:
            await link.submit("steps", [sys.executable, "-c", STEPPER])
        async with watching(daemon, "steps") as watcher:
            began = await watcher.wait_event(_says("step 1\n"))
            await watcher.wait_event(_says("step 4\n"))
            daemon.kill()
            daemon.start()
            seen = await watcher.wait_event(_says(f"step {STEPS}\n"))
    table = Table("steps", f"A command of {STEPS} steps, its daemon killed at the fourth: the last")
    table.aim = "at most 0.7 s after the work itself"
    work = table.add("the work itself", [(STEPS - 1) * STEP], "s", "floor")
    ours = table.add("runctl: step 1 → last step", [seen - began], "s", against=work)
    table.judge("at most 0.7 s after the work itself", ours.median <= work.median + 0.7)
    return table


def _says(text: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["type"] == "chunk" and text in event["data"]


async def bench_adopted() -> list[Table]:
    """A restart under a thousand commands, until each is attended to."""
    table = Table("adopted", f"{RUNS:,} commands that go on: restart → all attended")
    table.aim = "at most 1.0 × bare dbos"
    bare = await asyncio.to_thread(bare_dbos.redispatch, RUNS, 2, "partitions")
    floor = table.add("bare dbos, a partition each, steps in memory", bare, "ms", "peer")
    ours = table.add("runctl, all adopted", await adopt_many(RUNS, 3), "ms", against=floor)
    table.judge("at most 1.0 × bare dbos", ours.median <= floor.median)
    table.note(
        "a run is attended when the new daemon's first record of it is stored, behind which no"
        " publish of the old one can be: from then on its output is read"
    )
    return [table]


async def adopt_many(count: int, times: int) -> list[float]:
    """Milliseconds from a restart until ``count`` commands have all been taken over."""
    samples = []
    async with running(f"max_running = {count + 100}\n") as daemon:
        async with wired(daemon) as link:
            gate = asyncio.Semaphore(AT_ONCE)

            async def submit(n: int) -> None:
                async with gate:
                    await link.submit(f"adopted-{n}", BEGUN)

            await asyncio.gather(*(submit(n) for n in range(count)))
        await all_are(daemon, count, _is_output_since(0))
        for _ in range(times):
            daemon.kill()
            began, killed = time.perf_counter(), time.time()
            daemon.start()
            await all_are(daemon, count, _is_output_since(killed))
            samples.append((time.perf_counter() - began) * 1000)
            await daemon.wait_ready()
    return samples


def _is_output_since(killed: float) -> Callable[[records.Record], bool]:
    return lambda record: isinstance(record, records.Chunks) and record.at > killed
