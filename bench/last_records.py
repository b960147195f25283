"""Waits for what the last record of each run says, over restarts of the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, DeliverPolicy
from runctl.client.link import Link
from runctl.config.load import load
from runctl.protocol import records, subjects

from .harness import Daemon, dialled


async def all_are(daemon: Daemon, count: int, wanted: Callable[[records.Record], bool]) -> None:
    """Until the last records of so many runs are wanted, the daemon being on its way."""
    config = load(daemon.config, client=True)
    seen: set[str] = set()
    async with asyncio.timeout(90):
        while len(seen) < count:
            link = await dialled(config)
            try:
                await _watch_last(link, count, wanted, seen)
            except (OSError, nats.errors.Error, TimeoutError):
                await asyncio.sleep(0.005)
            finally:
                await link.close()


async def _watch_last(
    link: Link, count: int, wanted: Callable[[records.Record], bool], seen: set[str]
) -> None:
    done = asyncio.Event()

    async def on_record(msg: Msg) -> None:
        if wanted(records.decode_record(msg.data)):
            seen.add(msg.subject)
            if len(seen) >= count:
                done.set()

    await link.nc.jetstream(timeout=1).subscribe(
        subjects.SUBJECT_PREFIX + ".>",
        stream=subjects.STREAM,
        cb=on_record,
        ordered_consumer=True,
        config=ConsumerConfig(deliver_policy=DeliverPolicy.LAST_PER_SUBJECT),
    )
    waits = [asyncio.create_task(event.wait()) for event in (done, link.closed)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
