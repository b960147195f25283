"""Appending to a push run's stream: each record behind the last one, whoever wrote that."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec

from ...client.link import API_TIMEOUT, Link, LinkLost
from ...client.shared_link import SharedLink
from ...client.stream_reader import BACKOFF
from ...protocol import records, subjects
from ...protocol.errors import RunctlError, Unavailable
from ...protocol.push import PushState
from ..problems import HttpProblem
from ..service import Service
from ..tail import Tail, read_next, read_tail

log = logging.getLogger("runctl.gateway")

#: Streams whose last record is known without asking.
MOST_KNOWN = 1000
#: Seconds in which a record is to be stored.
PATIENCE = 5.0
#: JetStream's refusals: something else is last; there is no room.
_NOT_LAST, _FULL = 10071, 10077

Record = records.Chunks | records.End


class Written(NamedTuple):
    """``tail``: the last record by then. ``done``: it is ours; else nothing was to be written."""

    tail: Tail
    done: bool


class _Refused(Exception):
    """Surely not stored: something else was last."""


class _Unknown(Exception):
    """It may be stored."""


Make = Callable[[Tail, PushState, str], Record | None]


class PushLog:
    """``write`` from any number of tasks, and in any number of processes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._known: OrderedDict[str, Tail] = OrderedDict()

    @property
    def _links(self) -> SharedLink:
        return self._service.links

    async def write(self, subject: str, make: Make, *, rollup: bool = False) -> Written:
        """``make`` the record that follows the last one, of that, its state and a nonce; None when
        there is nothing to write. It may be asked again, and raises what refuses the request.
        ``rollup``: what was stored before goes. Raises Unavailable, HttpProblem."""
        nonce, deadline = secrets.token_hex(8), time.monotonic() + PATIENCE
        async with self._turn(subject):
            known, unsure, delay = self._known.get(subject), None, BACKOFF[0]
            while True:
                tail = known or await self.read(subject)
                if unsure is not None and (found := await self._find(subject, unsure, nonce)):
                    return Written(found, True)
                try:
                    record = self._make(make, tail, nonce)
                except RunctlError:
                    if known is None:
                        raise
                    known = None
                    continue
                if record is None:
                    if known is None:
                        return Written(tail, False)
                    known = None
                    continue
                try:
                    sequence = await self._publish(subject, record, tail.sequence, rollup)
                except _Refused:
                    known = None
                except _Unknown as error:
                    if time.monotonic() > deadline:
                        raise Unavailable(f"whether it was stored is not known ({error})") from None
                    known, unsure = None, tail.sequence
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, BACKOFF[1])
                else:
                    return Written(self._note(Tail(subject, sequence, record)), True)

    async def read(self, subject: str) -> Tail:
        """The last record, of a stream that is open, or was. Raises HttpProblem, Unavailable."""
        tail = await self._links.use(lambda link: read_tail(link, subject))
        if tail is None or records.find_push(tail.record) is None:
            raise HttpProblem(404, "not-found", "there is no such stream")
        return tail

    def _make(self, make: Make, tail: Tail, nonce: str) -> Record | None:
        state = records.find_push(tail.record)
        assert state is not None
        return make(tail, state, nonce)

    def _note(self, tail: Tail) -> Tail:
        """Without its content, which nobody needs here."""
        if isinstance(tail.record, records.Chunks):
            behind = tail.record.seq + len(tail.record.chunks)
            tail = tail._replace(record=msgspec.structs.replace(tail.record, seq=behind, chunks=[]))
        self._known[tail.subject] = tail
        self._known.move_to_end(tail.subject)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return tail

    async def _find(self, subject: str, behind: int, nonce: str) -> Tail | None:
        """Ours, if it is stored: what follows the one that it was to follow."""
        found = await self._links.use(lambda link: read_next(link, subject, behind))
        state = None if found is None else records.find_push(found.record)
        return found if state is not None and state.nonce == nonce else None

    async def _publish(self, subject: str, record: Record, expected: int, rollup: bool) -> int:
        """Raises _Refused, _Unknown, HttpProblem, Unavailable."""
        data = records.encode_record(record)
        if len(data) > subjects.LEAST_PAYLOAD - 4096:
            raise too_large(subjects.MAX_RECORD_BYTES)
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(expected),
            records.SUMMARY_HEADER: records.summary(record),
            **({"Nats-Rollup": "sub"} if rollup else {}),
        }
        link = await self._links.reach()
        from nats.errors import NoRespondersError

        try:
            raw = await link.request(subject, data, API_TIMEOUT, headers)
        except (LinkLost, TimeoutError, NoRespondersError) as error:
            raise _Unknown(type(error).__name__) from None
        try:
            reply = msgspec.json.decode(raw)
            refusal = reply.get("error")
        except (ValueError, AttributeError):  # no stream, or it has no leader for the moment
            raise _Unknown("no answer") from None
        if refusal is None:
            return int(reply["seq"])
        if refusal.get("err_code") == _NOT_LAST:
            raise _Refused
        if refusal.get("err_code") == _FULL:
            await self.tell(link, f"+{len(data)}")
            raise HttpProblem(503, "full", "the stream is full; room is being made: try again")
        raise _Unknown(str(refusal.get("description", refusal)))

    async def tell_daemon(self, run: str) -> None:
        """That it has ended. Should nobody hear it, it is seen some time."""
        try:
            await self.tell(await self._links.dial(), run)
        except (Unavailable, LinkLost) as problem:
            log.debug("run %s: %s", run, problem)

    async def tell(self, link: Link, text: str) -> None:
        from nats.errors import Error

        try:
            await link.nc.publish(subjects.PUSHED_SUBJECT, text.encode())
        except (Error, OSError) as problem:
            log.debug("%s: %r", text, problem)

    @asynccontextmanager
    async def _turn(self, subject: str) -> AsyncIterator[None]:
        """Requests of one process wait for each other, or they would refuse each other's."""
        lock, count = self._locks.get(subject, (None, 0))
        lock = lock or asyncio.Lock()
        self._locks[subject] = lock, count + 1
        try:
            async with lock:
                yield
        finally:
            lock, count = self._locks.pop(subject)
            if count > 1:
                self._locks[subject] = lock, count - 1


def too_large(most: int) -> HttpProblem:
    return HttpProblem(413, "limit", f"append at most {most} bytes at once: split it")
