"""Whoever watches may be ended, suspended or interrupted from outside at any moment: the
terminal is given back first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from ..interrupts import interrupt

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Interruptible(Protocol):
    """What must be done with the output."""

    def discard(self) -> None:
        """Forget what was not written yet, and ``leave``."""

    def leave(self) -> None:
        """Give the terminal back as it was."""

    def suspend(self) -> None:
        """Give it back for a while: others write to it now."""

    def resume(self) -> None:
        """Take it again."""

    def remark(self, text: str) -> None:
        """A line of ours, on stderr."""


class EndedBySignal(SystemExit):
    """By this signal. Not an Exception, so that it gets out of everything."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def die(self) -> None:
        """By the signal itself, for whoever waits for us to see."""
        signal.signal(self.number, signal.SIG_DFL)
        signal.raise_signal(self.number)


@contextlib.contextmanager
def handle_signals(output: Interruptible) -> Iterator[None]:
    """SIGTERM and SIGHUP raise EndedBySignal within; Ctrl-Z suspends and goes on as a user expects.
    What our parent ignores, as nohup does, stays ignored."""

    def end(number: int, _: FrameType | None) -> None:
        interrupt(EndedBySignal(number))

    def suspend(number: int, _: FrameType | None) -> None:
        output.suspend()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # stopped here
        signal.signal(number, suspend)
        output.resume()

    wanted = {**dict.fromkeys(ENDING, end), signal.SIGTSTP: suspend}
    free = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in free:
        signal.signal(number, wanted[number])
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
