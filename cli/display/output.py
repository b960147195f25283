"""What ``attach`` prints: JSON events, or a run's output as it was written."""

from __future__ import annotations

import base64
import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from ...client import consumer
from ...protocol import json_text
from ..common import ReaderGone, WriteFailed
from .harmless_text import Text
from .keyboard import Keyboard
from .lines import RED, LineMaker, Style, paint
from .open_lines import INTERVAL, QUIET, OpenLines
from .render import STDERR, STDOUT, colours, printable, say, tell, write_all
from .replay_filter import HoldBack, Restart, Shown
from .status_line import StatusLine
from .terminal_state import Screen, plain


class Output:
    """Call ``flush`` after each batch of events."""

    #: Whether what is shown is a matter of lines, or of chunks.
    counts_lines = True
    #: Whether it is a terminal, that a program's output may use as one.
    has_screen = False

    def show(self, event: consumer.Event) -> None:
        raise NotImplementedError

    def skip(self, chunk: consumer.Chunk) -> None:
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

    def due(self) -> float | None:
        """In how many seconds to ``settle``, if nothing comes before; None: nothing waits."""
        return None

    def settle(self) -> None:
        """Show what was kept in the hope that more of it comes."""

    def remark(self, text: str) -> None:
        """A line of ours, on stderr."""
        say(text)

    def status(self, key: str, text: str | None) -> None:
        """Say, where a terminal can take it back, what is going on; None: no more."""


class JsonOutput(Output):
    """One object a line, as docs/schema has them; with several threads each names its
    ``thread`` as well."""

    counts_lines = False

    def __init__(self, thread: str | None = None) -> None:
        self._lines: list[bytes] = []
        self._extra = {} if thread is None else {"thread": thread}

    def show(self, event: consumer.Event) -> None:
        value: dict[str, Any]
        if isinstance(event, consumer.Chunk):
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
        elif isinstance(event, consumer.Reset):
            value = {"type": "reset", "run": event.run, "attempt": event.attempt}
        elif isinstance(event, consumer.Gap):
            value = {"type": "gap", "from": event.from_, "to": event.to}
        elif isinstance(event, consumer.End):
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


@dataclass(frozen=True)
class Label:
    """What is put before each line of one of several threads. ``colour``: SGR code."""

    text: str
    colour: int


def lost(gap: consumer.Gap) -> str:
    """A gap in words, with its size and the verb."""
    count = gap.to - gap.from_ + 1
    if count == 1:
        return f"1 chunk ({gap.from_}) of run {gap.run} is"
    return f"{count} chunks ({gap.from_} to {gap.to}) of run {gap.run} are"


