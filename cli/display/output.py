"""What prints the events of runs; ``text_output`` and ``json_output`` are the two that do."""

from __future__ import annotations

from dataclasses import dataclass

from ...client.events import Chunk, Event, Gap
from .render import say


class Output:
    """Call ``flush`` after each batch of events."""

    #: Whether what is shown is a matter of lines, or of chunks.
    counts_lines = True
    #: Whether it is a terminal, that a program's output may use as one.
    has_screen = False

    def show(self, event: Event) -> None:
        raise NotImplementedError

    def skip(self, chunk: Chunk) -> None:
        """A chunk that is not to be shown, but belongs to the reply."""

    def flush(self) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        """Forget what was not written yet."""
        raise NotImplementedError

    def leave(self) -> None:
        """Give the terminal back as it was before a program's output came to it."""

    def suspend(self) -> None:
        """The same for a while, and from a signal handler: nothing is flushed."""

    def resume(self) -> None:
        """The terminal is the program's again."""

    def due(self) -> float | None:
        """In how many seconds to ``settle``, if nothing comes before; None: nothing waits."""
        return None

    def settle(self) -> None:
        """Show what was kept in the hope that more of it comes."""

    def remark(self, text: str) -> None:
        """A line of ours, on stderr."""
        say(text)

    def status(self, key: str, text: str | None) -> None:
        """Say, where a terminal can take it back, what is going on; None: no more."""


@dataclass(frozen=True)
class Label:
    """What is put before each line of one of several threads. ``colour``: SGR code."""

    text: str
    colour: int


def describe_gap(gap: Gap) -> str:
    """A gap in words, with its size and the verb."""
    count = gap.to - gap.from_ + 1
    if count == 1:
        return f"1 chunk ({gap.from_}) of run {gap.run} is"
    return f"{count} chunks ({gap.from_} to {gap.to}) of run {gap.run} are"
