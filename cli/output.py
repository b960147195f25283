"""What ``attach`` prints: JSON events, or a run's output as it was written."""

from __future__ import annotations

import base64
import sys
from typing import Any

import msgspec

from . import watch
from .holdback import HoldBack, Restart, Shown
from .lines import RED, LineMaker, Style
from .render import STDERR, STDOUT, colours, say, write_all
from .screen import Screen, plain
from .statusline import StatusLine

_encode = msgspec.json.Encoder().encode


class Output:
    """Call ``flush`` after each batch of events."""

    def show(self, event: watch.Event) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        """Forget what was not written yet."""
        raise NotImplementedError

    def leave(self) -> None:
        """Give the terminal back as it was before a program's output came to it."""

    def remark(self, text: str) -> None:
        """A line of ours, on stderr."""
        say(text)

    def away(self, text: str | None) -> None:
        """Say, where a terminal can take it back, why nothing comes; None: it comes."""


class JsonOutput(Output):
    """One object a line, as the contract has them."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def show(self, event: watch.Event) -> None:
        value: dict[str, Any]
        if isinstance(event, watch.Chunk):
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
        elif isinstance(event, watch.Reset):
            value = {"type": "reset", "run": event.run, "attempt": event.attempt}
        elif isinstance(event, watch.Gap):
            value = {"type": "gap", "from": event.from_, "to": event.to}
        elif isinstance(event, watch.End):
            value = {
                "type": "end",
                "run": event.run,
                "attempt": event.attempt,
                "status": event.status,
                "exit_code": event.exit_code,
                "error": event.error,
            }
        else:
            return
        self._lines.append(_encode(value))
        if len(self._lines) >= 1000:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            lines.append(b"")
            write_all(STDOUT, b"\n".join(lines))

    def discard(self) -> None:
        self._lines.clear()


class HumanOutput(Output):
    """Bytes as the run wrote them; our own remarks on stderr, each on a line of its own.

    On a terminal a restart that repeats what is on the screen is not shown again.
    ``headers``: name each run before its output (several runs are followed). ``style``:
    print whole lines, dressed so. ``raw``: no colours of ours."""

    def __init__(
        self, headers: bool = False, *, style: Style | None = None, raw: bool = False
    ) -> None:
        self._headers = headers
        self._style = style
        self._makers: dict[tuple[str, str], LineMaker] = {}
        self._holds: dict[str, HoldBack] = {}
        self._raw = raw
        #: Of the runs that are on a terminal themselves, while we are on one.
        self._screens: dict[str, Screen] = {}
        self._cursor_known = True
        self._status = StatusLine()
        self._away: str | None = None
        self._run: str | None = None
        self._fd = STDOUT
        self._pieces: list[bytes] = []
        self._size = 0
        self._at_line_start = True
        self._tty = sys.stdout.isatty()
        self._red = self._tty and not raw and style is None and colours()

    def show(self, event: watch.Event) -> None:
        if not self._tty:
            self._show(event)
        elif isinstance(event, watch.Reset | watch.Chunk | watch.Gap | watch.End):
            if isinstance(event, watch.Reset) and event.tty:
                self._screens.setdefault(event.run, Screen(questions=self._raw))
            hold = self._holds.setdefault(event.run, HoldBack())
            for shown in hold.take(event):
                self._show(shown)
            if hold.recovering is not None:
                self._say_status(f"runctl: run {event.run}: recovering, attempt {hold.recovering}")
            elif self._away is None:
                self._status.clear()

    def away(self, text: str | None) -> None:
        self._away = text
        if text is None:
            self._status.clear()
        else:
            self._say_status(text)

    def _say_status(self, text: str) -> None:
        self.flush()
        self._status.show(
            text,
            mid_line=not (self._at_line_start and self._cursor_known),
            whole_screen=any(screen.alternate for screen in self._screens.values()),
        )

    def _show(self, event: Shown) -> None:
        if isinstance(event, watch.Chunk):
            self._header(event.run)
            data = self._dress(event)
            fd = STDERR if event.stream == "stderr" else STDOUT
            if fd != self._fd or self._size > 65536:
                self.flush()
                self._fd = fd
            self._pieces.append(data)
            self._size += len(data)
        elif isinstance(event, watch.Reset | Restart):
            self._leave(event.run)
            self._finish_lines(event.run)
            self._header(event.run)
            if event.attempt > 1:
                self.remark(
                    f"── runctl: run {event.run} was interrupted;"
                    f" attempt {event.attempt} starts over ──"
                )
        elif isinstance(event, watch.Gap):
            self._header(event.run)
            self.remark(
                f"runctl: chunks {event.from_} to {event.to} of run {event.run}"
                " are no longer stored"
            )
        elif isinstance(event, watch.End):
            self._leave(event.run)
            self._finish_lines(event.run)
            self._header(event.run)
            self.ended(event.run, event.status, event.error)

    def _dress(self, event: watch.Chunk) -> bytes:
        screen = self._screens.get(event.run)
        data = event.data if screen is None else screen.feed(event.data)
        if self._style is None:
            if self._red and event.stream == "stderr":
                return RED[0] + data + RED[1]
            return data
        key = event.run, event.stream
        maker = self._makers.get(key)
        if maker is None:
            maker = self._makers[key] = LineMaker(self._style, red=event.stream == "stderr")
        return maker.feed(data, event.at)

    def _finish_lines(self, run: str) -> None:
        """A last line without its newline is a line as well."""
        for (name, stream), maker in self._makers.items():
            if name == run and (line := maker.flush()):
                self.flush()
                self._fd = STDERR if stream == "stderr" else STDOUT
                self._pieces.append(line)

    def _header(self, run: str) -> None:
        if self._headers and run != self._run:
            self.remark(f"── runctl: run {run} ──")
        self._run = run

    def ended(self, run: str, status: str, error: str | None) -> None:
        why = f": {error}" if error else ""
        if status == "failed":
            self.remark(f"runctl: run {run} failed{why}")
        elif status == "aborted":
            self.remark(f"runctl: run {run} was aborted")
        elif status == "dead":
            self.remark(f"runctl: run {run} is dead{why}; try again: runctl retry {run}")
        elif self._tty:
            self.end_line()

    def remark(self, text: str) -> None:
        self._status.clear()
        self.end_line()
        say(text)

    def end_line(self) -> None:
        """Leave the cursor at the start of a line."""
        self.flush()
        if not self._at_line_start:
            write_all(STDERR, b"\n")
            self._at_line_start = True

    def flush(self) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._size = 0
            if data:
                self._status.clear()
                text = data.removesuffix(RED[1]) if self._red else data
                self._cursor_known = not self._screens or text.endswith(b"\n")
                if self._screens:
                    text = plain(text)
                if text:
                    self._at_line_start = text.endswith(b"\n")
                write_all(self._fd, data)

    def leave(self) -> None:
        for run in self._screens:
            self._leave(run)

    def _leave(self, run: str) -> None:
        screen = self._screens.get(run)
        if screen is not None and (undo := screen.leave()):
            self.flush()
            self._status.clear()
            write_all(STDOUT, undo)

    def discard(self) -> None:
        self._pieces.clear()
        self._size = 0
        self.leave()
