"""/v1/runs/RUN, and /v1/status."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..client.suggestions import find_run
from ..client.waiting import wait_for_end
from ..config.units import parse_duration
from ..protocol import messages
from ..protocol.errors import BadRequest, NotFound
from ..protocol.model import check_run_id
from .access import require
from .service import Service, answer, caller_of, read_body, read_text
from .threads import answer_submitted
from .tokens import Caller, Scope

#: One request waits no longer for a run's end, seconds.
MOST_WAIT = 60.0


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """No body, or an empty object."""


class Runs:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def show(self, request: Request) -> Response:
        caller = caller_of(request)
        wait = _read_wait(request)
        found = await self.find(caller, request.path_params["run"], "read", "show")
        if wait and not found.run.status.terminal:
            watching = self._service.access.watch(caller)
            try:
                links = self._service.links
                await wait_for_end(self._service.config, links, found.run, timeout=wait)
            except TimeoutError:
                pass
            finally:
                watching.left()
            found = await self.find(caller, found.run.run, "read", "show")
        return answer(messages.details_json(found))

    async def abort(self, request: Request) -> Response:
        caller = caller_of(request)
        await read_body(request, Nothing)
        found = (await self.find(caller, request.path_params["run"], "operate", "abort")).run
        done = await self._service.ask(
            caller, messages.Abort(found.thread, found.run), messages.Aborted
        )
        return answer({"runs": done.runs})

    async def retry(self, request: Request) -> Response:
        caller = caller_of(request)
        await read_body(request, Nothing)
        found = (await self.find(caller, request.path_params["run"], "submit", "retry")).run
        done = await self._service.ask(caller, messages.Retry(found.run), messages.Submitted)
        return answer_submitted(done)

    async def status(self, request: Request) -> Response:
        caller = caller_of(request)
        require(caller, "read")
        found = await self._service.ask(caller, messages.StatusRequest(), messages.DaemonStatus)
        value = msgspec.to_builtins(found)
        del value["reply"]
        return answer(value)

    async def find(self, caller: Caller, run: str, scope: Scope, verb: str) -> messages.RunDetails:
        """The run, of whose id the beginning is enough for who may see all. Raises as
        ``requests.ask``, and HttpProblem."""
        require(caller, scope)
        if not caller.threads:
            return await self._service.links.use(lambda link: find_run(link, run, verb))
        check_run_id(run)
        found = await self._service.ask(caller, messages.Show(run), messages.RunDetails)
        if not caller.may_see(found.run.thread):
            raise NotFound(f"no run {run!r}; see: runctl list THREAD")
        return found


def _read_wait(request: Request) -> float:
    """Raises BadRequest."""
    text = read_text(request, "wait")
    if text is None:
        return 0.0
    try:
        wait = parse_duration(text)
    except ValueError as error:
        raise BadRequest(f"wait: {error}") from None
    if not 0 <= wait <= MOST_WAIT:
        raise BadRequest(f"wait is at most {MOST_WAIT:g}s; ask again when it is over")
    return wait
