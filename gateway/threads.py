"""/v1/threads: lists, submits, aborts and purges."""

from __future__ import annotations

from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..protocol import messages
from ..protocol.model import OnInterrupt, ThreadRow, check_run_id, check_thread
from .access import require
from .service import (
    Service,
    answer,
    caller_of,
    read_body,
    read_limit,
    read_text,
    read_whole,
    silent_header,
)

#: No list goes further.
_MOST_AFTER = 2**53


class SubmitBody(msgspec.Struct, forbid_unknown_fields=True):
    """A run to submit: ``argv``, a command, or ``prompt``. ``id``: a name of one's own for the
    run, with which it is safe to submit it again. ``cwd``: an absolute path on the daemon's
    machine."""

    prompt: str | None = None
    argv: list[str] = []
    runner: str | None = None
    id: str | None = None
    cwd: str | None = None
    on_interrupt: OnInterrupt | None = None


class AbortBody(msgspec.Struct, forbid_unknown_fields=True):
    """``run``: in place of the running one. ``queued``: the queued ones as well."""

    run: str | None = None
    queued: bool = False


class PurgeBody(msgspec.Struct, forbid_unknown_fields=True):
    """``older_than``: only of runs that ended so many seconds ago. ``force``: also while a run is
    in flight."""

    older_than: float | None = None
    force: bool = False


class Threads:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def list_threads(self, request: Request) -> Response:
        caller = caller_of(request)
        require(caller, "read")
        status, limit, after = read_page(request)
        page = await self._service.ask(
            caller, messages.List(None, status, limit, after), messages.Threads
        )
        rows = [row for row in page.threads if caller.may_see(row.thread)]
        return _answer_page(request, rows, page.next, page.silent)

    async def list_runs(self, request: Request) -> Response:
        thread = read_thread(request)
        caller = caller_of(request)
        require(caller, "read", thread)
        status, limit, after = read_page(request)
        page = await self._service.ask(
            caller, messages.List(thread, status, limit, after), messages.Runs
        )
        return _answer_page(request, page.runs, page.next, page.silent)

    async def show_current(self, request: Request) -> Response:
        """The run that is running, else the next, else the last."""
        thread = read_thread(request)
        caller = caller_of(request)
        require(caller, "read", thread)
        found = await self._service.ask(caller, messages.Locate(thread), messages.RunDetails)
        return answer(messages.details_json(found))

    async def submit(self, request: Request) -> Response:
        thread = read_thread(request)
        caller = caller_of(request)
        require(caller, "submit", thread)
        body = await read_body(request, SubmitBody)
        if body.id is not None:
            check_run_id(body.id)
        work = messages.Submit(
            *(thread, body.runner, body.id, body.prompt, body.argv, body.cwd),
            on_interrupt=body.on_interrupt,
        )
        return answer_submitted(await self._service.ask(caller, work, messages.Submitted))

    async def abort(self, request: Request) -> Response:
        thread = read_thread(request)
        caller = caller_of(request)
        require(caller, "operate", thread)
        body = await read_body(request, AbortBody)
        if body.run is not None:
            check_run_id(body.run)
        done = await self._service.ask(
            caller, messages.Abort(thread, body.run, body.queued), messages.Aborted
        )
        return answer({"runs": done.runs})

    async def purge(self, request: Request) -> Response:
        thread = read_thread(request)
        caller = caller_of(request)
        require(caller, "operate", thread)
        body = await read_body(request, PurgeBody)
        done = await self._service.ask(
            caller, messages.Purge([thread], body.older_than, body.force), messages.Purged
        )
        return answer({"runs": done.runs})

    async def show_session(self, request: Request) -> Response:
        return await self._session(request, forget=False)

    async def forget_session(self, request: Request) -> Response:
        return await self._session(request, forget=True)

    async def _session(self, request: Request, *, forget: bool) -> Response:
        thread = read_thread(request)
        caller = caller_of(request)
        require(caller, "operate" if forget else "read", thread)
        found = await self._service.ask(caller, messages.Session(thread, forget), messages.Sessions)
        return answer(found.sessions)


def read_thread(request: Request) -> str:
    """Raises BadRequest."""
    return check_thread(request.path_params["thread"])


def read_page(request: Request) -> tuple[str | None, int, int]:
    """(status, limit, after). Raises BadRequest."""
    after = read_whole(request, "after", 0, _MOST_AFTER, 0)
    return read_text(request, "status"), read_limit(request), after


def answer_submitted(done: messages.Submitted) -> Response:
    value = {"thread": done.thread, "run": done.run, "status": done.status}
    return answer(value, 201, {"location": f"/v1/runs/{done.run}"})


def _answer_page(
    request: Request,
    rows: list[ThreadRow] | list[messages.RunRow],
    following: int | None,
    silent: list[messages.ExecutorStatus],
) -> Response:
    """``following``: where the next page begins."""
    headers = dict(silent_header(silent))
    if following is not None:
        query = {**request.query_params, "after": following}
        headers["link"] = f'<{request.scope["path"]}?{urlencode(query)}>; rel="next"'
    return answer(rows, headers=headers)
