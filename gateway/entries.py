"""Stored records as they are sent to watchers: decoded once, and put into frames once for all
watchers that stand at the same place."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ..client.events import Event
from ..client.run_state import Place, RunState
from ..protocol import records
from .frames import encode_events
from .tail import is_behind

log = logging.getLogger("runctl.gateway")

#: Frames that are kept of an entry: almost all watchers stand at one place.
MOST_FRAMES = 4
#: What a chunk's frame has beside its data, roughly, in bytes.
AROUND_CHUNK = 160


class Framed(NamedTuple):
    """What an entry says to a watcher, where that stands then, and whether the run is over."""

    data: bytes
    place: Place
    ended: bool


class Entry:
    """A record at ``sequence`` in the stream. ``size``: what it takes in memory, roughly."""

    __slots__ = ("_frames", "_record", "_run", "sequence", "size")

    def __init__(self, run: str, sequence: int, data: bytes) -> None:
        self.sequence = sequence
        self._run = run
        self._frames: dict[Place, Framed] = {}
        self._record: records.Record | None = None
        chunks = 0
        try:
            self._record = records.decode_record(data)
            if isinstance(self._record, records.Chunks | records.Continue):
                chunks = len(self._record.chunks)
        except ValueError as error:
            log.warning("a record of run %s cannot be read: %s", run, error)
        self.size = 2 * len(data) + AROUND_CHUNK * (1 + chunks)

    @property
    def record(self) -> records.Record | None:
        """None of what cannot be read."""
        return self._record

    def is_behind(self, place: Place) -> bool:
        """Whether whoever stands at ``place`` has seen all that was stored before this."""
        return is_behind(self._record, place)

    def frame(self, place: Place) -> Framed:
        found = self._frames.get(place)
        if found is None:
            if len(self._frames) >= MOST_FRAMES:
                del self._frames[next(iter(self._frames))]
            found = self._frames[place] = self._make_frame(place)
        return found

    def _make_frame(self, place: Place) -> Framed:
        if self._record is None:
            return Framed(b"", place, False)
        state, events = RunState(self._run, place), list[Event]()
        state.apply(self._record, events)
        ended = isinstance(self._record, records.End)
        return Framed(encode_events(events, place.attempt), state.place, ended)
