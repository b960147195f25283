"""Where the next attempt of a run can go on: behind the last checkpoint that is stored of it.

What a dead attempt wrote behind its checkpoint is void. A ``continue`` record says so, and then
the void ones are deleted one by one; so whoever comes late reads valid output alone. When a
crash comes between the two, or messages may not be deleted, the next attempt finds void
records in front of a ``continue``, and passes them over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal, NamedTuple

from ...protocol.errors import Unavailable
from ...protocol.records import Chunk, Chunks, Continue, Reset, Summary
from .inventory import Last, Stored

log = logging.getLogger("runctld.stream")

#: Records whose contents are searched for the end of a line.
MOST_LOOKED_AT = 32

#: Behind what an attempt goes on: a checkpoint; one, or else a line; a character.
Unit = Literal["checkpoint", "line", "character"]


class Place(NamedTuple):
    """``after``: the last valid chunk. ``total``: bytes of output up to there. ``base``: the
    attempt whose reset all of it follows. ``checkpoint``: what ``attempt`` has stored there; None
    and 0, when it is but the end of a line; None and who has written it, of a reply. ``valid``:
    stream sequences of the records up to there, ``void`` of all others. ``last``: the last of all
    that was looked at. ``chunks``: what is valid of the first void one."""

    after: int
    total: int
    base: int
    attempt: int
    checkpoint: bytes | None
    valid: list[int]
    void: list[int]
    last: int
    chunks: list[Chunk]


async def find_place(stored: Stored, subject: str) -> Place | None:
    """None: no checkpoint is stored. Raises Unavailable."""
    records = await _read_summaries(stored, subject)
    valid = find_valid(records)
    marked = [x for x in valid if x.summary is not None and x.summary.checkpoint]
    while marked:
        last = marked.pop()
        (record,) = await stored.read([last.sequence])
        if isinstance(record, Chunks) and isinstance(record.checkpoint, bytes):
            after = record.seq + len(record.chunks) - 1
            place = _place(records, valid, last.sequence, after, record.total, [])
            return place._replace(attempt=record.attempt, checkpoint=record.checkpoint)
    return None


async def find_end(
    stored: Stored, subject: str, unit: Literal["line", "character"]
) -> Place | None:
    """Behind the last complete ``unit``, of lines on stdout or of characters in a reply; behind
    everything, where there is none, or none that ends among the last ``MOST_LOOKED_AT`` records.
    None: nothing is stored. Raises Unavailable."""
    records = await _read_summaries(stored, subject)
    valid = find_valid(records)
    if not valid:
        return None
    measure = _measure_lines if unit == "line" else _measure_characters
    latest = valid[-MOST_LOOKED_AT:]
    found = await stored.read([x.sequence for x in latest])
    behind = False  # whether one without its end is behind what is looked at
    for at in range(len(latest) - 1, -1, -1):
        record = found[at]
        if not isinstance(record, Chunks | Continue):
            if behind and isinstance(record, Reset):
                return _place(records, valid, latest[at].sequence, 0, 0, [])
            continue
        for index in range(len(record.chunks) - 1, -1, -1):
            chunk = record.chunks[index]
            end = measure(chunk.data)
            if chunk.stream == "stderr" or not (behind or chunk.data):
                continue
            by = record.attempt if unit == "character" else 0
            if end == len(chunk.data) and not behind:
                return _place_behind_all(records, valid)._replace(attempt=by)
            behind = True
            if end:
                kept = [*record.chunks[:index], Chunk(chunk.stream, chunk.data[:end])]
                first = record.seq if isinstance(record, Chunks) else record.after + 1
                total = record.total
                if isinstance(record, Chunks):
                    total -= sum(len(x.data) for x in record.chunks)
                before = latest[at].sequence - 1
                place = _place(records, valid, before, first - 1, total, kept)
                return place._replace(attempt=by)
    return _place_behind_all(records, valid)


def _measure_lines(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _measure_characters(data: bytes) -> int:
    """Where the last whole character ends: a long text is stored in pieces, cut anywhere."""
    for back in range(1, min(len(data), 3) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first of a character
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return len(data) - back if back < length else len(data)
    return len(data)


def _place_behind_all(records: list[Last], valid: list[Last]) -> Place:
    said = valid[-1].summary
    assert said is not None
    after = said.chunks + said.own
    return _place(records, valid, valid[-1].sequence, after, said.total, [])


def _place(
    records: list[Last], valid: list[Last], sequence: int, after: int, total: int, kept: list[Chunk]
) -> Place:
    """``sequence``: what is stored up to there stays, as far as it is valid, or none of ours."""
    stay = [x.sequence for x in valid if x.sequence <= sequence]
    stays = set(stay)
    void = [
        x.sequence
        for x in records
        if x.sequence > sequence or (x.sequence not in stays and x.summary is not None)
    ]
    base = _find_base(valid)
    return Place(after, total, base, 0, None, stay, void, records[-1].sequence, kept)


async def _read_summaries(stored: Stored, subject: str) -> list[Last]:
    records: list[Last] = []
    async with stored.lasts(subject, "all") as found:
        while batch := await found.next():
            records += batch
    return records


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
    return summary is not None and summary.chunks + summary.own <= after


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
