"""How much may wait: what keeps a submitter that never stops from filling the disk."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from ...config.schema import Queue
from ...protocol.errors import QueueFull

#: The count is taken anew after this many seconds, and before anybody is refused.
FRESH = 1.0
#: The bytes after this many: all that waits is read for it. Before anybody is refused for them, if
#: they were not just counted.
FRESH_BYTES = 30.0
MIB = 1024 * 1024


class Backlog:
    """Runs that wait in the database, and their bytes, known to about a second and half a minute:
    counting them all at each submit would cost more the more there are. ``count`` and ``weigh``
    tell; ``limits`` is what holds now."""

    def __init__(
        self,
        limits: Callable[[], Queue],
        count: Callable[[], Awaitable[int]],
        weigh: Callable[[], Awaitable[int]],
    ) -> None:
        self._limits = limits
        self._count = count
        self._weigh = weigh
        self._known = limits().max_queued
        self._counted = 0.0
        self._bytes = 0
        self._weighed = -FRESH_BYTES

    async def admit(self, size: int) -> None:
        """One more is about to be queued, of ``size`` bytes. Raises QueueFull."""
        limits = self._limits()
        most = limits.max_queued
        if self._known >= most or time.monotonic() - self._counted > FRESH:
            self._counted = time.monotonic()
            self._known = await self._count()
        if self._known >= most:
            raise QueueFull(
                f"{self._known} runs are queued and queue.max_queued is {most};"
                " submit again when some have run, or raise it"
            )
        most = limits.max_queued_bytes
        age = time.monotonic() - self._weighed
        if age > FRESH_BYTES or (self._bytes + size > most and age > FRESH):
            self._weighed = time.monotonic()
            self._bytes = await self._weigh()
        if self._bytes + size > most:
            raise QueueFull(
                f"runs of {self._bytes / MIB:.1f} MiB are queued, and one of {size / MIB:.1f} MiB"
                f" is more than queue.max_queued_bytes, {most / MIB:.1f} MiB, has room for; submit"
                " again when some have run, or raise it"
            )
        self._known += 1
        self._bytes += size
