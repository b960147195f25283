"""Output as lines: with the thread's name, the time, or only those that match.

Chunks end anywhere; a line is printed once it is whole, so that lines of different
threads and streams never mix.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass

#: A line longer than this is printed in pieces.
MAX_LINE = 64 * 1024
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
    """One stream of one run. ``prefix`` comes before each line, in ``colour`` (SGR)."""

    def __init__(self, style: Style, prefix: str = "", colour: int = 0, red: bool = False):
        self._style = style
        self._red = RED if red and style.colour else None
        self._prefix = paint(prefix, colour, style.colour)
        self._part = bytearray()
        self._at = 0.0

    def feed(self, data: bytes, at: float) -> bytes:
        """The lines that are whole now. ``at``: Unix seconds at which ``data`` came."""
        if not self._part:
            self._at = at
        self._part += data
        if b"\n" not in data and len(self._part) <= MAX_LINE:
            return b""
        return b"".join(self._whole(at))

    def flush(self) -> bytes:
        """What is left, as a line."""
        if not self._part:
            return b""
        line = bytes(self._part)
        self._part.clear()
        return self._dress(line)

    def _whole(self, at: float) -> Iterator[bytes]:
        *lines, rest = bytes(self._part).split(b"\n")
        self._part = bytearray(rest)
        for line in lines:
            yield self._dress(line)
            self._at = at
        if len(rest) > MAX_LINE:
            yield self.flush()

    def _dress(self, line: bytes) -> bytes:
        style = self._style
        if style.grep is not None:
            text = line.decode(errors="replace")
            if style.grep.search(text) is None:
                return b""
            if style.colour:
                marked = style.grep.sub(_mark, text)
                line = marked.encode(errors="replace")
        line = line.removesuffix(b"\r")
        if self._red:
            line = self._red[0] + line + self._red[1]
        stamp = b""
        if style.timestamps:
            stamp = stamped(self._at).encode() + b" "
        return self._prefix + stamp + line + b"\n"


def _mark(match: re.Match[str]) -> str:
    return f"{HIGHLIGHT[0]}{match[0]}{HIGHLIGHT[1]}" if match[0] else ""


def stamped(at: float) -> str:
    """Unix seconds as RFC 3339 UTC with milliseconds."""
    time = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03d}Z"
