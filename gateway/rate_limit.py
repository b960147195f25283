"""How many requests a second each may make, on average, and how many at once (GCRA: a leaky bucket
that is one number for each who asks)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

#: So many are remembered, each a few hundred bytes. One that is forgotten begins anew: those go
#: first that have asked for nothing for longest.
MOST_KEPT = 10_000


class RateLimit:
    """``rate`` a second, ``burst`` at once. ``clock`` in seconds."""

    def __init__(
        self,
        rate: float,
        burst: int,
        *,
        most_kept: int = MOST_KEPT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pause = 1 / rate
        self._tolerance = (burst - 1) / rate
        self._most_kept = most_kept
        self._clock = clock
        #: When all that was asked for would have been due at ``rate``; the latest to ask are last.
        self._due: OrderedDict[Hashable, float] = OrderedDict()

    def take(self, who: Hashable) -> float:
        """Count a request of ``who``: 0.0; or, where it is one too many and does not count, in how
        many seconds there may be another."""
        now = self._clock()
        due = max(self._due.get(who, now), now)
        if (wait := due - now - self._tolerance) > 1e-9:  # sums of floats
            self._due.move_to_end(who)
            return wait
        self._due[who] = due + self._pause
        self._due.move_to_end(who)
        self._forget(now)
        return 0.0

    def _forget(self, now: float) -> None:
        """Those first in line who may ask for everything again; and what is too many."""
        while self._due:
            if next(iter(self._due.values())) > now and len(self._due) <= self._most_kept:
                return
            self._due.popitem(last=False)
