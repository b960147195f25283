"""One line at the bottom of the terminal that says what is going on, and vanishes.

Written to stderr, and only when that is a terminal: scripts and logs never see it.
Whoever prints something else calls ``clear`` first.
"""

from __future__ import annotations

import os
import shutil
import sys

from .render import STDERR, cut, printable, write_all


class StatusLine:
    """Shows one text at a time; ``show`` replaces it, ``clear`` takes it away."""

    def __init__(self) -> None:
        self.enabled = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = ""

    def show(self, text: str) -> None:
        """Expects the cursor at the start of a line, or the previous text."""
        if not self.enabled or text == self._shown:
            return
        self._shown = text
        width = shutil.get_terminal_size().columns - 1
        line = cut(printable(text), width)
        if "NO_COLOR" not in os.environ:
            line = f"\x1b[2m{line}\x1b[0m"
        write_all(STDERR, f"\r{line}\x1b[K".encode(errors="replace"))

    def clear(self) -> None:
        if self._shown:
            self._shown = ""
            write_all(STDERR, b"\r\x1b[K")
