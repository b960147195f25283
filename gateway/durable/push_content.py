"""What was pushed, as readers of the stream get it: the same bytes, in the same type."""

from __future__ import annotations

import base64
import re

from ...client.events import End
from ...client.run_state import Place
from ...protocol import records
from ..problems import HttpProblem
from ..tail import Tail, find_place
from .content import Told
from .offsets import BEGINNING, Position

JSON = "application/json"
_LINE_END = re.compile(r"\r\n|\r|\n")


class Pushed:
    """Of a stream that was opened in ``epoch``; 0 for the one that will be. A reader at attempt 0
    takes whatever is first."""

    def __init__(self, content_type: str, epoch: int) -> None:
        self.media_type = content_type
        self.epoch = epoch
        kind = content_type.partition(";")[0].strip().lower()
        self.is_json = kind == JSON
        self.event_encoding = None if self.is_json or kind.startswith("text/") else "base64"

    def find_end(self, tail: Tail) -> Position:
        state = records.find_push(tail.record)
        if state is None:
            return BEGINNING
        # An end has no place of its own.
        place = find_place(tail.record)
        if isinstance(tail.record, records.End):
            place = place._replace(expected=place.expected - 1)
        return Position(place, state.last or tail.sequence, state.epoch)

    def is_closed(self, record: records.Record | None) -> bool:
        state = records.find_push(record)
        return isinstance(record, records.End) or (state is not None and state.closing is not None)

    def tell(self, record: records.Record, place: Place) -> Told:
        """Raises HttpProblem: it is not the reader's stream any more."""
        state = records.find_push(record)
        if state is None:
            return Told([], place, False)
        if state.deleted:
            raise HttpProblem(404, "not-found", "the stream was deleted")
        self.epoch = self.epoch or state.epoch
        if state.epoch != self.epoch:
            raise gone("the stream was opened anew")
        if isinstance(record, records.End):
            return Told([], Place(record.attempt, record.chunks + 1), True)
        assert isinstance(record, records.Chunks)
        if place.attempt and record.seq > place.expected:
            raise gone("what comes next is not stored any more")
        seen = max(0, place.expected - record.seq) if place.attempt else 0
        found = [self._strip(chunk.data) for chunk in record.chunks[seen:]]
        behind = max(place.expected, record.seq + len(record.chunks))
        return Told(found, Place(record.attempt, behind), state.closing is not None)

    def _strip(self, data: bytes) -> bytes:
        """Messages are stored as lines, for whoever watches the run."""
        return data.removesuffix(b"\n") if self.is_json else data

    def tell_lost_end(self, end: End, place: Place) -> Told:
        raise gone("the output of the run is not stored any more")

    def encode(self, messages: list[bytes]) -> bytes:
        return b"[%s]" % b",".join(messages) if self.is_json else b"".join(messages)

    def encode_event(self, messages: list[bytes]) -> bytes:
        data = self.encode(messages)
        if self.event_encoding is not None:
            return b"data:%s\n" % base64.b64encode(data)
        text = data.decode(errors="replace")
        lines = _LINE_END.split(text)
        # One space is taken for a separator.
        return "".join(f"data:{' ' * line.startswith(' ')}{line}\n" for line in lines).encode()


def gone(why: str) -> HttpProblem:
    return HttpProblem(410, "gone", f"{why}: begin again, with offset=-1")
