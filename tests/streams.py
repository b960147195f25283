"""One run's stream on a real NATS: what is written there, and what a watcher sees of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from conftest import DEADLINE
from runctl.client import consumer
from runctl.client.events import Chunk, End, Event
from runctl.client.link import dial
from runctl.config.schema import Config, Nats
from runctl.protocol import subjects
from runctl.supervisor.output.writer import Writer

THREAD = "t"


async def write(attempt: Writer, *data: bytes) -> None:
    for one in data:
        await attempt.append("stdout", one)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt.pump)
        attempt.close()
    attempt._closed = trio.Event()


def ended(events: list[Event]) -> bool:
    return any(isinstance(e, End) for e in events)


def data_of(events: list[Event]) -> bytes:
    return b"".join(e.data for e in events if isinstance(e, Chunk))


async def until(what: Callable[[], object]) -> None:
    with trio.fail_after(DEADLINE):
        while not what():  # noqa: ASYNC110
            await trio.sleep(0.02)


@asynccontextmanager
async def watching(url: str, run: str) -> AsyncIterator[list[Event]]:
    """The events of a watcher, in an event loop of its own, as they come."""
    events: list[Event] = []
    config = Config(state_dir=Path(), nats=Nats(url))
    ends: list[Callable[[], object]] = []

    async def collect() -> None:
        async with consumer.Watcher(
            lambda: dial(config), subjects.out_subject(THREAD, run)
        ) as watcher:
            async for batch in watcher:
                events.extend(batch)

    async def until_told() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.create_task(collect())
        ends.append(lambda: loop.call_soon_threadsafe(task.cancel))
        await asyncio.wait({task})

    thread = threading.Thread(target=lambda: asyncio.run(until_told()))
    thread.start()
    try:
        await until(lambda: ends)
        yield events
    finally:
        ends[0]()
        await trio.to_thread.run_sync(thread.join)
