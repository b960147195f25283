"""Reading a stream: what is stored, and then what comes."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from ...client.link import Link, NotReady
from ...client.requests import NobodyAnswers
from ...client.stream_reader import BACKOFF
from ...protocol import records
from ..channel import Channel
from ..direct_get import find_next, get_behind
from ..entries import Entry
from ..tail import Tail, is_behind, read_at
from ..watcher import Watcher
from .content import Content
from .offsets import Position

log = logging.getLogger("runctl.gateway")

#: Of one response, and of one event: bytes, and messages. A single record may have more.
MOST_BYTES, MOST_MESSAGES = 1024 * 1024, 1000


@dataclass
class Page:
    """``messages``, and where a reader stands behind them. ``complete``: there was no more.
    ``ended``: the stream is closed there."""

    position: Position
    messages: list[bytes] = field(default_factory=list)
    complete: bool = False
    ended: bool = False
    size: int = 0

    @property
    def full(self) -> bool:
        return self.size >= MOST_BYTES or len(self.messages) >= MOST_MESSAGES

    def add(self, content: Content, record: records.Record | None, sequence: int) -> int:
        """Its size."""
        if record is None:
            return 0
        told = content.tell(record, self.position.place)
        # A record without messages does not move it.
        moved = told.place[:2] != self.position.place[:2]
        hint = sequence if moved else self.position.hint
        self.position = Position(told.place, hint, content.epoch)
        self.ended = told.ended
        self.messages += told.messages
        size = sum(map(len, told.messages))
        self.size += size
        return size


async def find_cursor(link: Link, subject: str, position: Position) -> int:
    """Nothing that is new at ``position`` is stored up to there. Raises Unavailable, LinkLost."""
    if not position.hint:
        return 0
    found = await read_at(link, position.hint)
    if found is None or found.subject != subject or not is_behind(found.record, position.place):
        return 0
    return position.hint - 1


async def read_stored(link: Link, tail: Tail, position: Position, content: Content) -> Page:
    """What is stored behind ``position``, up to ``tail`` at least, or a page of it. Raises
    Unavailable, LinkLost."""
    page = Page(position)
    cursor, delay = await find_cursor(link, tail.subject, position), BACKOFF[0]
    while not page.full and not page.ended:
        if cursor >= tail.sequence:
            page.complete = True
            break
        try:
            found = await get_behind(link, tail.subject, cursor)
            # Perhaps a replica that lags behind: only the leader knows.
            following = None if found else await find_next(link, tail.subject, cursor)
        except NotReady as problem:
            raise NobodyAnswers(f"JetStream does not answer ({problem})") from None
        for each in found:
            page.add(content, Entry(tail.run, *each).record, each.sequence)
            cursor = each.sequence
            if page.full or page.ended:
                break
        if found:
            continue
        if following is None or following > tail.sequence:
            page.complete = True
            break
        await asyncio.sleep(delay)
        delay = min(2 * delay, BACKOFF[1])
    page.complete = page.complete or page.ended or cursor >= tail.sequence
    return page


class Reader(Watcher):
    """Who reads a stream live."""

    def __init__(self, channel: Channel, position: Position, cursor: int, content: Content) -> None:
        super().__init__(channel, position.place, cursor)
        self._content = content
        self._position = position

    def take_page(self) -> Page:
        """What is there without waiting, or the end of a stream that has none stored."""
        page = Page(self._position)

        def add(entry: Entry) -> int:
            size = page.add(self._content, entry.record, entry.sequence)
            self.ended = page.ended
            return MOST_BYTES if page.full else size

        self._advance(add, MOST_BYTES)
        if not page.messages and not self.ended and self.up_to_date:
            end = self.find_lost_end()
            if end is not None:
                told = self._content.tell_lost_end(end, page.position.place)
                page.position = page.position._replace(place=told.place)
                page.messages, page.ended = told.messages, True
        self._position = page.position
        page.complete = self.ended or self.up_to_date
        return page

    @property
    def up_to_date(self) -> bool:
        """Whether all was taken."""
        return self._channel.opened.is_set() and not self.stored and not self._find_next()
