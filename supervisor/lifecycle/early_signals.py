"""Signals between the start of the process and its event loop.

As process 1 of a container, a process does not hear a signal that it has no handler for.
Imports take half a second, so this is the first module of all, and imports next to nothing.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGINT)
#: To leave what runs to the next daemon, and to become that daemon.
LEAVE = (signal.SIGUSR1, signal.SIGUSR2)


class Early:
    """The signals of a process that has not begun: it may end at any time."""

    def __init__(self) -> None:
        self.reload = False
        # Under nohup a terminal that closes is none of our business.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self.terminal = not nohup and has_terminal()

    def install(self) -> None:
        for number in STOP:
            signal.signal(number, self._stop)
        for number in LEAVE:
            signal.signal(number, self._ignore)
        signal.signal(signal.SIGHUP, self._note)
        # Blocked by the daemon that became this one, so that none was lost.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP, *LEAVE, signal.SIGHUP))

    def _stop(self, number: int, _: FrameType | None) -> None:
        os.write(2, f"runctld: {signal.Signals(number).name}: stopped before it began\n".encode())
        os._exit(0)

    def _ignore(self, _number: int, _: FrameType | None) -> None:
        """It starts already."""

    def _note(self, _number: int, _: FrameType | None) -> None:
        self.reload = True


def has_terminal() -> bool:
    """Whether this session has a terminal; none any more when its window was closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
