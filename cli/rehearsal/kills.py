"""When kills come, and what came of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

#: A checkpoint is seen when it is stored: the work hears of it a moment later, in which it may
#: be killed as well as after it. Seconds.
MOMENT = 0.02


class AtCheckpoint(msgspec.Struct, frozen=True):
    """``delay`` seconds after checkpoint ``number`` of the run was stored, counted from 1 over
    all attempts."""

    number: int
    delay: float = 0.0


class AfterWork(msgspec.Struct, frozen=True):
    """When the attempt has worked for so many seconds."""

    seconds: float


class Kill(msgspec.Struct):
    """One that was done. ``at``: seconds since the run began. ``chunk``, ``checkpoint``: the last
    that a watcher had by then, 0 for none. ``attempt``: the next one, None when the run had just
    ended. ``after``: the chunk behind which that continued, None when it started over.
    ``void_bytes``: output that it made void."""

    at: float
    chunk: int
    checkpoint: int
    attempt: int | None = None
    after: int | None = None
    void_bytes: int = 0

    @property
    def then(self) -> str:
        """continued, started over or ended."""
        if self.attempt is None:
            return "ended"
        return "started over" if self.after is None else "continued"


def plan_at_checkpoints(there: int, most: int, dice: random.Random) -> list[AtCheckpoint]:
    """At each of the ``there`` that an undisturbed run stores; of more than ``most``, the first,
    the last and some between."""
    if there <= most:
        chosen: Sequence[int] = range(1, there + 1)
    else:
        ends = [1, there][:most]
        chosen = sorted([*ends, *dice.sample(range(2, there), most - len(ends))])
    return [AtCheckpoint(number, dice.uniform(0, MOMENT)) for number in chosen]


def plan_at_random(seconds: float, most: int, dice: random.Random) -> list[AfterWork]:
    """Over the ``seconds`` of work that an undisturbed run takes."""
    moments = sorted(dice.uniform(0, seconds) for _ in range(most))
    return [AfterWork(b - a) for a, b in zip([0.0, *moments], moments, strict=False)]
