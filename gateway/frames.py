"""Events as server-sent events, and their ids: ``<attempt>.<chunk>``, and ``<attempt>.end``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..client.event_json import describe
from ..client.events import Chunk, Continue, End, Event, Gap, Reset
from ..client.run_state import Place
from ..protocol import json_text
from ..protocol.errors import BadRequest

#: Nothing is to be said: proxies and browsers then know that the connection lives.
HEARTBEAT = b":\n\n"
#: To whoever watches when the gateway stops: come back after so many milliseconds.
FAREWELL = b": the gateway is stopping\nretry: 500\n\n"
_ID = re.compile(r"([0-9]{1,15})\.(?:([0-9]{1,15})|end)")


def encode_events(events: Sequence[Event]) -> bytes:
    return b"".join(map(_encode, events))


def _encode(event: Event) -> bytes:
    value = describe(event)
    if value is None:
        return b""
    line = json_text.encode(value)
    name = _name(event)
    mark = b"" if name is None else b"id: %s\n" % name.encode()
    return b"%sevent: %s\ndata: %s\n\n" % (mark, value["type"].encode(), line)


def _name(event: Event) -> str | None:
    """What a client shows to go on behind ``event``. A gap has none: the chunk behind it has."""
    match event:
        case Chunk():
            return f"{event.attempt}.{event.seq}"
        case Reset():
            return f"{event.attempt}.0"
        case Continue():
            return f"{event.attempt}.{event.after}"
        case End():
            return f"{event.attempt}.end"
        case Gap():
            return None
    return None


def read_id(text: str) -> tuple[Place, bool]:
    """Where the client that shows ``text`` stands, and whether it has seen the run's end.
    Raises BadRequest."""
    found = _ID.fullmatch(text)
    if found is None:
        raise BadRequest(
            "after, or Last-Event-ID, is not the id of an event; give back one that was sent,"
            " such as 1.17, or leave it out"
        )
    attempt, chunk = int(found[1]), int(found[2] or 0)
    return Place(attempt, chunk + 1), found[2] is None
