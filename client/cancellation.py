"""Tasks and futures that are of no more interest."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any

#: Seconds until a task that has not ended is cancelled once more.
AGAIN = 0.2


async def end_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel them until they have ended. Once is not enough: nats-py, and wait_for before Python
    3.12, can swallow a cancellation that meets a connection just being made or closed, and a task
    that tries again goes on then."""
    while left := {task for task in tasks if not task.done()}:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=AGAIN)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # nobody asks for it any more


def give_up(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel them. Of one that fails, or did at this moment, asyncio says nothing on stderr."""
    for future in futures:
        future.add_done_callback(_take_error)
        future.cancel()


def _take_error(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
