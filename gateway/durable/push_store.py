"""A push run's stream, whatever its address: opened, appended to, read, deleted."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ...client.run_state import Place
from ...protocol import messages, subjects
from ...protocol.errors import RunctlError
from ...protocol.model import Opening
from ...protocol.push import PushState
from ...protocol.records import Reset, find_push
from ..problems import HttpProblem
from ..service import Service
from ..tail import Tail, read_tail
from ..tokens import Caller
from .answers import COMMON, Source, answer_read, read_asked
from .appending import (
    Appending,
    check_there,
    find_position,
    is_closed,
    is_touch_due,
    make_deletion,
    make_end,
    make_touch,
    no_stream,
)
from .offsets import Position
from .push_content import Pushed, gone
from .push_log import PushLog, Written
from .push_requests import Append

#: Seconds that a request waits for the daemon to open the stream, whose turn it may be just now.
OPENING = 1.0
PAUSE, LONGEST = 0.004, 0.1


class Stream(NamedTuple):
    """``tail``: its last record, None before it is open. ``opening``: as it will be then."""

    thread: str
    run: str
    tail: Tail | None
    opening: Opening | None = None

    @property
    def subject(self) -> str:
        return subjects.out_subject(self.thread, self.run)

    @property
    def state(self) -> PushState | None:
        return None if self.tail is None else find_push(self.tail.record)


class PushStore:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._log = PushLog(service)

    async def wait_open(self, stream: Stream) -> Stream:
        """With its tail, if it is open within ``OPENING`` seconds. (A consumer for each stream
        that begins would cost more than some looks.)"""
        end, pause, subject = time.monotonic() + OPENING, PAUSE, stream.subject
        while stream.state is None and time.monotonic() < end:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST)
            tail = await self._service.links.use(lambda link: read_tail(link, subject))
            stream = stream._replace(tail=tail)
        return stream

    async def append(self, caller: Caller, stream: Stream, append: Append) -> Response:
        """Raises BadRequest, HttpProblem, Unavailable."""
        if stream.state is None:
            await self._log.tell_daemon(stream.run)  # its output may have been purged under it
            stream = await self.wait_open(stream)
        if stream.state is None:
            raise await self._refuse_waiting(caller, stream)
        written = await self._log.write(stream.subject, Appending(stream.run, append))
        if append.outcome is not None:
            await self._end(stream)
        return _answer_append(append, written)

    async def _end(self, stream: Stream) -> None:
        """What closes it is stored; should this not be, the daemon does it."""
        await self._log.write(stream.subject, partial(make_end, stream.run))
        await self._log.tell_daemon(stream.run)

    async def delete(self, caller: Caller, stream: Stream) -> None:
        """Raises HttpProblem, Unavailable."""
        if stream.state is None:
            if stream.opening is None and not _is_opening(stream.tail):
                raise no_stream()
            request = messages.Abort(stream.thread, stream.run)
            await self._service.ask(caller, request, messages.Aborted)
            return
        check_there(stream.state, time.time())
        await self.remove(stream)

    async def remove(self, stream: Stream) -> None:
        """In whatever state it is."""
        await self._log.write(stream.subject, partial(make_deletion, stream.run), rollup=True)
        await self._log.tell_daemon(stream.run)

    async def read(self, request: Request, caller: Caller, stream: Stream) -> Response | ASGIApp:
        """Raises BadRequest, HttpProblem, Unavailable."""
        asked = read_asked(request)
        if stream.state is None and _is_opening(stream.tail):
            stream = await self.wait_open(stream)
        state, tail, now = stream.state, stream.tail, time.time()
        if state is None:  # it waits for its turn
            kind = (stream.opening.content_type if stream.opening else None) or "text/plain"
            source = Source(stream.thread, stream.run, Pushed(kind, 0), None)
            return await answer_read(self._service, request, caller, source, asked)
        assert tail is not None
        check_there(state, now)
        if request.method != "HEAD" and is_touch_due(state, now) and not is_closed(tail):
            written = await self._log.write(stream.subject, make_touch)
            tail = await self._log.read(stream.subject) if written.done else tail
        content = Pushed(state.opening.content_type or "", state.epoch)
        headers = _describe_life(state, now)
        source = Source(stream.thread, stream.run, content, tail, headers=headers)
        if asked.position is not None:
            asked = asked._replace(position=_place(asked.position, state, tail))
        return await answer_read(self._service, request, caller, source, asked)

    async def _refuse_waiting(self, caller: Caller, stream: Stream) -> RunctlError:
        """What it waits for."""
        found = await self._service.ask(caller, messages.Locate(stream.thread), messages.RunDetails)
        if found.run.run == stream.run:
            said = found.waits_for
            why = f"it waits for {said}" if said else "no daemon has begun it yet"
        else:
            why = f"run {found.run.run} of its thread is before it, and {found.run.status}"
        return HttpProblem(
            503,
            "waiting",
            f"run {stream.run} has not begun, and takes nothing yet: {why}; try again",
        )


def _is_opening(tail: Tail | None) -> bool:
    return tail is not None and isinstance(tail.record, Reset) and tail.record.push is True


def _place(given: Position, state: PushState, tail: Tail) -> Position:
    """A client's ``given`` position in this stream. Raises HttpProblem."""
    if not given.place.attempt:
        return given._replace(epoch=state.epoch)
    end = find_position(tail)
    if given.place.attempt != state.epoch:
        raise gone("the offset is one of an earlier stream")
    if given.place.expected > end.place.expected:
        raise gone("the offset is behind the end of the stream")
    return Position(Place(end.place.attempt, given.place.expected), given.hint, state.epoch)


def _describe_life(state: PushState, now: float) -> dict[str, str]:
    """How long there will be such a stream."""
    if state.expires is None:
        return {}
    if state.opening.ttl is not None:
        return {"stream-ttl": str(max(0, round(state.expires - now)))}
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(state.expires))
    return {"stream-expires-at": f"{stamp}.{int(state.expires % 1 * 1000):03d}Z"}


def _answer_append(append: Append, written: Written) -> Response:
    tail = written.tail
    headers = {
        **COMMON,
        "cache-control": "no-store",
        "stream-next-offset": find_position(tail).offset,
    }
    if append.outcome is not None or is_closed(tail):
        headers["stream-closed"] = "true"
    state = find_push(tail.record)
    if append.producer is not None and state is not None:
        epoch, number, _ = state.producers.get(
            append.producer.id, (append.producer.epoch, append.producer.number, 0)
        )
        headers |= {"producer-epoch": str(epoch), "producer-seq": str(number)}
        if written.done and append.data:
            return Response(status_code=200, headers=headers)
    return Response(status_code=204, headers=headers)
