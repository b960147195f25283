"""Many watchers in one process, each with a connection of its own, for ``watchers``.

``python -m bench.crowd CONFIG SUBJECT COUNT LINES`` says a line when all are there, and
a line of JSON, every latency in ms, when each has seen so many lines, which hold the
time (ns) at which they were written. SUBJECT "plain": subscribers without JetStream.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from nats.aio.msg import Msg
from runctl.client import consumer
from runctl.client.events import CaughtUp, Chunk
from runctl.client.link import Link, dial
from runctl.config.load import load
from runctl.config.schema import Config

PLAIN_SUBJECT = "bench.watchers"
#: Connections that are made at the same time.
DIALLING = 20


class Crowd:
    def __init__(self, config: Config, count: int, lines: int) -> None:
        self._config = config
        self._count = count
        self._wanted = count * lines
        self._there = 0
        self._dialling = asyncio.Semaphore(DIALLING)
        self.latencies: list[float] = []
        self.all_there = asyncio.Event()
        self.all_seen = asyncio.Event()

    async def dial(self) -> Link:
        async with self._dialling:
            return await dial(self._config)

    async def plain(self) -> None:
        async def on_message(msg: Msg) -> None:
            self._see(msg.data)

        link = await self.dial()
        await link.nc.subscribe(PLAIN_SUBJECT, cb=on_message)
        await link.nc.flush()
        self._arrive()
        await link.closed.wait()

    async def watch(self, subject: str) -> None:
        async with consumer.Watcher(self.dial, subject) as watcher:
            async for events in watcher:
                for event in events:
                    if isinstance(event, Chunk):
                        self._see(event.data)
                    elif isinstance(event, CaughtUp):
                        self._arrive()

    def _arrive(self) -> None:
        self._there += 1
        if self._there == self._count:
            self.all_there.set()

    def _see(self, data: bytes) -> None:
        now = time.time_ns()
        self.latencies += [(now - int(line)) / 1e6 for line in data.split()]
        if len(self.latencies) >= self._wanted:
            self.all_seen.set()


async def main(config: str, subject: str, count: int, lines: int) -> None:
    crowd = Crowd(load(Path(config), client=True), count, lines)
    tasks = [
        asyncio.create_task(crowd.plain() if subject == "plain" else crowd.watch(subject))
        for _ in range(count)
    ]
    await crowd.all_there.wait()
    print("there", flush=True)
    await crowd.all_seen.wait()
    print(json.dumps(crowd.latencies), flush=True)
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
