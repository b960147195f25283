"""One line at the bottom of the terminal that says what is going on, and vanishes.

Written to stderr, and only when that is a terminal: scripts and logs never see it.
Whoever prints something else calls ``hide`` first, and ``back`` when it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable

from .render import STDERR, colours, cut, printable, tell

#: What takes longer than this many seconds says what it is doing.
PATIENCE = 1.0


class StatusLine:
    """Shows one text at a time: of all keys that have one, the one that came last."""

    def __init__(self) -> None:
        self.enabled = os.isatty(STDERR) and os.environ.get("TERM") != "dumb"
        self._texts: dict[str, str] = {}
        self._shown = ""
        self._erase = b""

    def set(
        self, key: str, text: str | None, *, mid_line: bool = False, whole_screen: bool = False
    ) -> None:
        """Show ``text`` from now on; None: no more. The rest: see ``back``."""
        if text == self._texts.get(key):
            return
        if text is None:
            del self._texts[key]
        else:
            self._texts[key] = text
        self.show_again(mid_line=mid_line, whole_screen=whole_screen)

    def get(self, key: str) -> str | None:
        return self._texts.get(key)

    def show_again(self, *, mid_line: bool = False, whole_screen: bool = False) -> None:
        """Show what is to be shown. ``mid_line``: the cursor stands behind output; the
        text goes one line below. ``whole_screen``: a program has all of it; the text goes
        into its last line."""
        text = next((text for text in reversed(self._texts.values()) if text), "")
        if not self.enabled or text == self._shown:
            return
        self.hide()
        self._shown = text
        if not text:
            return
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
        tell(line.encode(errors="replace"))

    def hide(self) -> None:
        """Take it off the screen, to print something else."""
        if self._shown:
            self._shown = ""
            tell(self._erase)


@contextlib.asynccontextmanager
async def progress(
    say: Callable[[float], str], line: StatusLine | None = None
) -> AsyncIterator[StatusLine]:
    """While the body runs, and once it has run for ``PATIENCE``: ``say(seconds)`` on the
    status line, each second anew."""
    line = line or StatusLine()
    line.set("progress", "")  # below whatever else is to be said
    began = time.monotonic()

    async def tick() -> None:
        while True:
            passed = time.monotonic() - began
            if passed >= PATIENCE:
                line.set("progress", say(passed))
            await asyncio.sleep(PATIENCE)

    ticker = asyncio.create_task(tick()) if line.enabled else None
    try:
        yield line
    finally:
        if ticker is not None:
            ticker.cancel()
        line.set("progress", None)
