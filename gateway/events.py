"""/v1/runs/RUN/events: a run's events, live, from where the client stands."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ..client.run_state import Place
from ..protocol.model import check_run_id
from .access import require
from .event_stream import HEADERS, EventStream
from .frames import read_id
from .run_lookup import find_run
from .service import Service, caller_of, read_text
from .tokens import Caller


class Events:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def of_run(self, request: Request) -> Response | EventStream:
        caller = caller_of(request)
        require(caller, "read")
        run = check_run_id(request.path_params["run"])
        place, over = _read_place(request)
        thread = (await find_run(self._service, caller, run)).thread
        return self._answer(request, caller, thread, run, place, over)

    def _answer(
        self, request: Request, caller: Caller, thread: str, run: str, place: Place, over: bool
    ) -> Response | EventStream:
        if over:  # the word for browsers not to connect again
            return Response(status_code=204, headers={"cache-control": "no-store"})
        if request.method == "HEAD":
            return Response(headers={k.decode(): v.decode() for k, v in HEADERS})
        watching = self._service.access.watch(caller)
        return EventStream(self._service.hub, thread, run, place, watching)


def _read_place(request: Request) -> tuple[Place, bool]:
    """Where the client stands, and whether it has seen the end. What a browser says when it comes
    back counts for more than the address, which stays the same. Raises BadRequest."""
    shown = request.headers.get("last-event-id") or read_text(request, "after")
    return read_id(shown) if shown else (Place(), False)
