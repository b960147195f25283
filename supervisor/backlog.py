"""How many runs may wait: what keeps a submitter that never stops from filling the disk."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from .errors import QueueFull

#: The count is taken anew after this many seconds, and before anybody is refused.
FRESH = 1.0


class Backlog:
    """Runs that wait in the database, known to about a second: counting them all at each
    submit would cost more the more there are. ``count`` tells; ``most`` is how many may."""

    def __init__(self, most: Callable[[], int], count: Callable[[], Awaitable[int]]) -> None:
        self._most = most
        self._count = count
        self._known = most()
        self._counted = 0.0

    async def admit(self) -> None:
        """One more is about to be queued. Raises QueueFull."""
        most = self._most()
        if self._known >= most or time.monotonic() - self._counted > FRESH:
            self._counted = time.monotonic()
            self._known = await self._count()
        if self._known >= most:
            raise QueueFull(
                f"{self._known} runs are queued and queue.max_queued is {most};"
                " submit again when some have run, or raise it"
            )
        self._known += 1
