"""Which threads have changed, so that whoever lists them knows when to list again.

Read once for all who want to know, and only while somebody does: a consumer of the records'
headers, which says what begins and ends, and the daemons' word on what is queued.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..client.cancellation import end_tasks
from ..client.consumer import Watcher
from ..client.events import CaughtUp, Connection, Event, Progress
from ..client.link import Link, LinkLost
from ..client.shared_link import SharedLink
from ..config.schema import Config
from ..protocol import subjects
from ..protocol.errors import Unavailable
from ..protocol.model import untoken

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log = logging.getLogger("runctl.gateway")

#: Seconds until NATS is tried again.
RETRY = 1.0
#: One that has not listed for long is told of no more threads than these, but to list them all.
MOST = 1000


class Listener:
    """``threads``: what has changed since it was told; None: anything may have."""

    def __init__(self) -> None:
        self.threads: set[str] | None = None
        self.changed = asyncio.Event()

    def note(self, thread: str | None) -> None:
        if thread is None or self.threads is None or len(self.threads) >= MOST:
            self.threads = None
        else:
            self.threads.add(thread)
        self.changed.set()


class ChangeFeed:
    """``open`` it on the event loop; ``stopping`` is set when those who listen are to be sent
    away."""

    def __init__(self, config: Config) -> None:
        self._links = SharedLink(config)
        self._listeners: set[Listener] = set()
        self._reading: asyncio.Task[None] | None = None
        self._heard: Link | None = None
        self.stopping = False

    @contextmanager
    def open(self) -> Iterator[Listener]:
        listener = Listener()
        self._listeners.add(listener)
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if not self._listeners and self._reading is not None:
                self._reading.cancel()
                self._reading = None

    def stop(self) -> None:
        self.stopping = True
        for listener in self._listeners:
            listener.changed.set()

    async def close(self) -> None:
        if self._reading is not None:
            await end_tasks([self._reading])
        await self._links.close()

    async def _read(self) -> None:
        while True:
            try:
                subject = f"{subjects.SUBJECT_PREFIX}.*.*"
                watcher = Watcher(self._links.dial, subject, shared=True, summaries=True)
                async with watcher:
                    caught_up = False
                    async for events in watcher:
                        for event in events:
                            caught_up |= isinstance(event, CaughtUp)
                            await self._take(event, watcher.link, caught_up)
            except (Unavailable, LinkLost) as problem:
                log.debug("changes: %s", problem)
                await asyncio.sleep(RETRY)

    async def _take(self, event: Event, link: Link | None, caught_up: bool) -> None:
        if isinstance(event, Progress):
            if caught_up and event.summary.kind != "chunk":
                self._note(_thread_of(event.subject))
        elif isinstance(event, CaughtUp | Connection):
            if link is not None and link is not self._heard:
                await self._hear(link)
            self._note(None)

    async def _hear(self, link: Link) -> None:
        from nats.errors import Error

        async def changed(message: Msg) -> None:
            self._note(message.data.decode(errors="replace"))

        try:
            await link.nc.subscribe(subjects.CHANGED_SUBJECT, cb=changed)
        except (Error, OSError):
            return  # the watcher sees that it broke, and comes with another one
        self._heard = link

    def _note(self, thread: str | None) -> None:
        for listener in self._listeners:
            listener.note(thread)


def _thread_of(subject: str) -> str | None:
    try:
        return untoken(subject.split(".")[-2])
    except (ValueError, IndexError):
        return None
