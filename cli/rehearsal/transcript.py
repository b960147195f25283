"""What a watcher takes for a run's valid output, by what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...client.events import Chunk, Continue, End, Event, Gap, Progress, Reset


class Transcript:
    """Of one run: by its events, and by its records' summaries, which alone tell of checkpoints.
    ``after``: the chunk behind which the attempt continues, None when it starts over. ``stored``:
    how many checkpoints came, of all attempts. ``missing``: how many chunks that are valid never
    did."""

    def __init__(self) -> None:
        self.attempt = 0
        self.after: int | None = None
        self.stored = 0
        self.missing = 0
        self.end: End | None = None
        self._chunks: dict[int, Chunk] = {}
        self._counted = False
        self._changed = asyncio.Event()

    def take(self, event: Event) -> None:
        if isinstance(event, Reset):
            self.attempt, self.after = event.attempt, None
            self._chunks, self.missing = {}, 0
        elif isinstance(event, Continue):
            self.attempt, self.after = event.attempt, event.after
            self._chunks = {n: x for n, x in self._chunks.items() if n <= event.after}
        elif isinstance(event, Chunk):
            self._chunks[event.seq] = event
        elif isinstance(event, Gap):
            self.missing += event.to - event.from_ + 1
        elif isinstance(event, Progress):
            self.stored += event.summary.checkpoint
            self._counted |= event.summary.kind == "end"
        elif isinstance(event, End):
            self.end = event
        self._changed.set()

    async def wait(self, known: Callable[[], bool]) -> None:
        """Until ``known``, or the end of the run."""
        while not known() and not self.over:
            self._changed.clear()
            await self._changed.wait()

    @property
    def over(self) -> bool:
        """Nothing more comes."""
        return self.end is not None and self._counted

    @property
    def chunks(self) -> int:
        """How many there are by now."""
        return max(self._chunks, default=0)

    def read(self) -> dict[str, bytes]:
        """The output on each stream on which there is any."""
        found: dict[str, list[bytes]] = {}
        for _, chunk in sorted(self._chunks.items()):
            found.setdefault(chunk.stream, []).append(chunk.data)
        return {name: b"".join(pieces) for name, pieces in found.items()}
