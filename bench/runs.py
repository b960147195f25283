"""A run's way: from the submit to its first chunk, and from a write to a subscriber."""

from __future__ import annotations

import asyncio
import sys
import time

from nats.aio.msg import Msg

from .harness import Daemon, running, time_processes, wired
from .report import Table

SUBMITS = 100
LINES = 600


async def bench_submit() -> list[Table]:
    """From the request's send to the first record with output, one run at a time."""
    argv = ["/bin/echo", "x"]
    baseline = time_processes(SUBMITS, argv)
    async with running() as daemon:
        samples = await first_outputs(daemon, SUBMITS, argv)
    table = Table("submit", "Submit → first output of /bin/echo")
    table.aim = "median at most 15 ms above the spawn, p99 at most 50 ms; ahead of every peer"
    floor = table.add("spawn /bin/echo, wait", baseline, "ms", "floor")
    ours = table.add("runctl: submit request → first chunk", samples, "ms", against=floor)
    table.judge("median at most 15 ms above the spawn", ours.median <= floor.median + 15)
    table.judge("p99 at most 50 ms", ours.p99 <= 50)
    table.note(
        "on runctl's way there are two synced commits (the submit, the claim), an acknowledged"
        " reset of the stream and an acknowledged publish of the output; who forgets all with its"
        " process spares these"
    )
    return [table]


async def first_outputs(daemon: Daemon, count: int, argv: list[str]) -> list[float]:
    """Milliseconds from each submit's request to its run's first record with output."""
    samples = []
    async with wired(daemon) as link:
        for n in range(-5, count):  # the first ones warm the daemon up
            began = time.time_ns()
            found = await link.chunks(await link.submit(f"submit-{n}", argv))
            if n >= 0:
                samples.append((found[0][0] - began) / 1e6)
    return samples


async def bench_latency() -> list[Table]:
    """From a process's write to a subscriber, a line each 5 ms."""
    code = (
        "import os, time\n"
        f"for n in range({LINES + 20}):\n"
        "    os.write(1, b'%d\\n' % time.time_ns())\n"
        "    time.sleep(0.005)\n"
    )
    samples = []
    async with running() as daemon:
        baseline = await plain_latency(daemon)
        async with wired(daemon) as link:
            subject = await link.submit("latency", [sys.executable, "-c", code])
            for at, record in await link.chunks(subject):
                for line in b"".join(chunk.data for chunk in record.chunks).split():
                    samples.append((at - int(line)) / 1e6)
    if len(samples) != LINES + 20:
        raise RuntimeError(f"{LINES + 20} lines were written, {len(samples)} seen")
    table = Table("latency", "A process writes a line each 5 ms → a subscriber has it")
    floor = table.add("nats-py: publish → subscribe", baseline, "ms", "floor")
    table.add("runctl: write → record", samples[20:], "ms", against=floor)
    return [table]


async def plain_latency(daemon: Daemon) -> list[float]:
    """nats-py alone, at the same rate over the same server."""
    samples: list[float] = []

    async def on_message(msg: Msg) -> None:
        samples.append((time.time_ns() - int(msg.data)) / 1e6)

    sender, receiver = await daemon.connect(), await daemon.connect()
    try:
        await receiver.subscribe("bench.latency", cb=on_message)
        await receiver.flush()
        for _ in range(LINES):
            await sender.publish("bench.latency", b"%d" % time.time_ns())
            await asyncio.sleep(0.005)
        await sender.flush()
        await receiver.flush()
    finally:
        await sender.close()
        await receiver.close()
    return samples
