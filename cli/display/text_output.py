"""A run's output as it was written, for people: on a terminal or into a pipe."""

from __future__ import annotations

import contextlib
import os
import time

from ...client.events import Chunk, Continue, End, Event, Gap, Reset
from ..common import ReaderGone, WriteFailed
from .harmless_text import Text
from .keyboard import Keyboard
from .lines import RED, LineMaker, Style, paint
from .open_lines import INTERVAL, QUIET, OpenLines
from .output import Label, Output, describe_gap
from .render import STDERR, STDOUT, colours, printable, say, tell, write_all
from .replay_filter import ReplayFilter, Restart, Shown
from .status_line import StatusLine
from .terminal_state import Screen, plain


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
        self._holds: dict[str, ReplayFilter] = {}
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

    def show(self, event: Event) -> None:
        if not self._tty:
            self._show(event)
        elif isinstance(event, Reset | Continue | Chunk | Gap | End):
            hold = self._get_filter(event.run)
            for shown in hold.take(event):
                self._show(shown)
            text = None
            if hold.recovering is not None:
                text = f"runctl: run {event.run}: recovering, attempt {hold.recovering}"
            if text is not None or self._status.get(event.run) is not None:
                self.status(event.run, text)

    def skip(self, chunk: Chunk) -> None:
        if self._tty:
            self._get_filter(chunk.run).take(chunk)

    def _get_filter(self, run: str) -> ReplayFilter:
        return self._holds.setdefault(run, ReplayFilter())

    def status(self, key: str, text: str | None) -> None:
        self.flush()
        self._status.set(key, text, **self._status_place())

    def _status_place(self) -> dict[str, bool]:
        return {
            "mid_line": self._open.drawn or not (self._at_line_start and self._cursor_known),
            "whole_screen": any(screen.alternate for screen in self._screens.values()),
        }

    def _show(self, event: Shown) -> None:
        if isinstance(event, Chunk):
            self._print_header(event.run)
            fd = STDERR if event.stream == "stderr" else STDOUT
            self._add(fd, self._dress_chunk(event, fd))
        elif isinstance(event, Reset | Restart):
            self._finish_run(event.run)
            self._print_header(event.run)
            if event.attempt > 1:
                after = event.after if isinstance(event, Restart) else 0
                self._remark_attempt(event.run, event.attempt, after)
        elif isinstance(event, Continue):
            if event.void:  # else it goes on as if nothing had been
                self._finish_run(event.run)
                self._print_header(event.run)
                self._remark_attempt(event.run, event.attempt, event.after)
        elif isinstance(event, Gap):
            self._print_header(event.run)
            self.remark(f"runctl: {describe_gap(event)} no longer stored")
        elif isinstance(event, End):
            self._finish_run(event.run)
            self._print_header(event.run)
            self.report_end(event.run, event.status, event.error, event.note)

    def _remark_attempt(self, run: str, attempt: int, after: int) -> None:
        how = f"continues after chunk {after}" if after else "starts over"
        self.remark(f"── runctl: run {run} interrupted; attempt {attempt} {how} ──")

    def _add(self, fd: int, data: bytes) -> None:
        if fd != self._fd or self._size > 65536:
            self._write()
            self._fd = fd
        self._pieces.append(data)
        self._size += len(data)

    def _dress_chunk(self, event: Chunk, fd: int) -> bytes:
        data = event.data
        if self._ttys[fd]:
            if event.stream == "text" and not self._raw:
                data = self._texts.setdefault(event.run, Text()).feed(data)
            elif self._style is None:
                screen = self._screens.setdefault(event.run, Screen(self._raw))
                data = screen.feed(data, event.stream)
                data = screen.before + data
                if screen.answered:
                    self._keyboard.silence()
        if self._style is None:
            if self._red and event.stream == "stderr" and data:
                return RED[0] + data + RED[1]
            return data
        return self._make_lines(event.run, event.stream, data, event.at)

    def _make_lines(self, run: str, stream: str, data: bytes, at: float) -> bytes:
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
        return max(0.0, min(self._show_at(key) for key in self._waiting) - now)

    def _show_at(self, key: tuple[str, str]) -> float:
        """When the line without an end is shown: after a short quiet, or after a while."""
        first, last = self._waiting[key]
        return min(last + QUIET, first + INTERVAL)

    def settle(self) -> None:
        now = time.monotonic()
        self._show_open([key for key in self._waiting if self._show_at(key) <= now])
        self.flush()

    def _show_open(self, keys: list[tuple[str, str]]) -> None:
        for key in keys:
            del self._waiting[key]
            maker = self._makers[key]
            if self._open.in_place:
                self._open.put(maker, maker.open())
            else:
                self._add(STDERR if key[1] == "stderr" else STDOUT, maker.open_line())

    def _finish_run(self, run: str) -> None:
        """Nothing more comes of it: a last line without its newline is a line as well."""
        if (text := self._texts.pop(run, None)) is not None and (rest := text.feed(b"", True)):
            self._add(
                STDOUT, rest if self._style is None else self._make_lines(run, "text", rest, 0)
            )
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
        self._restore_terminal(run)

    def _print_header(self, run: str) -> None:
        if self._headers and run != self._run:
            self.remark(f"── runctl: run {run} ──")
        self._run = run

    def report_end(self, run: str, status: str, error: str | None, note: str | None = None) -> None:
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
        self._status.show_again(**self._status_place())

    def end_line(self) -> None:
        """Leave the cursor at the start of a line, where open lines leave it there."""
        self.flush()
        if not self._at_line_start:
            self._status.hide()
            tell(b"\n")
            self._at_line_start = True
            self._status.show_again()

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
                self._status.show_again(**self._status_place())
        elif data:
            self._status.hide()
            self._note_cursor(data)
            write_all(self._fd, data)
            self._status.show_again(**self._status_place())

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
            self._restore_terminal(run)

    def _restore_terminal(self, run: str) -> None:
        screen = self._screens.pop(run, None)
        if screen is not None and (undo := screen.leave()):
            self._write()
            self._restore(undo)
        self._keyboard.restore()

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
        self._keyboard.restore()

    def resume(self) -> None:
        for screen in self._screens.values():
            if screen.answered:
                self._keyboard.silence()
            self._restore(screen.redo())

    def discard(self) -> None:
        self._pieces.clear()
        self._size = 0
        self._waiting.clear()
        self.leave()
