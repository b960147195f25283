"""What a run's records say to readers of its stream."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ...client.event_json import describe
from ...client.events import End, Event
from ...client.run_state import Place, RunState
from ...protocol import json_text, records
from ..tail import Tail, find_place
from .offsets import Position

#: Where the end stands in place of a chunk, when nobody knows how many there were.
LOST = 10**15


class Told(NamedTuple):
    """``messages``, where a reader stands that has them, and whether the stream is closed then."""

    messages: list[bytes]
    place: Place
    ended: bool


class Content(Protocol):
    """``epoch``: which stream it is of several that had the name. ``event_encoding``: what a
    client has to know of the data of events."""

    media_type: str
    epoch: int
    event_encoding: str | None

    def find_end(self, tail: Tail) -> Position:
        """Where a reader stands that has read all up to ``tail``."""
        ...

    def is_closed(self, record: records.Record | None) -> bool:
        """Whether nothing comes behind ``record``."""
        ...

    def tell(self, record: records.Record, place: Place) -> Told:
        """What ``record`` says to a reader at ``place``."""
        ...

    def tell_lost_end(self, end: End, place: Place) -> Told:
        """The same of an ``end`` that is not stored."""
        ...

    def encode(self, messages: list[bytes]) -> bytes:
        """The body of a response."""
        ...

    def encode_event(self, messages: list[bytes]) -> bytes:
        """The data of a server-sent event: lines that begin with "data:"."""
        ...


class RunEvents:
    """A run's events, as ``attach --json`` prints them: JSON, a message each."""

    media_type = "application/json"
    epoch = 0
    event_encoding: str | None = None

    def __init__(self, run: str) -> None:
        self._run = run

    def find_end(self, tail: Tail) -> Position:
        return Position(find_place(tail.record), tail.sequence)

    def is_closed(self, record: records.Record | None) -> bool:
        return isinstance(record, records.End)

    def tell(self, record: records.Record, place: Place) -> Told:
        if isinstance(record, records.End) and place[:2] > (record.attempt, record.chunks + 1):
            return Told([], place, True)
        state, events = RunState(self._run, place), list[Event]()
        state.apply(record, events)
        if isinstance(record, records.End):
            return Told(_encode(events), Place(record.attempt, record.chunks + 2), True)
        return Told(_encode(events), state.place, False)

    def tell_lost_end(self, end: End, place: Place) -> Told:
        if place.expected >= LOST:
            return Told([], place, True)
        return Told(_encode([end]), Place(end.attempt, LOST), True)

    def encode(self, messages: list[bytes]) -> bytes:
        return b"[%s]" % b",".join(messages)

    def encode_event(self, messages: list[bytes]) -> bytes:
        return b"data:[%s]\n" % b",".join(messages)


def _encode(events: list[Event]) -> list[bytes]:
    return [json_text.encode(value) for event in events if (value := describe(event)) is not None]
