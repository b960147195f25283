"""Keeps a ``Board`` up to date: the streams' summaries, the daemon's word that a queue
changed, and the listing, asked for again when one of these says that it is out of date.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from ...client import consumer
from ...client.events import CaughtUp, Connection, Event, Progress
from ...client.link import Link, LinkLost
from ...client.requests import ask
from ...client.shared_link import SharedLink
from ...protocol import messages, subjects
from ...protocol.errors import Denied, RequestError, Unavailable
from ...protocol.model import ThreadRow
from .board import Board

R = TypeVar("R", bound=messages.Reply)

#: At most one listing in this time, and in as long as two take.
PAUSE = 0.25
PAGE = 500
#: A daemon that went away behind a NATS that did not must be noticed within 2 s.
PING_EVERY = 0.8
PING_TIMEOUT = 1.0
PING_SUBJECT = subjects.control_subject("here")


class Feed:
    """``await start()``, then ``run()`` until cancelled; ``links`` is closed then. ``wanted``:
    how many threads fill the screen. ``changed`` is called when there is something new to
    show."""

    def __init__(
        self,
        links: SharedLink,
        board: Board,
        wanted: Callable[[], int],
        changed: Callable[[], None],
    ) -> None:
        self._links = links
        self._board = board
        self._wanted = wanted
        self._changed = changed
        self._stale = asyncio.Event()
        self._online = asyncio.Event()
        self._link: Link | None = None
        self._caught_up = False
        #: What is away, in words, and since when (monotonic); None: all is there.
        self.away: tuple[str, float] | None = None
        #: Executors that have runs in flight and did not answer at the last listing.
        self.silent: list[messages.ExecutorStatus] = []

    async def start(self) -> None:
        """Connect, and list once. Raises Unavailable, RequestError."""
        try:
            self._link = await self._links.use(self._begin)
        except BaseException:
            await self._links.close()
            raise
        self._online.set()

    async def _begin(self, link: Link) -> Link:
        await self._subscribe(link)
        await self._list(link)
        return link

    async def run(self) -> None:
        subject = f"{subjects.SUBJECT_PREFIX}.*.*"
        watcher = consumer.Watcher(
            self._links.dial, subject, link=self._link, shared=True, summaries=True
        )
        try:
            async with watcher, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_listed())
                tasks.create_task(self._keep_pinging())
                async for events in watcher:
                    for event in events:
                        await self._take(event, watcher)
                    self._changed()
        finally:
            await self._links.close()

    async def ask(self, request: messages.Request, expect: type[R]) -> R:
        """The daemon's answer. Raises as ``client.ask`` does."""
        if self._link is None or not self._online.is_set():
            raise Unavailable("runctld is away; try again when it is back")
        return await ask(self._link, request, expect)

    def refresh(self) -> None:
        """List again, soon."""
        self._stale.set()

    async def _take(self, event: Event, watcher: consumer.Watcher) -> None:
        if isinstance(event, Progress):
            self._board.summarise(event.run, event.summary, time.monotonic())
            if event.summary.kind != "chunk" and self._caught_up:
                self._stale.set()
        elif isinstance(event, CaughtUp):
            self._caught_up = True
            self._stale.set()
        elif isinstance(event, Connection):
            if not event.up:
                self._online.clear()
                what = "the stored output is gone" if event.stream else "connection lost"
                self._gone(f"{what}; waiting for runctld to come back")
                return
            try:
                if watcher.link is not None and watcher.link is not self._link:
                    await self._subscribe(watcher.link)
                    self._link = watcher.link
            except LinkLost:
                return  # the watcher sees it too, and says so next
            self._online.set()
            self._stale.set()

    async def _subscribe(self, link: Link) -> None:
        from nats.errors import Error

        async def changed(_: object) -> None:
            self._stale.set()

        try:
            await link.nc.subscribe(subjects.CHANGED_SUBJECT, cb=changed)
        except (Error, OSError):
            raise LinkLost("the connection to NATS broke") from None

    def _gone(self, text: str) -> None:
        since = time.monotonic() if self.away is None else self.away[1]
        self.away = (text, since)
        self._changed()

    # ---- the listing --------------------------------------------------------------

    async def _keep_listed(self) -> None:
        retry = settle = PAUSE
        while True:
            await self._stale.wait()
            await self._online.wait()
            assert self._link is not None
            self._stale.clear()
            began = time.monotonic()
            try:
                await self._list(self._link)
            except (Unavailable, RequestError) as error:
                if self._online.is_set() and not isinstance(error, LinkLost):
                    self._gone(f"{error}")
                self._stale.set()
                await asyncio.sleep(retry)
                retry = min(2 * retry, 1.0)
                continue
            retry = PAUSE
            if self._online.is_set():
                self.away = None
            self._changed()
            if self._board.unsettled():
                asyncio.get_running_loop().call_later(settle, self._stale.set)
                settle = min(2 * settle, 5.0)
            else:
                settle = PAUSE
            await asyncio.sleep(max(PAUSE, 2 * (time.monotonic() - began)))

    async def _list(self, link: Link) -> None:
        live: list[ThreadRow] = []
        silent: list[messages.ExecutorStatus] = []
        after: int | None = 0
        while after is not None:
            page = await ask(
                link, messages.List(live=True, limit=PAGE, after=after), messages.Threads
            )
            live += page.threads
            silent += page.silent
            after = page.next
        idle: list[ThreadRow] = []
        wanted = min(self._wanted(), PAGE)
        if len(live) < wanted:  # of so many recent threads, at least the missing are idle
            idle = (await ask(link, messages.List(limit=wanted), messages.Threads)).threads
        self._board.replace(live, idle)
        self.silent = silent

    async def _keep_pinging(self) -> None:
        """Nothing else tells that a daemon is gone whose NATS is not. The ping asks nothing
        of the database."""
        from nats.errors import NoRespondersError
        from nats.errors import TimeoutError as NatsTimeout

        answered = False
        while True:
            await asyncio.sleep(PING_EVERY)
            await self._online.wait()
            assert self._link is not None
            try:
                await self._link.request(PING_SUBJECT, b"", PING_TIMEOUT)
            except LinkLost:
                continue
            except Denied:
                return  # this user is not to know
            except NoRespondersError:
                self._gone("runctld is not running (NATS is); waiting for it to come back")
            except NatsTimeout:
                if answered and self._online.is_set():  # else it may just not be allowed
                    self._gone("runctld does not answer; waiting for it")
            else:
                answered = True
                if self.away is not None:
                    self._stale.set()
