"""The last N lines, or chunks, of what is stored, found while it goes by."""

from __future__ import annotations

import collections

import msgspec

from ...client.events import Chunk
from .replay_filter import LIMIT


class Tail:
    """``lines``: count lines (a last one without its newline is one), else chunks.

    What is left out is kept as well, as far as a terminal remembers it for comparing it
    with a replay."""

    def __init__(self, count: int, lines: bool) -> None:
        self._count = count
        self._lines = lines
        self.clear()

    def clear(self) -> None:
        """A new attempt begins."""
        self._kept: collections.deque[Chunk] = collections.deque()
        self._units = 0
        self._left_out: list[Chunk] = []
        self._left_size = 0

    def void(self, run: str, after: int) -> None:
        """Chunks of ``run``, the last one, beyond ``after`` are void."""
        while self._kept and self._kept[-1].run == run and self._kept[-1].seq > after:
            self._units -= self._size(self._kept.pop())
        while self._left_out and self._left_out[-1].run == run and self._left_out[-1].seq > after:
            self._left_size -= len(self._left_out.pop().data)

    def add(self, chunk: Chunk) -> None:
        self._kept.append(chunk)
        self._units += self._size(chunk)
        # With lines, one newline more than wanted: the first line may have begun before.
        most = self._count + 1 if self._lines else self._count
        while self._kept and self._units - self._size(self._kept[0]) >= most:
            first = self._kept.popleft()
            self._units -= self._size(first)
            self._leave_out(first)

    def _size(self, chunk: Chunk) -> int:
        return chunk.data.count(b"\n") if self._lines else 1

    def _leave_out(self, chunk: Chunk) -> None:
        self._left_size += len(chunk.data)
        if self._left_size > LIMIT:
            self._left_out.clear()
        else:
            self._left_out.append(chunk)

    def take(self) -> tuple[list[Chunk], list[Chunk]]:
        """(what is left out, what is to be shown), in order. Ends the search."""
        kept = list(self._kept)
        if self._lines and kept:
            whole = kept[-1].data.endswith(b"\n")
            kept = self._cut(kept, self._units - self._count + (0 if whole else 1))
        left_out = self._left_out
        self.clear()
        return left_out, kept

    def _cut(self, kept: list[Chunk], newlines: int) -> list[Chunk]:
        """``kept`` from behind its ``newlines``th newline on."""
        while kept and newlines > 0:
            chunk = kept.pop(0)
            here = self._size(chunk)
            if here >= newlines:
                at = 0
                for _ in range(newlines):
                    at = chunk.data.index(b"\n", at) + 1
                rest = msgspec.structs.replace(chunk, data=chunk.data[at:])
                chunk = msgspec.structs.replace(chunk, data=chunk.data[:at])
                if rest.data:
                    kept.insert(0, rest)
            self._leave_out(chunk)
            newlines -= here
        return kept
