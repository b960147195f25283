"""The asyncio loop in trio, whose end waits for nobody who did not hear that it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio_asyncio

#: Between two cancellations of what is left, seconds.
AGAIN = 0.5


@asynccontextmanager
async def open_loop() -> AsyncIterator[asyncio.AbstractEventLoop]:
    """``trio_asyncio.open_loop``, which cancels asyncio's tasks once at its end and then waits for
    them. ``asyncio.wait_for`` before Python 3.12, and nats-py, can swallow that once: a daemon
    whose keeper was killed went on for ever. So they are told again until they are done."""
    again = trio.CancelScope(shield=True)

    async def cancel_leftovers() -> None:
        with again:
            while True:
                await trio.sleep(AGAIN)
                for task in asyncio.all_tasks(loop):
                    task.cancel()

    async with trio.open_nursery() as nursery:
        try:
            async with trio_asyncio.open_loop() as loop:
                try:
                    yield loop
                finally:
                    nursery.start_soon(cancel_leftovers)
        finally:
            again.cancel()
