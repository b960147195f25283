"""A second executor is asked when the first is slow to answer.

NATS gives a request to one of all executors, and one that hangs is still connected. To
ask again is harmless for what only reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from .cancellation import give_up

#: Seconds until another is asked, then until one more is, and how many are at most. It
#: may be given to the same one again: which one, is NATS's free choice.
PATIENCE, AGAIN = 2.0, 1.0
MOST = 8

Send = Callable[[float], Coroutine[Any, Any, bytes]]


async def first_answer(send: Send, timeout: float) -> bytes:
    """The first answer to ``send(timeout)``, which is called again while there is none.
    Raises what the last one that failed raised."""
    end = asyncio.get_running_loop().time() + timeout
    asked: set[asyncio.Task[bytes]] = set()
    try:
        while True:
            if len(asked) < MOST:
                left = end - asyncio.get_running_loop().time()
                asked.add(asyncio.create_task(send(max(left, 0.1))))
            waiting = [task for task in asked if not task.done()]
            patience = PATIENCE if len(asked) == 1 else AGAIN
            done, _ = await asyncio.wait(
                waiting,
                timeout=patience if len(asked) < MOST else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                # Nobody there, or the connection broke: the same for all.
                if task.exception() is None or not isinstance(task.exception(), TimeoutError):
                    return task.result()
            if done and all(task.done() for task in asked):
                return done.pop().result()
    finally:
        give_up(asked)
