"""POST /v1/runs: JSON lines in, JSON lines out, as ``runctl submit --batch``."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from ..client import submit_lines
from ..client.submit_lines import Line
from ..protocol import json_text
from ..protocol.errors import RunctlError
from ..protocol.model import one_line
from .access import require
from .problems import classify
from .service import Service, caller_of, check_content_type
from .tokens import Caller

TYPE = "application/x-ndjson"


class SubmitLines:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def submit(self, request: Request) -> _Answers:
        caller = caller_of(request)
        require(caller, "submit")
        check_content_type(request, TYPE)
        await self._service.links.reach()
        return _Answers(self._service, caller, request)


class _Answers:
    """An ASGI application: the answers, as they come."""

    def __init__(self, service: Service, caller: Caller, request: Request) -> None:
        self._service = service
        self._caller = caller
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(value: object) -> None:
            line = json_text.encode(value) + b"\n"
            await send({"type": "http.response.body", "body": line, "more_body": True})

        def check(line: Line) -> None:
            require(self._caller, "submit", line.thread)

        headers = [(b"content-type", TYPE.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        batch = submit_lines.SubmitLines(
            self._service.links,
            runner=None,
            cwd=None,
            ordered=self._service.config.nats.embedded,
            check=check,
        )
        try:
            await batch.submit(lambda most: submit_lines.split_lines(self._blocks(), most), write)
        except RunctlError as error:
            batch.lost = error
        if isinstance(lost := batch.lost, RunctlError):
            # Lines with an id are submitted once: to send them all again is safe.
            code = classify(lost)[1]
            await write({"error": one_line(str(lost)), "code": code, "line": batch.number + 1})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _blocks(self) -> AsyncIterator[bytes]:
        try:
            async for block in self._request.stream():
                yield block
        except ClientDisconnect:
            raise OSError("the client went away") from None
