"""Whether the claim of one thread's run by a statement of its own is worth its code: a submit's
time to its first claim with it and without, in one run."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

from runctl.protocol.records import Reset

from .harness import Daemon, Wire, running, wired
from .report import Table

SUBMITS = 100
WARM_UP = 5
#: Threads on which a run is running and another waits, of which DBOS's claim looks at each.
BUSY = 50
#: What the statement must save to be kept, milliseconds.
WORTH = 3.0


async def bench_claim() -> list[Table]:
    table = Table("claim", "Submit → its run is claimed, and the reset of its stream published")
    table.aim = f"claim_sql saves more than {WORTH:g} ms of a submit"
    for busy in (0, BUSY):
        with_it, without = await measure(busy)
        where = f"{busy} busy threads" if busy else "no other thread"
        floor = table.add(f"DBOS's claim, {where}", without, "ms", "floor")
        ours = table.add(f"claim_sql, {where}", with_it, "ms", against=floor)
        saved = floor.median - ours.median
        table.judge(f"{where}: more than {WORTH:g} ms ({saved:.1f} ms)", saved > WORTH)
    table.note(
        "one submit after the other, to the two daemons in turn: what else goes on hits both"
    )
    return [table]


async def measure(busy: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each submit, with and without."""
    samples: tuple[list[float], list[float]] = ([], [])
    async with AsyncExitStack() as stack:
        links = []
        for program in ("runctl.supervisor.main", "bench.without_claim_sql"):
            daemon = await stack.enter_async_context(running(f"max_running = {2 * BUSY}\n"))
            if program != "runctl.supervisor.main":
                await restart_as(daemon, program)
            links.append(await stack.enter_async_context(wired(daemon)))
        for link in links:
            for n in range(busy):
                for _ in range(2):
                    await link.submit(f"busy-{n}", ["/bin/sleep", "600"])
            await link.begun(busy)
        for n in range(-WARM_UP, SUBMITS):
            # Who is first has the processor's caches as the other left them.
            for which in (0, 1) if n % 2 else (1, 0):
                took = await time_claim(links[which], f"claim-{n}")
                if n >= 0:
                    samples[which].append(took)
    return samples


async def restart_as(daemon: Daemon, program: str) -> None:
    daemon.stop()
    daemon.program = ["-m", program]
    daemon.start()
    await daemon.wait_ready()


async def time_claim(link: Wire, thread: str) -> float:
    """Milliseconds from a submit's request to the record that begins its run's first attempt. The
    run has ended when this returns."""
    began = time.time_ns()
    subject = await link.submit(thread, ["/bin/true"])
    at, record = await link.next(subject)
    assert isinstance(record, Reset), record
    await link.chunks(subject)
    return (at - began) / 1e6
