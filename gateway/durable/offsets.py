"""Where a client of a stream stands: ``<attempt>_<chunk>_<hint>``, each 16 digits.

Attempt and chunk say it all, and rise together; whoever compares offsets as text compares these.
The hint is the sequence at which JetStream has that chunk: reading goes on there without a search,
unless something else is stored there by now.
"""

from __future__ import annotations

import random
import re
import time
from typing import NamedTuple

from ...client.run_state import Place
from ..problems import HttpProblem

NOW = "now"
_OFFSET = re.compile(r"([0-9]{16})_([0-9]{16})_([0-9]{16})")
#: Of cursors, by which caches tell one request of a live reader from the next: an interval in
#: seconds, when the first one began, and how many intervals one is put forward at most.
INTERVAL, EPOCH, JUMP = 20, 1_728_432_000, 180


class Position(NamedTuple):
    """``hint``: where JetStream has what was read last; 0 when that is not known. ``epoch``: of a
    push run's stream, in place of the attempt."""

    place: Place
    hint: int = 0
    epoch: int = 0

    @property
    def offset(self) -> str:
        first = self.epoch or self.place.attempt
        return f"{first:016d}_{self.place.expected - 1:016d}_{self.hint:016d}"


BEGINNING = Position(Place())


def read_offset(text: str) -> Position:
    """Raises HttpProblem."""
    if text == "-1":
        return BEGINNING
    found = _OFFSET.fullmatch(text)
    if found is None:
        raise HttpProblem(
            400,
            "bad-request",
            "offset is not one that was given out; leave it out, or say -1 or now",
        )
    attempt, chunk, hint = map(int, found.groups())
    return Position(Place(attempt, chunk + 1), hint)


def make_cursor(shown: str | None) -> str:
    """The current interval, but always behind the one that the client has shown."""
    now = (int(time.time()) - EPOCH) // INTERVAL
    if shown is None or not re.fullmatch("[0-9]{1,15}", shown) or int(shown) < now:
        return str(now)
    return str(int(shown) + random.randint(1, JUMP))
