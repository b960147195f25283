"""One line at the bottom of the terminal that says what is going on, and vanishes.

Written to stderr, and only when that is a terminal: scripts and logs never see it.
Whoever prints something else calls ``clear`` first.
"""

from __future__ import annotations

import os
import shutil
import sys

from .render import STDERR, colours, cut, printable, write_all


class StatusLine:
    """Shows one text at a time; ``show`` replaces it, ``clear`` takes it away."""

    def __init__(self) -> None:
        self.enabled = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = ""
        self._erase = b""

    def show(self, text: str, *, mid_line: bool = False, whole_screen: bool = False) -> None:
        """``mid_line``: the cursor stands behind output; the text goes one line below.
        ``whole_screen``: a program has all of it; the text goes into its last line."""
        if not self.enabled or text == self._shown:
            return
        self.clear()
        self._shown = text
        width = shutil.get_terminal_size().columns - 1
        line = cut(printable(text), width)
        if colours():
            line = f"\x1b[2m{line}\x1b[0m"
        if whole_screen:
            self._erase = b"\x1b7\x1b[0m\x1b[999;1H\x1b[K\x1b8"
            line = f"\x1b7\x1b[0m\x1b[999;1H{line}\x1b[K\x1b8"
        elif mid_line:  # make sure of a line below, write there, and come back
            self._erase = b"\x1b7\x1b[0m\x1b[1B\r\x1b[K\x1b8"
            line = f"\x1bD\x1b[1A\x1b7\x1b[0m\x1b[1B\r{line}\x1b[K\x1b8"
        else:
            self._erase = b"\r\x1b[K"
            line = f"\r{line}\x1b[K"
        write_all(STDERR, line.encode(errors="replace"))

    def clear(self) -> None:
        if self._shown:
            self._shown = ""
            write_all(STDERR, self._erase)
