"""Where the next attempt of a run can go on: behind the last checkpoint that is stored of it.

What a dead attempt wrote behind its checkpoint is void. Those records are deleted one by one,
then a ``continue`` goes behind the last valid one; so whoever comes late reads valid output
alone. When a crash comes between the two, or messages may not be deleted, the next
attempt finds void records in front of a ``continue``, and passes them over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

from ...protocol.errors import Unavailable
from ...protocol.records import Chunks, Summary
from .inventory import Last, Stored

log = logging.getLogger("runctld.stream")


class Place(NamedTuple):
    """``after``: the last valid chunk. ``total``: bytes of output up to there. ``base``: the
    attempt whose reset all of it follows. ``checkpoint``: what ``attempt`` has stored there.
    ``valid``: stream sequences of the records up to there, ``void`` of those behind it. ``last``:
    the last of all that was looked at."""

    after: int
    total: int
    base: int
    attempt: int
    checkpoint: bytes
    valid: list[int]
    void: list[int]
    last: int


async def find_place(stored: Stored, subject: str) -> Place | None:
    """None: no checkpoint is stored. Raises Unavailable."""
    records: list[Last] = []
    async with stored.lasts(subject, "all") as found:
        while batch := await found.next():
            records += batch
    valid = find_valid(records)
    marked = [x for x in valid if x.summary is not None and x.summary.checkpoint]
    while marked:
        last = marked.pop()
        (record,) = await stored.read([last.sequence])
        if isinstance(record, Chunks) and isinstance(record.checkpoint, bytes):
            return Place(
                record.seq + len(record.chunks) - 1,
                record.total,
                _find_base(valid),
                record.attempt,
                record.checkpoint,
                [x.sequence for x in valid if x.sequence <= last.sequence],
                [x.sequence for x in records if x.sequence > last.sequence],
                records[-1].sequence,
            )
    return None


def find_valid(records: Iterable[Last]) -> list[Last]:
    """Those of a run's ``records``, in order, that no later one has made void."""
    valid: list[Last] = []
    for record in records:
        said = record.summary
        if said is None:
            continue
        if said.kind == "reset":
            valid = []
        elif said.kind == "continue":
            valid = [x for x in valid if _stays(x.summary, said.chunks)]
        valid.append(record)
    return valid


def _stays(summary: Summary | None, after: int) -> bool:
    return summary is not None and summary.chunks <= after


def _find_base(valid: list[Last]) -> int:
    """A run that has lost its head may say so in a later record."""
    for record in valid:
        assert record.summary is not None
        if record.summary.kind == "continue":
            return record.summary.base
        if record.summary.kind == "reset":
            return record.summary.attempt
    return valid[0].summary.attempt if valid and valid[0].summary else 1


async def remove_void(stored: Stored, place: Place) -> None:
    """What cannot be deleted stays, and does no harm but to those who look on through a pipe."""
    try:
        await stored.remove(place.void)
    except Unavailable as error:
        log.warning("void output stays in the stream: %s", error)
