"""One watched run's output, read once for all who watch it.

The ring holds every record of the run with ``low < sequence <= high``. A watcher has a cursor:
while that is below ``low`` it reads the stored records behind it (``read_behind``), while it is
below ``high`` the ring has them, and else it waits. So there is no hand-over between what was
stored and what comes: who is slow falls back to reading what is stored.

``low`` begins as the stream's last sequence before the consumer is made, which begins right
behind that. ``epoch`` rises when the stream is another one, or has lost what was seen: cursors
begin anew then, and chunk numbers say what was seen already.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ..client.cancellation import end_tasks
from ..client.delivery import read_unix_ns
from ..client.link import Link, LinkLost, NotReady
from ..client.run_state import Place
from ..client.stream_reader import BACKOFF, StreamReader
from ..protocol import subjects
from ..protocol.errors import Unavailable
from .direct_get import find_next, get_behind
from .entries import Entry
from .run_over import RunOver

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from .watcher import Watcher

log = logging.getLogger("runctl.gateway")

#: Of a ring: records, and what they take in memory.
MOST_RECORDS, MOST_BYTES = 256, 1024 * 1024


class Page:
    """``entries``, and the cursor behind them: nothing else is stored up to there."""

    __slots__ = ("cursor", "entries")

    def __init__(self, entries: list[Entry], cursor: int) -> None:
        self.entries = entries
        self.cursor = cursor


class Channel(StreamReader):
    """Of ``run``, whose records are on ``subject``. ``dial``: the connection that is shared.
    ``over``: finds out that the run has ended where its end is not stored."""

    def __init__(
        self, dial: Callable[[], Awaitable[Link]], run: str, subject: str, over: RunOver
    ) -> None:
        super().__init__(dial, subject)
        self.run = run
        self.subject = subject
        self.over = over
        self.epoch = self.low = self.high = 0
        #: Set once ``low`` is known.
        self.opened = asyncio.Event()
        self.watchers: set[Watcher] = set()
        #: How many have it open.
        self.users = 0
        #: Somebody was given the run's end: nobody comes back.
        self.ended = False
        self._ring: deque[Entry] = deque()
        self._bytes = 0
        self._pages: dict[int, asyncio.Task[Page]] = {}
        self._reading = asyncio.create_task(self._run())

    async def close(self) -> None:
        await self.over.close()
        await end_tasks([self._reading, *self._pages.values()])

    def wake_all(self) -> None:
        for watcher in self.watchers:
            watcher.wake()

    # ---- what comes ----

    async def _run(self) -> None:
        delay = BACKOFF[0]
        while not self.opened.is_set():
            try:
                await self._open(await self._dial())
            except (Unavailable, NotReady) as problem:
                log.debug("%s: %s", self.subject, problem)
                await asyncio.sleep(delay)
                delay = min(2 * delay, BACKOFF[1])
        self.wake_all()
        await self.read()

    async def _open(self, link: Link) -> None:
        """Find where the stream ends by now."""
        info = await link.api(f"STREAM.INFO.{subjects.STREAM}")
        last, seen = int(info["state"]["last_seq"]), ("", 0)
        if last:
            seen = await self._look(link, last)
        self.low = self.high = last
        self.begin_behind(last, *seen, str(info["created"]))
        self.opened.set()

    async def _look(self, link: Link, sequence: int) -> tuple[str, int]:
        """Subject and time of the message there, by which it is known again."""
        try:
            reply = await link.api(f"STREAM.MSG.GET.{subjects.STREAM}", {"seq": sequence})
        except NotReady as problem:
            if problem.code == subjects.NO_MESSAGE:
                return "", 0
            raise
        message = reply["message"]
        return str(message["subject"]), read_unix_ns(message["time"])

    def take(self, msg: Msg, sequence: int) -> None:
        self.note_read()  # the ring is bounded, and whoever is slow reads what is stored
        entry = Entry(self.run, sequence, msg.data)
        self._ring.append(entry)
        self._bytes += entry.size
        self.high = sequence
        while len(self._ring) > 1 and (len(self._ring) > MOST_RECORDS or self._bytes > MOST_BYTES):
            self._drop_oldest()
        self.wake_all()

    def _forget(self, sequence: int, epoch: int) -> None:
        """Nothing is stored any more up to there, behind what is below the ring: it was purged, or
        is void. Nobody else is to see it."""
        while epoch == self.epoch and self._ring and self._ring[0].sequence <= sequence:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest = self._ring.popleft()
        self._bytes -= oldest.size
        self.low = oldest.sequence

    def start_over(self) -> None:
        self.epoch += 1
        self.low = self.high = self._bytes = 0
        self._ring.clear()
        self.wake_all()

    def tell_caught_up(self) -> None:
        self.over.look(self.wake_all)

    # ---- what watchers ask for ----

    def find_start(self, place: Place) -> int:
        """A cursor from which everything that is new at ``place`` is read, if not more."""
        for entry in reversed(self._ring):
            if entry.is_behind(place):
                return entry.sequence - 1
        return 0

    def list_behind(self, cursor: int) -> list[Entry]:
        """Of the ring, those behind ``cursor``, which is not below ``low``."""
        found: list[Entry] = []
        for entry in reversed(self._ring):
            if entry.sequence <= cursor:
                break
            found.append(entry)
        found.reverse()
        return found

    async def read_behind(self, cursor: int) -> Page:
        """The stored records behind ``cursor``, which is below ``low``: one read for all who stand
        there. Goes on until there is an answer."""
        task = self._pages.get(cursor)
        if task is None:
            task = self._pages[cursor] = asyncio.create_task(self._read_page(cursor))
            task.add_done_callback(lambda _: self._pages.pop(cursor, None))
        return await asyncio.shield(task)

    async def _read_page(self, cursor: int) -> Page:
        delay, epoch = BACKOFF[0], self.epoch
        while epoch == self.epoch:
            low, high = self.low, self.high
            try:
                link = await self._dial()
                if found := await get_behind(link, self.subject, cursor):
                    self._forget(min(high, found[0].sequence - 1), epoch)
                    return Page([Entry(self.run, *each) for each in found], found[-1].sequence)
                # Perhaps a replica that lags behind: only the leader knows.
                following = await find_next(link, self.subject, cursor)
                if following is None or following > low:
                    self._forget(high if following is None else min(high, following - 1), epoch)
                    return Page([], low)
            except (Unavailable, NotReady, LinkLost) as problem:
                log.debug("%s: %s", self.subject, problem)
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF[1])
        return Page([], 0)
