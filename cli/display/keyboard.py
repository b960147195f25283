"""What comes from the terminal while a run's output may make it speak by itself: mouse
events, answers. Nobody has typed that, and the shell must not get it.

Until then the terminal is left alone: what is typed ahead shows, and is the shell's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import time
from collections.abc import Iterator
from typing import Any

#: How long an answer to the last question may be on its way, in seconds.
LATE = 0.1
_LOCAL = 3  # of what tcgetattr gives


class Keyboard:
    """Of the terminal at ``fd``, which may be open for writing alone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None

    def silence(self) -> None:
        """Show nothing of what comes from now on, and keep it from the shell."""
        if self._before is not None or not self._foreground():
            return
        try:
            before = termios.tcgetattr(self._fd)
            after = list(before)
            after[_LOCAL] = before[_LOCAL] & ~termios.ECHO
            with _block_stop():
                termios.tcsetattr(self._fd, termios.TCSANOW, after)
        except termios.error:
            return
        self._before = list(before)

    def restore(self) -> None:
        """As it was, and without what came meanwhile. Whatever makes the terminal speak has
        been switched off before."""
        before, self._before = self._before, None
        if before is None or not self._foreground():
            return
        with contextlib.suppress(termios.error), _block_stop():
            time.sleep(LATE)
            termios.tcflush(self._fd, termios.TCIFLUSH)
            termios.tcsetattr(self._fd, termios.TCSANOW, before)  # waits for no reader

    def _foreground(self) -> bool:
        """Whether it is ours to change: else a shell has it, and set it as it wants it."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # nobody's controlling terminal, or not ours: no shell to be told
            return True


@contextlib.contextmanager
def _block_stop() -> Iterator[None]:
    """Whoever sets a terminal from the background is stopped: not for a change that came in
    the same moment."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
