"""The whole terminal, while ``top`` has it: cbreak mode, the alternate screen, no cursor."""

from __future__ import annotations

import os
import sys
import termios
import tty
from collections.abc import Sequence

from rich.console import Console, Group
from rich.text import Text

from ..display import render

STDIN = 0


class Screen:
    """``take`` and ``leave`` in turns; ``leave`` puts back what was there before."""

    def __init__(self) -> None:
        self._before = termios.tcgetattr(STDIN)
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._console = Console(
            force_terminal=True,
            no_color=not render.colours(),
            highlight=False,
            markup=False,
            emoji=False,
        )
        self.taken = False

    def size(self) -> tuple[int, int]:
        """(columns, lines); of the terminal itself, for COLUMNS does not follow it."""
        try:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            columns, lines = 0, 0
        return columns or 80, lines or 24

    def take(self) -> None:
        self.cbreak()
        self.taken = True
        self._console.set_alt_screen(True)
        self._console.show_cursor(False)

    def cbreak(self) -> None:
        """Keys come one by one, unseen; Ctrl-C and Ctrl-Z stay signals."""
        tty.setcbreak(STDIN, termios.TCSADRAIN)

    def leave(self) -> None:
        try:
            if self.taken:
                self._console.show_cursor(True)
                self._console.set_alt_screen(False)
        finally:
            self.taken = False
            termios.tcsetattr(STDIN, termios.TCSADRAIN, self._before)

    def draw(self, lines: Sequence[Text]) -> None:
        """Show ``lines``, no more than ``size`` has, in place of what was there."""
        columns, height = self.size()
        options = self._console.options.update_dimensions(columns, height)
        group = Group(*(Text.assemble(line, no_wrap=True, end="\n") for line in lines))
        self._console.update_screen(group, options=options)
