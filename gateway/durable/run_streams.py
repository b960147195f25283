"""/v1/runs/RUN/stream: a run's events as a stream that is only read."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ...client.run_end import make_end
from ...protocol.model import check_run_id
from ..access import require
from ..run_lookup import Found, find_run
from ..service import Service, caller_of
from .answers import Source, answer_read
from .content import RunEvents


class RunStreams:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def read(self, request: Request) -> Response | ASGIApp:
        caller = caller_of(request)
        require(caller, "read")
        run = check_run_id(request.path_params["run"])
        found = await find_run(self._service, caller, run)
        return await answer_read(self._service, request, caller, _make_source(run, found))


def _make_source(run: str, found: Found) -> Source:
    over = found.run is not None and found.run.status.terminal
    lost = make_end(found.run) if over and found.run is not None else None
    return Source(found.thread, run, RunEvents(run), found.tail, lost)
