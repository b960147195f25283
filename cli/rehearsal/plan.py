"""When the machine is lost: at checkpoints, and at random."""

from __future__ import annotations

import random
from collections.abc import Iterator

from .performance import Moment

#: Of an undisturbed performance's time: no kill before it has begun, or after its end.
EARLY, LATE = 0.03, 0.95


def plan_moments(kills: int, checkpoints: int, seconds: float, seed: int) -> list[Moment]:
    """``kills`` moments of one kill each, of a performance that takes ``seconds`` and stores so
    many ``checkpoints``: about half of them right after one, spread over all of them, the first
    and the last among them."""
    rng = random.Random(seed)
    at = min(checkpoints, (kills + 1) // 2)
    moments = [Moment(checkpoints=1 + n * (checkpoints - 1) // max(1, at - 1)) for n in range(at)]
    times = sorted(rng.uniform(EARLY, LATE) * seconds for _ in range(kills - at))
    return moments + [Moment(seconds=x) for x in times]


def plan_many(kills: int, checkpoints: int, seconds: float, seed: int) -> Iterator[Moment]:
    """The same for one performance with all of them, each counted from the attempt's beginning."""
    rng = random.Random(seed + 1)
    for n in range(kills):
        if checkpoints and n % 2 == 0:
            yield Moment(checkpoints=rng.randint(1, max(1, checkpoints // kills)))
        else:
            yield Moment(seconds=rng.uniform(EARLY, LATE) * seconds / kills)
