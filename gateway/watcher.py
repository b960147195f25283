"""One client that watches a run: where it stands, and what it is sent next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..client.events import End
from ..client.run_state import Place
from .channel import Channel
from .entries import Entry
from .frames import encode_events

#: At least as much is sent at once as this, in bytes, where there is more.
SEND = 64 * 1024


class Watcher:
    """Stands at ``place`` of ``channel``'s run. ``take`` gives what is there without waiting,
    ``fetch`` and ``wait`` go on until there may be more. ``ended``: the run's end was given."""

    def __init__(self, channel: Channel, place: Place, cursor: int = 0) -> None:
        """``cursor``: nothing that is new at ``place`` is stored up to there."""
        self._channel = channel
        self._place = place
        self._epoch = channel.epoch
        self._cursor = max(cursor, channel.find_start(place) if place.attempt else 0)
        self._page: list[Entry] = []
        self._changed = asyncio.Event()
        #: Nothing was sent since the last beat, and since the one before it.
        self._quiet = self._silent = False
        self._asked = False
        self.ended = False

    def wake(self) -> None:
        self._changed.set()

    def clear(self) -> None:
        """What happens from here on ends the next ``wait``."""
        self._changed.clear()

    async def wait(self) -> None:
        await self._changed.wait()

    def beat(self) -> None:
        """Time has passed."""
        if self._quiet:
            self._silent = True
            self.wake()
        self._quiet = True

    def take_beat(self) -> bool:
        """Whether a sign of life is due."""
        due, self._silent = self._silent, False
        return due

    @property
    def stored(self) -> bool:
        """Whether what comes next is to be fetched."""
        channel = self._channel
        self._follow_epoch()
        return channel.opened.is_set() and not self._page and self._cursor < channel.low

    async def fetch(self) -> None:
        page = await self._channel.read_behind(self._cursor)
        if self._epoch == self._channel.epoch:
            self._page, self._cursor = [*page.entries], max(self._cursor, page.cursor)

    def take(self) -> bytes:
        """The frames of what is there, ``SEND`` bytes or a few more; b"" for nothing."""
        parts: list[bytes] = []

        def add(entry: Entry) -> int:
            data, self._place, self.ended = entry.frame(self._place)
            parts.append(data)
            return len(data)

        self._advance(add, SEND)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _advance(self, add: Callable[[Entry], int], most: int) -> None:
        """``add`` what is there, one by one, until that has ``most`` bytes."""
        size = 0
        while size < most and not self.ended and (entries := self._find_next()):
            taken = 0
            for entry in entries:
                size, taken = size + add(entry), taken + 1
                if self.ended or size >= most:
                    break
            if self._page:
                del self._page[:taken]
            else:
                self._cursor = entries[taken - 1].sequence
        self._quiet = self._quiet and not size
        self._channel.ended |= self.ended

    def _find_next(self) -> list[Entry]:
        channel = self._channel
        self._follow_epoch()
        if self._page or not channel.opened.is_set():
            return self._page
        if self._cursor < channel.low or self._cursor == channel.high:
            return []
        return channel.list_behind(self._cursor)

    def _follow_epoch(self) -> None:
        if self._epoch != self._channel.epoch:
            self._epoch, self._cursor, self._page = self._channel.epoch, 0, []

    def take_lost_end(self) -> bytes:
        """``find_lost_end``, as frames; b"" while there is none."""
        end = self.find_lost_end()
        return b"" if end is None else encode_events([end], end.attempt)

    def find_lost_end(self) -> End | None:
        """Where nothing is left to be taken or fetched: what stands for an end that is not
        stored; None while there is none."""
        channel = self._channel
        if not channel.opened.is_set():
            return None
        if not self._asked:
            self._asked = True
            channel.over.look(channel.wake_all)
        end = channel.over.end
        if end is None or channel.high < channel.over.last:
            return None
        self.ended = True
        return end
