"""What ``attach`` prints: JSON events, or a run's output as it was written."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from . import watch
from .holdback import HoldBack, Restart, Shown
from .lines import RED, LineMaker, Style, paint
from .render import STDERR, STDOUT, colours, printable, say, write_all
from .screen import Screen, plain
from .statusline import StatusLine

_encode = msgspec.json.Encoder().encode


class Output:
    """Call ``flush`` after each batch of events."""

    #: Whether what is shown is a matter of lines, or of chunks.
    counts_lines = True
    #: Whether it is a terminal, that a program's output may use as one.
    has_screen = False

    def show(self, event: watch.Event) -> None:
        raise NotImplementedError

    def skip(self, chunk: watch.Chunk) -> None:
        """A chunk that is not to be shown, but belongs to the reply."""

    def flush(self) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        """Forget what was not written yet."""
        raise NotImplementedError

    def leave(self) -> None:
        """Give the terminal back as it was before a program's output came to it."""

    def suspend(self) -> None:
        """The same for a while, and from a signal handler: nothing is flushed."""

    def resume(self) -> None:
        """The terminal is the program's again."""

    def remark(self, text: str) -> None:
        """A line of ours, on stderr."""
        say(text)

    def status(self, key: str, text: str | None) -> None:
        """Say, where a terminal can take it back, what is going on; None: no more."""


class JsonOutput(Output):
    """One object a line, as the contract has them; with several threads each names its
    ``thread`` as well."""

    counts_lines = False

    def __init__(self, thread: str | None = None) -> None:
        self._lines: list[bytes] = []
        self._extra = {} if thread is None else {"thread": thread}

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
            if event.note is not None:
                value["note"] = event.note
        else:
            return
        self._lines.append(_encode(value | self._extra))
        if len(self._lines) >= 1000:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            lines.append(b"")
            write_all(STDOUT, b"\n".join(lines))

    def discard(self) -> None:
        self._lines.clear()


@dataclass(frozen=True)
class Label:
    """What is put before each line of one of several threads. ``colour``: SGR code."""

    text: str
    colour: int


def lost(gap: watch.Gap) -> str:
    """A gap in words, with its size and the verb."""
    count = gap.to - gap.from_ + 1
    if count == 1:
        return f"1 chunk ({gap.from_}) of run {gap.run} is"
    return f"{count} chunks ({gap.from_} to {gap.to}) of run {gap.run} are"


class HumanOutput(Output):
    """Bytes as the run wrote them; our own remarks on stderr, each on a line of its own.

    On a terminal a restart that repeats what is on the screen is not shown again.
    ``headers``: name each run before its output (several runs are followed). ``style``:
    print whole lines, dressed so. ``raw``: no colours of ours. ``label``: one of several
    threads, whose lines it tells apart; they share a ``line`` for what is going on."""

    def __init__(
        self,
        headers: bool = False,
        *,
        style: Style | None = None,
        raw: bool = False,
        label: Label | None = None,
        line: StatusLine | None = None,
    ) -> None:
        self._headers = headers
        self._tty = self.has_screen = sys.stdout.isatty()
        if label is not None and style is None:
            style = Style(colour=self._tty and colours())
        self._style = style
        self._label = label
        self._makers: dict[tuple[str, str], LineMaker] = {}
        self._holds: dict[str, HoldBack] = {}
        self._raw = raw
        #: Of the runs that are on a terminal themselves, while we are on one.
        self._screens: dict[str, Screen] = {}
        self._cursor_known = True
        self._status = line or StatusLine()
        self._run: str | None = None
        self._fd = STDOUT
        self._pieces: list[bytes] = []
        self._size = 0
        self._at_line_start = True
        self._red = self._tty and not raw and style is None and colours()

    def show(self, event: watch.Event) -> None:
        if not self._tty:
            self._show(event)
        elif isinstance(event, watch.Reset | watch.Chunk | watch.Gap | watch.End):
            if isinstance(event, watch.Reset) and event.tty:
                self._screens.setdefault(event.run, Screen(questions=self._raw))
            hold = self._hold(event.run)
            for shown in hold.take(event):
                self._show(shown)
            text = None
            if hold.recovering is not None:
                text = f"runctl: run {event.run}: recovering, attempt {hold.recovering}"
            if text is not None or self._status.get(event.run) is not None:
                self.status(event.run, text)

    def skip(self, chunk: watch.Chunk) -> None:
        if self._tty:
            self._hold(chunk.run).take(chunk)

    def _hold(self, run: str) -> HoldBack:
        return self._holds.setdefault(run, HoldBack())

    def status(self, key: str, text: str | None) -> None:
        self.flush()
        self._status.set(key, text, **self._where())

    def _where(self) -> dict[str, bool]:
        return {
            "mid_line": not (self._at_line_start and self._cursor_known),
            "whole_screen": any(screen.alternate for screen in self._screens.values()),
        }

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
                    f"── runctl: run {event.run} interrupted;"
                    f" attempt {event.attempt} starts over ──"
                )
        elif isinstance(event, watch.Gap):
            self._header(event.run)
            self.remark(f"runctl: {lost(event)} no longer stored")
        elif isinstance(event, watch.End):
            self._leave(event.run)
            self._finish_lines(event.run)
            self._header(event.run)
            self.ended(event.run, event.status, event.error, event.note)

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
            label = self._label or Label("", 0)
            maker = self._makers[key] = LineMaker(
                self._style, label.text, label.colour, red=event.stream == "stderr"
            )
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

    def ended(self, run: str, status: str, error: str | None, note: str | None = None) -> None:
        if note:
            self.remark(f"runctl: run {run}: {note}")
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
        self.end_line()
        self._status.hide()
        if self._label is None:
            say(text)
        else:
            prefix = paint(self._label.text, self._label.colour, sys.stderr.isatty() and colours())
            write_all(STDERR, prefix + f"{printable(text)}\n".encode(errors="replace"))
        self._status.back()

    def end_line(self) -> None:
        """Leave the cursor at the start of a line."""
        self.flush()
        if not self._at_line_start:
            self._status.hide()
            write_all(STDERR, b"\n")
            self._at_line_start = True
            self._status.back()

    def flush(self) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._size = 0
            if data:
                self._status.hide()
                text = data.removesuffix(RED[1]) if self._red else data
                self._cursor_known = not self._screens or text.endswith(b"\n")
                if self._screens:
                    text = plain(text)
                if text:
                    self._at_line_start = text.endswith(b"\n")
                write_all(self._fd, data)
                self._status.back(**self._where())

    def leave(self) -> None:
        for run in self._screens:
            self._leave(run)

    def _leave(self, run: str) -> None:
        screen = self._screens.get(run)
        if screen is not None and (undo := screen.leave()):
            self.flush()
            self._status.hide()
            write_all(STDOUT, undo)

    def suspend(self) -> None:
        for screen in self._screens.values():
            write_all(STDOUT, screen.undo())

    def resume(self) -> None:
        for screen in self._screens.values():
            write_all(STDOUT, screen.redo())

    def discard(self) -> None:
        self._pieces.clear()
        self._size = 0
        self.leave()