class HumanOutput(Output):
    """Bytes as the run wrote them; our own remarks on stderr, each on a line of its own.

    Into a pipe or a file they go unchanged. At a terminal a chat's text is text (``Text``), a
    command's output may use the terminal, which is given back (``Screen``), and lines are
    lines (``OpenLines``); a restart that repeats what is on the screen is not shown again.

    ``headers``: name each run before its output (several runs are followed). ``style``:
    print whole lines, dressed so. ``raw``: no colours of ours, and no other changes.
    ``label``: one of several threads, whose lines it tells apart; they share a ``line`` for
    what is going on and ``open_lines``."""

    def __init__(
        self,
        headers: bool = False,
        *,
        style: Style | None = None,
        raw: bool = False,
        label: Label | None = None,
        line: StatusLine | None = None,
        open_lines: OpenLines | None = None,
    ) -> None:
        self._headers = headers
        self._ttys = {fd: os.isatty(fd) for fd in (STDOUT, STDERR)}
        self._tty = self.has_screen = self._ttys[STDOUT]
        if label is not None and style is None:
            style = Style(colour=self._tty and colours())
        self._style = style
        self._label = label
        self._makers: dict[tuple[str, str], LineMaker] = {}
        #: Lines without an end that are not on the screen as they are: since when, and when
        #: more of them came last (monotonic).
        self._waiting: dict[tuple[str, str], tuple[float, float]] = {}
        self._open = open_lines or OpenLines()
        self._texts: dict[str, Text] = {}
        self._holds: dict[str, HoldBack] = {}
        self._raw = raw
        self._screens: dict[str, Screen] = {}
        self._keyboard = Keyboard(STDOUT if self._tty else STDERR)
        self._cursor_known = True
        self._status = line or StatusLine()
        self._run: str | None = None
        self._fd = STDOUT
        self._pieces: list[bytes] = []
        self._size = 0
        self._at_line_start = True
        self._red = self._ttys[STDERR] and not raw and style is None and colours()

    def show(self, event: consumer.Event) -> None:
        if not self._tty:
            self._show(event)
        elif isinstance(event, consumer.Reset | consumer.Chunk | consumer.Gap | consumer.End):
            hold = self._hold(event.run)
            for shown in hold.take(event):
                self._show(shown)
            text = None
            if hold.recovering is not None:
                text = f"runctl: run {event.run}: recovering, attempt {hold.recovering}"
            if text is not None or self._status.get(event.run) is not None:
                self.status(event.run, text)

    def skip(self, chunk: consumer.Chunk) -> None:
        if self._tty:
            self._hold(chunk.run).take(chunk)

    def _hold(self, run: str) -> HoldBack:
        return self._holds.setdefault(run, HoldBack())

    def status(self, key: str, text: str | None) -> None:
        self.flush()
        self._status.set(key, text, **self._where())

    def _where(self) -> dict[str, bool]:
        return {
            "mid_line": self._open.drawn or not (self._at_line_start and self._cursor_known),
            "whole_screen": any(screen.alternate for screen in self._screens.values()),
        }

    def _show(self, event: Shown) -> None:
        if isinstance(event, consumer.Chunk):
            self._header(event.run)
            fd = STDERR if event.stream == "stderr" else STDOUT
            self._add(fd, self._dress(event, fd))
        elif isinstance(event, consumer.Reset | Restart):
            self._finish(event.run)
            self._header(event.run)
            if event.attempt > 1:
                self.remark(
                    f"── runctl: run {event.run} interrupted;"
                    f" attempt {event.attempt} starts over ──"
                )
        elif isinstance(event, consumer.Gap):
            self._header(event.run)
            self.remark(f"runctl: {lost(event)} no longer stored")
        elif isinstance(event, consumer.End):
            self._finish(event.run)
            self._header(event.run)
            self.ended(event.run, event.status, event.error, event.note)

    def _add(self, fd: int, data: bytes) -> None:
        if fd != self._fd or self._size > 65536:
            self._write()
            self._fd = fd
        self._pieces.append(data)
        self._size += len(data)

    def _dress(self, event: consumer.Chunk, fd: int) -> bytes:
        data = event.data
        if self._ttys[fd]:
            if event.stream == "text" and not self._raw:
                data = self._texts.setdefault(event.run, Text()).feed(data)
            elif self._style is None:
                screen = self._screens.setdefault(event.run, Screen(self._raw))
                data = screen.feed(data, event.stream)
                data = screen.before + data
                if screen.answered:
                    self._keyboard.hush()
        if self._style is None:
            if self._red and event.stream == "stderr" and data:
                return RED[0] + data + RED[1]
            return data
        return self._lines(event.run, event.stream, data, event.at)

    def _lines(self, run: str, stream: str, data: bytes, at: float) -> bytes:
        assert self._style is not None
        key = run, stream
        terminal = self._ttys[STDERR if stream == "stderr" else STDOUT]
        maker = self._makers.get(key)
        if maker is None:
            label = self._label or Label("", 0)
            maker = self._makers[key] = LineMaker(
                self._style, label.text, label.colour, red=stream == "stderr", terminal=terminal
            )
        lines = maker.feed(data, at)
        if terminal:
            if lines:
                self._open.put(maker, b"")
            now = time.monotonic()
            self._waiting[key] = self._waiting.get(key, (now, now))[0], now
        return lines

    def due(self) -> float | None:
        if not self._waiting:
            return None
        now = time.monotonic()
        return max(0.0, min(self._when(key) for key in self._waiting) - now)

    def _when(self, key: tuple[str, str]) -> float:
        """When the line without an end is shown: after a short quiet, or after a while."""
        first, last = self._waiting[key]
        return min(last + QUIET, first + INTERVAL)

    def settle(self) -> None:
        now = time.monotonic()
        self._show_open([key for key in self._waiting if self._when(key) <= now])
        self.flush()

    def _show_open(self, keys: list[tuple[str, str]]) -> None:
        for key in keys:
            del self._waiting[key]
            maker = self._makers[key]
            if self._open.in_place:
                self._open.put(maker, maker.open())
            else:
                self._add(STDERR if key[1] == "stderr" else STDOUT, maker.open_line())

    def _finish(self, run: str) -> None:
        """Nothing more comes of it: a last line without its newline is a line as well."""
        if (text := self._texts.pop(run, None)) is not None and (rest := text.feed(b"", True)):
            self._add(STDOUT, rest if self._style is None else self._lines(run, "text", rest, 0))
        for key in [key for key in self._makers if key[0] == run]:
            maker = self._makers.pop(key)
            fd = STDERR if key[1] == "stderr" else STDOUT
            self._waiting.pop(key, None)
            self._open.put(maker, b"")
            self._add(fd, maker.flush())
        if (screen := self._screens.get(run)) is not None:
            for stream, fd in (("stdout", STDOUT), ("stderr", STDERR)):
                if rest := screen.rest(stream):
                    self._add(fd, rest)
        self._leave(run)

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
        elif self._tty and self._label is None:
            self.end_line()

    def remark(self, text: str) -> None:
        self.end_line()
        self._status.hide()
        lines = self._ttys[STDERR]
        if lines:
            tell(self._open.erase())
        if self._label is None:
            say(text)
        else:
            prefix = paint(self._label.text, self._label.colour, self._ttys[STDERR] and colours())
            tell(prefix + f"{printable(text)}\n".encode(errors="replace"))
        if lines:
            tell(self._open.draw())
        self._status.back(**self._where())

    def end_line(self) -> None:
        """Leave the cursor at the start of a line, where open lines leave it there."""
        self.flush()
        if not self._at_line_start:
            self._status.hide()
            tell(b"\n")
            self._at_line_start = True
            self._status.back()

    def flush(self) -> None:
        # What is at the bottom of the screen already is brought up to date at once.
        self._show_open([key for key in self._waiting if self._makers[key] in self._open])
        self._write()
        if self._open.stale:
            self._fd = STDOUT if self._tty else STDERR
            self._write()

    def _write(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        if self._style is not None and self._ttys[self._fd]:
            if data or self._open.stale:
                self._status.hide()
                write_all(self._fd, self._open.erase() + data + self._open.draw())
                self._status.back(**self._where())
        elif data:
            self._status.hide()
            self._note_cursor(data)
            write_all(self._fd, data)
            self._status.back(**self._where())

    def _note_cursor(self, data: bytes) -> None:
        text = data.removesuffix(RED[1]) if self._red else data
        moved = any(screen.moved for screen in self._screens.values())
        self._cursor_known = not moved or text.endswith(b"\n")
        if self._screens:
            text = plain(text)
        if text:
            self._at_line_start = text.endswith(b"\n")

    def leave(self) -> None:
        self._restore(self._open.end())
        for run in list(self._screens):
            self._leave(run)

    def _leave(self, run: str) -> None:
        screen = self._screens.pop(run, None)
        if screen is not None and (undo := screen.leave()):
            self._write()
            self._restore(undo)
        self._keyboard.give_back()

    def _restore(self, data: bytes) -> None:
        """What the terminal needs, wherever the run wrote to it."""
        if not data:
            return
        self._status.hide()
        with contextlib.suppress(ReaderGone, WriteFailed):  # it may have gone
            write_all(STDOUT if self._tty else STDERR, data)

    def suspend(self) -> None:
        self._restore(self._open.end(for_now=True))
        for screen in self._screens.values():
            self._restore(screen.undo())
        self._keyboard.give_back()

    def resume(self) -> None:
        for screen in self._screens.values():
            if screen.answered:
                self._keyboard.hush()
            self._restore(screen.redo())

    def discard(self) -> None:
        self._pieces.clear()
        self._size = 0
        self._waiting.clear()
        self.leave()
