"""/v1/stream/NAME: streams by names of their own, each the push runs of a thread."""

from __future__ import annotations

import base64
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ...protocol import messages
from ...protocol.errors import Busy, Refused
from ...protocol.model import Opening, check_thread
from ...protocol.records import find_push
from ..access import require
from ..problems import HttpProblem
from ..service import Service, caller_of, read_bounded
from ..tokens import Caller, Scope
from .answers import COMMON
from .appending import find_position, is_closed, no_stream
from .offsets import BEGINNING
from .push_requests import (
    DEFAULT_TYPE,
    MOST_INITIAL,
    find_most,
    is_same_type,
    read_append,
    read_opening,
    split_messages,
)
from .push_store import PushStore, Stream
from .stream_names import Named, StreamNames

#: So many times it may have been made, or deleted, by others meanwhile.
TRIES = 10


class PushStreams:
    def __init__(self, service: Service, store: PushStore) -> None:
        self._service = service
        self._names = StreamNames(service)
        self._store = store

    async def read(self, request: Request) -> Response | ASGIApp:
        caller, name = self._read_name(request, "read")
        return await self._store.read(request, caller, await self._find(caller, name))

    async def append(self, request: Request) -> Response:
        caller, name = self._read_name(request, "submit")
        append = await read_append(request, find_most(self._service.config))
        return await self._store.append(caller, await self._find(caller, name), append)

    async def delete(self, request: Request) -> Response:
        caller, name = self._read_name(request, "operate")
        await self._store.delete(caller, await self._find(caller, name))
        return Response(status_code=204, headers=COMMON)

    async def create(self, request: Request) -> Response:
        caller, name = self._read_name(request, "submit")
        opening = read_opening(request)
        most = min(MOST_INITIAL, find_most(self._service.config))
        data = await read_bounded(request, most)
        if data is None:
            raise HttpProblem(413, "limit", f"begin with at most {most} bytes, and append the rest")
        initial = split_messages(opening.content_type or DEFAULT_TYPE, data)
        for _ in range(TRIES):
            found = await self._names.find(caller, name)
            if found.exists:
                return _answer_existing(found, opening)
            if found.tail is not None and find_push(found.tail.record) is not None:
                await self._store.remove(_stream_of(found))  # it has expired, and nobody saw it
            made = Named(name, found.number + 1, None, opening)
            try:
                done = await self._service.ask(
                    caller, self._make_submit(request, made, initial), messages.Submitted
                )
            except Refused:  # somebody has made another one
                continue
            if done.status.terminal:  # the same, and it is gone by now
                continue
            stream = await self._store.wait_open(_stream_of(made))
            self._names.note(made)
            return _answer_created(request, stream, opening)
        raise Busy("others make and delete it all the time; try again")

    def _make_submit(self, request: Request, made: Named, initial: list[bytes]) -> messages.Submit:
        return messages.Submit(
            made.name,
            request.headers.get("runctl-runner"),
            made.run,
            push=made.opening,
            initial=[base64.b64encode(one).decode() for one in initial],
        )

    def _read_name(self, request: Request, scope: Scope) -> tuple[Caller, str]:
        """Raises BadRequest, HttpProblem; NotFound of what the caller may not know of."""
        caller = caller_of(request)
        try:
            name = unquote(request.path_params["name"], errors="strict")
        except UnicodeDecodeError:
            raise HttpProblem(400, "bad-request", "the path is not UTF-8; encode it so") from None
        require(caller, scope, check_thread(name))
        return caller, name

    async def _find(self, caller: Caller, name: str) -> Stream:
        found = await self._names.find(caller, name)
        if not found.exists:
            raise no_stream()
        return _stream_of(found)


def _stream_of(found: Named) -> Stream:
    return Stream(found.name, found.run, found.tail, found.opening)


def _answer_existing(found: Named, wanted: Opening) -> Response:
    """Raises HttpProblem, when it is another one."""
    state = None if found.tail is None else find_push(found.tail.record)
    opening = found.opening if state is None else state.opening
    assert opening is not None
    closed = opening.closed if found.tail is None else is_closed(found.tail)
    same = (
        is_same_type(opening.content_type or "", wanted.content_type or ""),
        opening.ttl == wanted.ttl,
        opening.expires == wanted.expires,
        closed == wanted.closed,
    )
    if not all(same):
        raise HttpProblem(
            409,
            "refused",
            "there is such a stream with another Content-Type, Stream-TTL, Stream-Expires-At or"
            " Stream-Closed",
        )
    return _answer(200, found.tail and _stream_of(found), opening, closed, {})


def _answer_created(request: Request, stream: Stream, opening: Opening) -> Response:
    host, path = request.headers["host"], request.scope["raw_path"].decode("latin-1")
    location = {"location": f"{request.scope['scheme']}://{host}{path}"}
    return _answer(201, stream, opening, opening.closed, location)


def _answer(
    status: int, stream: Stream | None, opening: Opening, closed: bool, more: dict[str, str]
) -> Response:
    tail = None if stream is None or stream.state is None else stream.tail
    headers = {
        **COMMON,
        **more,
        "cache-control": "no-store",
        "content-type": opening.content_type or DEFAULT_TYPE,
        "stream-next-offset": (BEGINNING if tail is None else find_position(tail)).offset,
    }
    if closed:
        headers["stream-closed"] = "true"
    return Response(status_code=status, headers=headers)
