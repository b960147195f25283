"""/v1/runs/RUN/stream: a run's events as a stream that is only read; or, of a push run, what was
pushed, and where it is."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ...client.run_end import make_end
from ...protocol.model import check_run_id
from ...protocol.records import Reset, find_push
from ..access import require
from ..problems import HttpProblem
from ..run_lookup import Found, find_run
from ..service import Service, caller_of
from ..tokens import Caller, Scope
from .answers import COMMON, Source, answer_read, read_asked
from .appending import no_stream
from .content import RunEvents
from .push_requests import find_most, read_append
from .push_store import PushStore, Stream


class RunStreams:
    def __init__(self, service: Service, store: PushStore) -> None:
        self._service = service
        self._store = store

    async def read(self, request: Request) -> Response | ASGIApp:
        caller, run, found = await self._find(request, "read")
        if (stream := _find_pushed(run, found)) is not None:
            return await self._store.read(request, caller, stream)
        asked = read_asked(request)
        return await answer_read(self._service, request, caller, _make_source(run, found), asked)

    async def append(self, request: Request) -> Response:
        caller, run, found = await self._find(request, "submit")
        stream = _require_pushed(run, found)
        append = await read_append(request, find_most(self._service.config))
        return await self._store.append(caller, stream, append)

    async def delete(self, request: Request) -> Response:
        caller, run, found = await self._find(request, "operate")
        await self._store.delete(caller, _require_pushed(run, found))
        return Response(status_code=204, headers=COMMON)

    async def _find(self, request: Request, scope: Scope) -> tuple[Caller, str, Found]:
        caller = caller_of(request)
        require(caller, scope)
        run = check_run_id(request.path_params["run"])
        return caller, run, await find_run(self._service, caller, run)


def _find_pushed(run: str, found: Found) -> Stream | None:
    """None of one that does its work itself. Raises HttpProblem."""
    if found.tail is not None:
        first = found.tail.record
        if find_push(first) is None and not (isinstance(first, Reset) and first.push is True):
            return None
        return Stream(found.thread, run, found.tail)
    assert found.details is not None
    if found.details.push is None:
        return None
    if found.details.run.status.terminal:
        raise no_stream()
    return Stream(found.thread, run, None, found.details.push)


def _require_pushed(run: str, found: Found) -> Stream:
    """Raises HttpProblem."""
    stream = _find_pushed(run, found)
    if stream is None:
        raise HttpProblem(
            405,
            "bad-request",
            f"run {run} does its work itself: its output is only read",
            {"allow": "GET, HEAD"},
        )
    return stream


def _make_source(run: str, found: Found) -> Source:
    over = found.details is not None and found.details.run.status.terminal
    lost = make_end(found.details.run) if over and found.details is not None else None
    return Source(found.thread, run, RunEvents(run), found.tail, lost)
