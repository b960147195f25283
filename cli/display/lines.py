"""Output as lines: with the thread's name, the time, or only those that match.

Chunks end anywhere; a line is printed once it is whole, so that lines of different
threads and streams never mix. At a terminal a line is what it looks like when it is over
(``picture``), and one that does not end is shown as well, by ``OpenLines``.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .picture import Colours, draw, visible

#: A line longer than this is printed in pieces.
MAX_LINE = 64 * 1024
#: Of a line that is written over again and again, what was written over is forgotten then.
MUCH = 4 * 1024
HIGHLIGHT = "\x1b[1;31m", "\x1b[0m"
RED = b"\x1b[31m", b"\x1b[39m"


@dataclass(frozen=True)
class Style:
    """How a line is dressed. ``grep``: only lines in which it is found."""

    timestamps: bool = False
    grep: re.Pattern[str] | None = None
    colour: bool = False


def paint(text: str, colour: int, on: bool) -> bytes:
    data = text.encode(errors="replace")
    return b"\x1b[%dm%s\x1b[0m" % (colour, data) if on and data else data


class LineMaker:
    """One stream of one run. ``prefix`` comes before each line, in ``colour`` (SGR).
    ``terminal``: what it is for carries out control sequences."""

    def __init__(
        self,
        style: Style,
        prefix: str = "",
        colour: int = 0,
        red: bool = False,
        terminal: bool = False,
    ):
        self._style = style
        self._red = RED if red and style.colour else None
        self._prefix = paint(prefix, colour, style.colour)
        self._terminal = terminal
        self._colours = Colours()
        self._part = bytearray()
        self._at = 0.0
        #: What ``open_line`` gave last.
        self._shown: bytes | None = None

    def feed(self, data: bytes, at: float) -> bytes:
        """The lines that are whole now. ``at``: Unix seconds at which ``data`` came."""
        if not self._part or (self._terminal and b"\r" in data.removesuffix(b"\r\n")):
            self._at = at
        self._part += data
        if self._terminal and len(self._part) > MUCH:
            self._shorten()
        if b"\n" not in data and len(self._part) <= MAX_LINE:
            return b""
        return b"".join(self._whole(at))

    def _shorten(self) -> None:
        """Forget what the line's last carriage return has it write over."""
        begin = self._part.rfind(b"\n") + 1
        end = len(self._part)
        while end > begin and self._part[end - 1] == 13:
            end -= 1
        last = self._part.rfind(b"\r", begin, end)
        if last >= 0:
            del self._part[begin : last + 1]

    def flush(self) -> bytes:
        """What is left, as a line."""
        if not self._part:
            return b""
        line = bytes(self._part)
        self._part.clear()
        return self._line(line)

    def open(self) -> bytes:
        """The line that has no end yet, as it is to be shown, without a newline; nothing when
        there is none, or it does not match."""
        line = bytes(self._part)
        return (self._dress(line, self._colours.copy()) if line else None) or b""

    def open_line(self) -> bytes:
        """The same as a line, on a screen that cannot take it back; once."""
        line = self.open()
        if not line or line == self._shown:
            return b""
        self._shown = line
        return line + b"\n"

    def _whole(self, at: float) -> Iterator[bytes]:
        *lines, rest = bytes(self._part).split(b"\n")
        self._part = bytearray(rest)
        for line in lines:
            yield self._line(line)
            self._at = at
        if len(rest) > MAX_LINE:
            yield self.flush()

    def _line(self, line: bytes) -> bytes:
        dressed = self._dress(line, self._colours)
        shown, self._shown = self._shown, None
        return b"" if dressed is None or dressed == shown else dressed + b"\n"

    def _dress(self, line: bytes, colours: Colours) -> bytes | None:
        """None: it is not one of those that are looked for."""
        style = self._style
        line = line.removesuffix(b"\r")
        text = draw(line, colours) if self._terminal else None
        if style.grep is not None:
            seen = visible(line)
            if style.grep.search(seen) is None:
                return None
            if style.colour:
                text = style.grep.sub(_mark, seen)
        if text is not None:
            line = text.encode(errors="replace")
        if self._red:
            line = self._red[0] + line + self._red[1]
        stamp = b""
        if style.timestamps:
            stamp = stamped(self._at).encode() + b" "
        return self._prefix + stamp + line


def _mark(match: re.Match[str]) -> str:
    return f"{HIGHLIGHT[0]}{match[0]}{HIGHLIGHT[1]}" if match[0] else ""


def stamped(at: float) -> str:
    """Unix seconds as RFC 3339 UTC with milliseconds."""
    time = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03d}Z"
