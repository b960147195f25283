"""A daemon that is killed and started again: when is its work seen again?"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from functools import partial

from runctl.protocol import records

from .harness import Daemon, is_chunk, running, time_processes, watching, wired
from .last_records import all_are
from .peers import bare_dbos
from .report import Table

KILLS = 5
UNFINISHED, AT_ONCE = 1000, 50
DEMO_CHUNKS, DEMO_INTERVAL = 20, 0.5


async def bench_replay() -> list[Table]:
    """SIGKILL, immediate restart: when does the attached watcher see the new attempt?"""
    baseline = time_processes(KILLS, [sys.executable, "-c", "import dbos, trio, nats"])
    samples = []
    killed = 0.0
    async with running(outlive="0s") as daemon:
        async with wired(daemon) as link:
            await link.submit("replay", ["/bin/sh", "-c", "echo x; exec sleep 600"])
        async with watching(daemon, "replay") as watcher:
            for attempt in range(1, KILLS + 2):
                seen = await watcher.wait_event(partial(is_chunk, attempt=attempt))
                if attempt > 1:
                    samples.append((seen - killed) * 1000)
                if attempt <= KILLS:
                    killed = time.time()
                    daemon.kill()
                    daemon.start()
    table = Table("replay", "SIGKILL, restart at once → replay seen by who is attached")
    table.aim = "at most 800 ms, and at most 350 ms above the interpreter with its imports"
    floor = table.add("python -c 'import dbos, trio, nats'", baseline, "ms", "floor")
    bare = await asyncio.to_thread(bare_dbos.recovery, KILLS, "queue")
    table.add("bare dbos, a queue polled each 50 ms: kill → step seen", bare, "ms", "peer")
    ours = table.add("runctl: kill → first replayed chunk", samples, "ms", against=floor)
    table.judge("at most 800 ms", ours.median <= 800)
    table.judge("at most 350 ms above the floor", ours.median <= floor.median + 350)
    return [table]


async def bench_unfinished() -> list[Table]:
    """A restart with a thousand unfinished runs, until each runs again."""
    table = Table("unfinished", f"{UNFINISHED:,} unfinished runs: restart → all run again")
    table.aim = "at most 1.3 × bare dbos with the same queue"
    bare = await asyncio.to_thread(bare_dbos.redispatch, UNFINISHED, 2, "partitions")
    floor = table.add("bare dbos, a partition each, steps in memory", bare, "ms", "peer")
    took = await redispatch(UNFINISHED, 2)
    ours = table.add("runctl, a process and a stream's reset each", took, "ms", against=floor)
    table.judge("at most 1.3 × bare dbos", ours.median <= 1.3 * floor.median)
    table.note(
        "bare dbos appends a line to a file for each; runctl's restart waits until the keeper has"
        " killed the thousand old processes, and each run has its stream reset with an"
        " acknowledged publish and a process of its own: the spawns alone are the last row"
    )
    forks = await asyncio.to_thread(spawn_many, UNFINISHED)
    table.add(f"spawn of {UNFINISHED:,} × /bin/sleep, nothing else", [forks], "ms", "floor")
    return [table]


def spawn_many(count: int) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    processes = [subprocess.Popen(["/bin/sleep", "600"]) for _ in range(count)]
    took = (time.perf_counter() - began) * 1000
    for process in processes:
        process.kill()
        process.wait()
    return took


async def bench_demo() -> list[Table]:
    """The demo's workload: how long after the kill is the whole reply there?"""
    mock = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runctl.cli.commands.mock_endpoint",
        "--chunks", str(DEMO_CHUNKS), "--interval", str(DEMO_INTERVAL),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    try:
        assert mock.stdout is not None
        port = int((await mock.stdout.readline()).split()[1])
        runner = (
            '[runners.chat]\nkind = "chat"\nmodel = "mock"\n'
            f'base_url = "http://127.0.0.1:{port}/v1"\n'
        )
        async with running(runner, outlive="0s") as daemon:
            argv = daemon.runctl("submit", "demo", "--runner", "chat", "Count.")
            await asyncio.to_thread(time_processes, 1, argv)
            async with watching(daemon, "demo") as watcher:
                await watcher.wait_event(partial(is_chunk, attempt=1, text="chunk-3 "))
                killed = time.time()
                daemon.kill()
                daemon.start()
                seen = await watcher.wait_event(
                    partial(is_chunk, attempt=2, text=f"chunk-{DEMO_CHUNKS} ")
                )
    finally:
        if mock.returncode is None:
            mock.kill()
        await mock.communicate()
    table = Table("demo", f"SIGKILL → chunk {DEMO_CHUNKS} of the demo's reply")
    work = table.add("the reply itself", [(DEMO_CHUNKS - 1) * DEMO_INTERVAL], "s", "floor")
    table.add("runctl: kill, restart at once → last chunk", [seen - killed], "s", against=work)
    return [table]


async def redispatch(count: int = UNFINISHED, times: int = 1) -> list[float]:
    """Milliseconds from a restart until ``count`` unfinished runs, a thread each, have all
    begun their next attempt: until the last of them has published its reset."""
    samples = []
    async with running(f"max_running = {count + 100}\n", outlive="0s") as daemon:
        async with wired(daemon) as link:
            gate = asyncio.Semaphore(AT_ONCE)

            async def submit(n: int) -> None:
                async with gate:
                    await link.submit(f"unfinished-{n}", ["/bin/sleep", "600"])

            await asyncio.gather(*(submit(n) for n in range(count)))
        await all_began(daemon, 1, count)
        for attempt in range(2, times + 2):
            daemon.kill()
            began = time.perf_counter()
            daemon.start()
            await all_began(daemon, attempt, count)
            samples.append((time.perf_counter() - began) * 1000)
    return samples


async def all_began(daemon: Daemon, attempt: int, count: int) -> None:
    """Until so many runs have begun that attempt, the daemon being on its way."""
    await all_are(daemon, count, lambda x: isinstance(x, records.Reset) and x.attempt == attempt)
