"""How an attempt begins: from the start, behind a checkpoint of an earlier one, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from ...config.schema import Runner as RunnerConfig
from ...protocol.model import Outcome
from ...protocol.records import Chunks, Continue, End, Record, Reset
from ...protocol.subjects import out_subject
from ..output.continuation import Place
from ..output.publisher import Streams
from ..output.writer import Writer
from ..queue.attempt_log import AttemptNote
from .registry import Live
from .runners.protocol import Resumption, Runner
from .work import Work

log = logging.getLogger("runctld")


@dataclass(frozen=True, slots=True)
class Start:
    """``adopted``: the run's end, which an earlier attempt had stored. ``refused``: how it ends,
    since it is not to be attempted again; what is stored of its output stays. Else the output
    is open, where ``resumption`` says so behind a checkpoint. ``notes``: what is known by now of
    this attempt and the one before."""

    adopted: Outcome | None = None
    refused: Outcome | None = None
    resumption: Resumption | None = None
    notes: Sequence[AttemptNote] = ()


async def open_output(
    streams: Streams,
    work: Work,
    live: Live,
    writer: Writer,
    runner: tuple[RunnerConfig, Runner] | None,
) -> Start:
    """Raises Fenced."""
    if live.attempt == 1:
        return Start(adopted=await writer.open())
    subject = out_subject(live.spec.thread, live.spec.run)
    last = (await streams.tail(subject)).record
    if isinstance(last, End):
        return Start(adopted=await writer.open())
    past = await work.list_past(live)
    died = await _note_death(streams, subject, live, past, last)
    place, unit = None, await work.find_unit(live, runner)
    find = partial(streams.find_place, subject, unit or "checkpoint")
    if unit is not None:
        place = await find()
    since = place.attempt if place else 0
    refused = work.refuse(live, runner, since, _count_deaths(live, since, past))
    if refused is not None:
        return Start(refused=refused, notes=died)
    if place is not None and unit == "character" and not (place.after or place.chunks):
        place = None  # it has nothing to go on from
    there = await writer.go_on(find, place)
    void = _count_bytes(last)
    if isinstance(there, Place):
        log.info("the attempt continues after chunk %d", there.after)
        total = there.total + sum(len(chunk.data) for chunk in there.chunks)
        resumption = Resumption(there.checkpoint, partial(streams.read_valid, there), total)
        void -= total
        begun = _note_begin(live, writer, there.after + len(there.chunks), void)
        return Start(resumption=resumption, notes=[*died, begun])
    adopted = there or await writer.open()
    begun = _note_begin(live, writer, None, void)
    return Start(adopted=adopted, notes=died if adopted else [*died, begun])


def _count_deaths(live: Live, since: int, past: Sequence[AttemptNote]) -> int:
    """In how many attempts behind ``since`` its daemon has died. One of which nothing is known
    has met such an end."""
    stopped = {note.attempt for note in past if note.cause == "stopped"}
    return sum(n not in stopped for n in range(since + 1, live.attempt))


async def _note_death(
    streams: Streams, subject: str, live: Live, past: Sequence[AttemptNote], last: Record | None
) -> list[AttemptNote]:
    """What is known of the attempt before, unless it was stopped. ``last``: its last record."""
    run, before = live.spec.run, live.attempt - 1
    known = next((note for note in past if note.attempt == before), None)
    if known is not None and known.cause == "stopped":
        return []
    ended = int(last.at * 1000) if last is not None and last.attempt == before else None
    note = AttemptNote(run=run, attempt=before, ended=ended, cause="died")
    if known is None or not known.began:
        first = last if isinstance(last, Reset) else await streams.find_first(subject)
        if isinstance(first, Reset) and first.attempt == before:
            began, where = int(first.at * 1000), first.executor or None
            note = msgspec.structs.replace(note, began=began, executor=where)
    return [note]


def _note_begin(live: Live, writer: Writer, after: int | None, void: int) -> AttemptNote:
    return AttemptNote(
        run=live.spec.run,
        attempt=live.attempt,
        executor=writer.executor,
        began=int(writer.began * 1000),
        after=after,
        void=max(0, void),
    )


def _count_bytes(last: Record | None) -> int:
    """Of output, up to and with ``last``."""
    if isinstance(last, Chunks):
        return last.total
    if isinstance(last, Continue):
        return last.total + sum(len(chunk.data) for chunk in last.chunks)
    return 0
