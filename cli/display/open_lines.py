"""Lines of a terminal that have no end yet: prompts, and progress bars.

They stand at its bottom, below all lines that are whole, and are written anew in place. A
terminal that cannot do that ("dumb") gets such a line as it is after a quiet, and again
when there is more of it.
"""

from __future__ import annotations

import os
import re
import shutil

from .lines import LineMaker
from .render import width

#: Seconds without more of it after which a line without an end is shown.
QUIET = 0.3
#: And of one that goes on and on, after so long.
INTERVAL = 1.0

_COLOUR = re.compile("(\x1b\\[[0-9;:]*m)")


class OpenLines:
    """Of one terminal, shared by all who print lines on it."""

    def __init__(self) -> None:
        self._lines: dict[LineMaker, bytes] = {}
        self._drawn = 0
        self._stale = False
        self.in_place = os.environ.get("TERM") != "dumb"

    @property
    def drawn(self) -> bool:
        """Whether the cursor stands behind one."""
        return self._drawn > 0

    @property
    def stale(self) -> bool:
        """Whether what is on the screen is to be drawn again."""
        return self._stale

    def __contains__(self, maker: LineMaker) -> bool:
        return maker in self._lines

    def put(self, maker: LineMaker, line: bytes) -> None:
        """``maker``'s line as it is now; nothing: it has none."""
        if line != self._lines.get(maker, b""):
            self._stale = True
            if line:
                self._lines[maker] = line
            else:
                del self._lines[maker]

    def erase(self) -> bytes:
        """What takes them off the screen, the cursor at the start of a line."""
        rows, self._drawn = self._drawn, 0
        return b"\r" + b"\x1b[A" * (rows - 1) + b"\x1b[J" if rows else b""

    def draw(self) -> bytes:
        """What shows them, where the cursor is; the last ones, where there is no room."""
        self._stale = False
        columns, rows = shutil.get_terminal_size()
        lines = [fit(line, columns - 1) for line in self._lines.values()]
        lines = lines[-max(1, rows - 2) :]
        self._drawn = len(lines)
        return b"\n".join(lines)

    def end(self, *, for_now: bool = False) -> bytes:
        """What leaves them where they are, and the cursor below. ``for_now``: others use the
        terminal; they are drawn again."""
        rows, self._drawn = self._drawn, 0
        if not for_now:
            self._lines.clear()
        self._stale = bool(self._lines)
        return b"\n" if rows else b""


def fit(line: bytes, columns: int) -> bytes:
    """``line``, which has colours and no other sequences, in at most ``columns``."""
    text = line.decode(errors="replace").expandtabs()
    if width(_COLOUR.sub("", text)) <= columns:
        return text.encode()
    out, room = "", columns - 1
    for n, piece in enumerate(_COLOUR.split(text)):
        if n % 2:
            out += piece
            continue
        for character in piece:
            room -= width(character)
            if room < 0:
                return f"{out}\x1b[0m…".encode()
            out += character
    return out.encode()
