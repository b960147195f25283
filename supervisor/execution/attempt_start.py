"""How an attempt begins: from the start, behind a checkpoint of an earlier one, or not at all."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from ...config.schema import Runner as RunnerConfig
from ...protocol.model import Outcome
from ...protocol.records import End
from ...protocol.subjects import out_subject
from ..output.continuation import Place
from ..output.publisher import Streams
from ..output.writer import Writer
from .registry import Live
from .runners.protocol import Resumption, Runner
from .work import Work

log = logging.getLogger("runctld")


@dataclass(frozen=True, slots=True)
class Start:
    """``adopted``: the run's end, which an earlier attempt had stored. ``refused``: how it ends,
    since it is not to be attempted again; what is stored of its output stays. Else the output
    is open, where ``resumption`` says so behind a checkpoint."""

    adopted: Outcome | None = None
    refused: Outcome | None = None
    resumption: Resumption | None = None


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
    end = (await streams.tail(subject)).record
    if isinstance(end, End):
        return Start(adopted=await writer.open())
    find = partial(streams.find_place, subject, line=await work.has_session(live, runner))
    place = await find() if work.may_continue(live, runner) else None
    if (refused := work.refuse(live, runner, place.attempt if place else 0)) is not None:
        return Start(refused=refused)
    there = await writer.go_on(find, place)
    if isinstance(there, Place):
        log.info("the attempt continues after chunk %d", there.after)
        resumption = Resumption(there.checkpoint, partial(streams.read_valid, there))
        return Start(resumption=resumption)
    return Start(adopted=there or await writer.open())
