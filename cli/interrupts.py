"""How a signal ends what runs in an event loop.

An exception that a signal's handler raises may come between two callbacks of the loop: the
one whose turn it was is lost, and whatever it would have woken waits for ever, the end of the
program included. So the loop raises it, as a callback of its own; at once only where nothing is
lost by it: outside of a loop, in a write that holds the loop (a pipe that nobody reads), and
when somebody asks for it twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class _State:
    """``writing``: a write holds the loop. ``asked``: the loop that was asked to raise."""

    writing = False
    asked: asyncio.AbstractEventLoop | None = None


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Around what writes, and may wait for a reader: signals interrupt it."""
    before, _State.writing = _State.writing, True
    try:
        yield
    finally:
        _State.writing = before  # a handler's own write may come amid another one


def interrupt(error: BaseException) -> None:
    """What a signal's handler calls to end the program. ``error``: a KeyboardInterrupt or
    SystemExit, which get out of any loop. Raises it, now or in the loop."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # none runs
        raise error from None
    if _State.writing or _State.asked is loop:
        raise error
    _State.asked = loop
    loop.call_soon_threadsafe(_raise, error)


def _raise(error: BaseException) -> None:
    raise error
