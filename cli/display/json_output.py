"""Events of runs as JSON, an object a line."""

from __future__ import annotations

import base64
from typing import Any

from ...client.events import Chunk, Continue, End, Event, Gap, Reset
from ...protocol import json_text
from .output import Output
from .render import STDOUT, write_all


class JsonOutput(Output):
    """One object a line, as docs/schema has them; with several threads each names its
    ``thread`` as well."""

    counts_lines = False

    def __init__(self, thread: str | None = None) -> None:
        self._lines: list[bytes] = []
        self._extra = {} if thread is None else {"thread": thread}

    def show(self, event: Event) -> None:
        value: dict[str, Any]
        if isinstance(event, Chunk):
            value = {
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
        elif isinstance(event, Reset):
            value = {"type": "reset", "run": event.run, "attempt": event.attempt}
        elif isinstance(event, Continue):
            value = {
                "type": "continue",
                "run": event.run,
                "attempt": event.attempt,
                "after": event.after,
            }
        elif isinstance(event, Gap):
            value = {"type": "gap", "from": event.from_, "to": event.to}
        elif isinstance(event, End):
            value = {
                "type": "end",
                "run": event.run,
                "attempt": event.attempt,
                "status": event.status,
                "exit_code": event.exit_code,
                "error": event.error,
            }
            if event.note is not None:
                value["note"] = event.note
        else:
            return
        self._lines.append(json_text.encode(value | self._extra))
        if len(self._lines) >= 1000:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            lines.append(b"")
            write_all(STDOUT, b"\n".join(lines))

    def discard(self) -> None:
        self._lines.clear()
