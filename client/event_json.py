"""What events of runs are as JSON: see docs/schema/attach.schema.json."""

from __future__ import annotations

import base64
from typing import Any

from .events import Chunk, Continue, End, Event, Gap, Reset


def describe(event: Event) -> dict[str, Any] | None:
    """None of one that has no JSON."""
    if isinstance(event, Chunk):
        return _describe_chunk(event)
    if isinstance(event, Reset):
        return {"type": "reset", "run": event.run, "attempt": event.attempt}
    if isinstance(event, Continue):
        return {
            "type": "continue",
            "run": event.run,
            "attempt": event.attempt,
            "after": event.after,
        }
    if isinstance(event, Gap):
        return {"type": "gap", "from": event.from_, "to": event.to}
    if isinstance(event, End):
        return _describe_end(event)
    return None


def _describe_chunk(event: Chunk) -> dict[str, Any]:
    value: dict[str, Any] = {
        "type": "chunk",
        "run": event.run,
        "attempt": event.attempt,
        "seq": event.seq,
        "stream": event.stream,
    }
    try:
        value["data"] = event.data.decode()
    except UnicodeDecodeError:
        value["data"] = base64.b64encode(event.data).decode()
        value["encoding"] = "base64"
    return value


def _describe_end(event: End) -> dict[str, Any]:
    value: dict[str, Any] = {
        "type": "end",
        "run": event.run,
        "attempt": event.attempt,
        "status": event.status,
        "exit_code": event.exit_code,
        "error": event.error,
    }
    if event.note is not None:
        value["note"] = event.note
    return value
