"""Events as server-sent events, and their ids: ``<attempt>.<chunk>``, and ``<attempt>.end``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..client.event_json import describe
from ..client.events import Chunk, Continue, End, Event, Gap
from ..client.run_state import Place
from ..protocol import json_text
from ..protocol.errors import BadRequest

#: Nothing is to be said: proxies and browsers then know that the connection lives.
HEARTBEAT = b":\n\n"
#: To whoever watches when the gateway stops: come back after so many milliseconds.
FAREWELL = b": the gateway is stopping\nretry: 500\n\n"
_ID = re.compile(r"([0-9]{1,15})\.(?:([0-9]{1,15})|end)")


def encode_events(events: Sequence[Event], attempt: int) -> bytes:
    """``attempt``: the one of whoever hears them."""
    frames: list[bytes] = []
    for event in events:
        if (value := describe(event)) is None:
            continue
        attempt = value.get("attempt", attempt)
        parts = _name(event, attempt).encode(), value["type"].encode(), json_text.encode(value)
        frames.append(b"id: %s\nevent: %s\ndata: %s\n\n" % parts)
    return b"".join(frames)


def _name(event: Event, attempt: int) -> str:
    """What a client shows to go on behind ``event``."""
    match event:
        case Chunk():
            return f"{attempt}.{event.seq}"
        case Continue():
            return f"{attempt}.{event.after}"
        case Gap():
            return f"{attempt}.{event.to}"
        case End():
            return f"{attempt}.end"
    return f"{attempt}.0"


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
