"""Events of runs as JSON, an object a line."""

from __future__ import annotations

from ...client.event_json import describe
from ...client.events import Event
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
        value = describe(event)
        if value is None:
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
