"""Tells the executor of a run on a terminal how large ours is, for as long as we watch.

The first of all watchers decides the size. That we are still there is seen from the
inbox that we are subscribed to. Whatever goes wrong here is silent: watching works
without.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from itertools import chain, repeat
from typing import TYPE_CHECKING

from ...client import consumer
from ...client.events import Connection, Continue, End, Event, Reset
from ...client.link import Link
from ...client.requests import ask
from ...protocol import messages, subjects
from ...protocol.errors import RequestError, Unavailable
from ..display.render import STDOUT

if TYPE_CHECKING:
    from nats.aio.msg import Msg

#: A daemon that has just started writes before it answers. Seconds between tries.
RETRIES, SELDOM = (0.05, 0.1, 0.2, 0.5, 1.0), 2.0
MOST = 10_000

#: To be woken when our terminal changes its size: a signal has one handler only.
_resized: set[asyncio.Event] = set()


def _on_resize() -> None:
    for event in _resized:
        event.set()


class Window:
    """``async with Window(watcher, enabled) as window``, within the watcher's own block;
    give every event to ``take``."""

    def __init__(self, watcher: consumer.Watcher, enabled: bool) -> None:
        self._watcher = watcher
        self._enabled = enabled and os.isatty(STDOUT)
        self._reset: Reset | Continue | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._inbox = ""

    async def __aenter__(self) -> Window:
        return self

    def take(self, event: Event) -> None:
        if not self._enabled:
            return
        if isinstance(event, Reset | Continue):
            self._reset = event if event.tty and event.executor else None
        elif isinstance(event, End):
            self._reset = None
        elif not (isinstance(event, Connection) and event.up):
            return
        if self._reset is not None:
            self._start()
            self._wake.set()

    def _start(self) -> None:
        if self._task is None:
            if not _resized:
                asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, _on_resize)
            _resized.add(self._wake)
            self._task = asyncio.create_task(self._announce_each())

    async def __aexit__(self, *_: object) -> None:
        if self._task is None:
            return
        _resized.discard(self._wake)
        if not _resized:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGWINCH)
        self._task.cancel()
        reset, link = self._reset, self._link
        if reset is None or link is None or link.closed.is_set():
            return
        # No answer is waited for: on Ctrl-C the connection's tasks are being cancelled
        # together with us. Closing the link sends what is left.
        with contextlib.suppress(Exception):
            leave = messages.encode(messages.Resize(reset.run, self._inbox, 0, 0))
            subject = subjects.control_subject("resize", reset.executor)
            await asyncio.wait_for(link.nc.publish(subject, leave, reply=link.nc.new_inbox()), 0.2)

    async def _announce_each(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            # A daemon that is away comes back to a run that goes on, of which no event tells.
            for pause in chain(RETRIES, repeat(SELDOM)):
                if await self._announce():
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause)
                    break

    async def _announce(self) -> bool:
        """False: it may go better soon."""
        reset, link = self._reset, self._watcher.link
        if reset is None:
            return True
        if link is None or link.closed.is_set():
            return False
        try:
            columns, rows = os.get_terminal_size(STDOUT)
            if columns < 1 or rows < 1:
                return True
            await self._subscribe_inbox(link)
            size = min(columns, MOST), min(rows, MOST)
            request = messages.Resize(reset.run, self._inbox, *size)
            await ask(link, request, messages.Resized, executor=reset.executor)
        except Unavailable:
            return False
        except (RequestError, OSError):  # it has ended, or the daemon is of an older version
            pass
        return True

    async def _subscribe_inbox(self, link: Link) -> None:
        """Have our inbox on this link. The inbox stays ours over reconnections, and with
        it our place in the row."""
        if link is self._link:
            return
        from nats.errors import Error

        async def answer(msg: Msg) -> None:
            with contextlib.suppress(Exception):
                await msg.respond(b"")

        self._inbox = self._inbox or link.nc.new_inbox()
        try:
            await link.nc.subscribe(self._inbox, cb=answer)
        except Error as error:
            raise Unavailable(str(error)) from None
        self._link = link
