"""A daemon that is killed and started again: when is its work seen again?"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from functools import partial

from .harness import is_chunk, running, time_processes, watching, wired
from .report import Table

KILLS = 5
DEMO_CHUNKS, DEMO_INTERVAL = 20, 0.5


async def bench_replay() -> list[Table]:
    """SIGKILL, immediate restart: when does the attached watcher see the new attempt?"""
    baseline = time_processes(KILLS, [sys.executable, "-c", "import dbos, trio, nats"])
    samples = []
    killed = 0.0
    async with running() as daemon:
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
    ours = table.add("runctl: kill → first replayed chunk", samples, "ms", against=floor)
    table.judge("at most 800 ms", ours.median <= 800)
    table.judge("at most 350 ms above the floor", ours.median <= floor.median + 350)
    return [table]


async def bench_demo() -> list[Table]:
    """The demo's workload: how long after the kill is the whole reply there?"""
    mock = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runctl.cli.mock",
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
        async with running(runner) as daemon:
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
