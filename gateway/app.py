"""The ASGI application: which request goes where, who may ask, and what errors become."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from ..protocol.errors import RunctlError
from .changes import Changes
from .durable.push_store import PushStore
from .durable.push_streams import PushStreams
from .durable.run_streams import RunStreams
from .events import Events
from .openapi import make_document
from .page_files import PageFiles
from .problems import HttpProblem, answer_error
from .runs import Runs
from .service import Service
from .submit_lines import SubmitLines
from .threads import Threads

log = logging.getLogger("runctl.gateway")


class _Segment(Convertor[str]):
    """One part of a path, decoded by itself: a thread's name may hold slashes."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        try:
            return unquote(value, errors="strict")
        except UnicodeDecodeError:
            raise HttpProblem(400, "bad-request", "the path is not UTF-8; encode it so") from None

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("segment", _Segment())


class Application:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = PageFiles()
        self._router = Router(_make_routes(service), redirect_slashes=False, default=_nothing)
        #: Requests that only read, and have no answer yet.
        self._reading: set[asyncio.Task[Any]] = set()

    def stop(self) -> None:
        """Who waits for a daemon need not wait for the end of this process as well."""
        for task in self._reading:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            return
        started, task = False, asyncio.current_task()
        assert task is not None

        def watched_send(message: Any) -> Awaitable[None]:
            nonlocal started
            if not started:
                started = True
                self._reading.discard(task)
            return send(message)  # no coroutine of its own: it is called for each event

        # Parts are told apart before they are decoded.
        scope["path"] = scope["raw_path"].decode("latin-1")
        scope["app"] = self  # whoever asks with another method is told so by an exception
        request = Request(scope, receive)
        reads = request.method in ("GET", "HEAD")
        if reads:
            self._reading.add(task)
        try:
            self._service.access.check_head(request)
            if (file := self._page.find(request)) is not None:
                self._service.access.admit_anybody(request)
                await file(scope, receive, watched_send)
                return
            scope["runctl.caller"] = self._service.access.admit(request)
            await self._router(scope, receive, watched_send)
        except ClientDisconnect:
            return  # amid its body: there is nobody to answer
        except (Exception, asyncio.CancelledError) as error:
            if started:
                raise
            # Cancelled: by the stop, ours or the server's. This is the outermost frame.
            await _answer_error(error, reads)(scope, receive, watched_send)
        finally:
            self._reading.discard(task)


def _answer_error(error: BaseException, reads: bool) -> Response:
    if isinstance(error, asyncio.CancelledError):
        if reads:
            return answer_error(HttpProblem(503, "unavailable", "the gateway stops; try again"))
        unsure = "the gateway stops; it may have taken effect; try again"
        return answer_error(HttpProblem(504, "unanswered", unsure))
    if isinstance(error, RunctlError):
        return answer_error(error)
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        return answer_error(
            HttpProblem(405, "bad-request", f"allowed here: {allowed}", {"allow": allowed})
        )
    log.error("a request failed", exc_info=error)
    return answer_error(
        HttpProblem(500, "error", f"unexpected {type(error).__name__}: see the gateway's log")
    )


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise HttpProblem(404, "not-found", "nothing is here; what there is: / and /v1/openapi.json")


async def _live(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{kind}.complete"})
        if kind == "shutdown":
            return


def _make_routes(service: Service) -> list[Route]:
    threads, runs, events = Threads(service), Runs(service), Events(service)
    lines, changes = SubmitLines(service), Changes(service)
    store = PushStore(service)
    of_runs, named = RunStreams(service, store), PushStreams(service, store)
    document = make_document()

    async def describe(_: Request) -> Response:
        return Response(document, media_type="application/json")

    thread, run = "/v1/threads/{thread:segment}", "/v1/runs/{run:segment}"
    return [
        _route("/v1/threads", GET=threads.list_threads),
        _route(f"{thread}/runs", GET=threads.list_runs, POST=threads.submit),
        _route(f"{thread}/run", GET=threads.show_current),
        _route(f"{thread}/abort", POST=threads.abort),
        _route(f"{thread}/purge", POST=threads.purge),
        _route(f"{thread}/session", GET=threads.show_session, DELETE=threads.forget_session),
        _route("/v1/runs", POST=lines.submit),
        _route(run, GET=runs.show),
        _route(f"{run}/events", GET=events.of_run),
        _route(f"{run}/stream", GET=of_runs.read, POST=of_runs.append, DELETE=of_runs.delete),
        _route(
            "/v1/stream/{name:path}",
            **{"GET": named.read, "POST": named.append},
            **{"PUT": named.create, "DELETE": named.delete},
        ),
        _route(f"{run}/abort", POST=runs.abort),
        _route(f"{run}/retry", POST=runs.retry),
        _route("/v1/changes", GET=changes.of_threads),
        _route("/v1/status", GET=runs.status),
        _route("/v1/openapi.json", GET=describe),
    ]


def _route(path: str, **by_method: Callable[[Request], Awaitable[Any]]) -> Route:
    """One for all methods of a path, so that another method hears of all of them."""
    return Route(path, _Endpoint(by_method), methods=[*by_method])


class _Endpoint:
    """An ASGI application: as a function, Starlette would put a coroutine around each send."""

    def __init__(self, by_method: dict[str, Callable[[Request], Awaitable[Any]]]) -> None:
        self._by_method = by_method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer = self._by_method["GET" if request.method == "HEAD" else request.method]
        await (await answer(request))(scope, receive, send)
