"""A run's end, as everybody on this executor hears of it."""

from __future__ import annotations

from typing import NamedTuple

from ...protocol.model import Outcome, RunSpec


class Ended(NamedTuple):
    """``written``: its attempt here has ended its output, which was not found ended. ``stored``:
    the stream has that end by now."""

    spec: RunSpec
    outcome: Outcome
    written: bool
    stored: bool
