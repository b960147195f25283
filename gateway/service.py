"""What endpoints work with, and how a request's parts are read."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..client.requests import ask
from ..client.shared_link import SharedLink
from ..config.schema import Config
from ..protocol import json_text, messages
from ..protocol.errors import BadRequest
from ..protocol.model import one_line
from .access import Access
from .change_feed import ChangeFeed
from .hub import Hub
from .problems import HttpProblem
from .tokens import Caller

T = TypeVar("T")
R = TypeVar("R", bound=messages.Reply)

#: Of a request's body: bytes, and seconds until it is there; what is read of one that is larger.
MOST_BODY, BODY_LIMIT, MOST_DROPPED = 4 * 1024 * 1024, 30.0, 32 * 1024 * 1024
_LEAST_LIMIT, _MOST_LIMIT = 1, 500


@dataclass(frozen=True, slots=True)
class Service:
    """``links``: requests to daemons, with patience for one that restarts."""

    config: Config
    links: SharedLink
    hub: Hub
    access: Access
    changes: ChangeFeed

    async def ask(self, caller: Caller, request: messages.Request, expect: type[R]) -> R:
        """As ``requests.ask``. What may have been meant is said only to who may see all threads."""
        reads = messages.verb_of(request) in messages.READING
        return await self.links.use(
            lambda link: ask(link, request, expect, hint=not caller.threads), repeatable=reads
        )


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as JSON."""
    return Response(
        json_text.encode(value),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/json",
    )


def caller_of(request: Request) -> Caller:
    found = request.scope["runctl.caller"]
    assert isinstance(found, Caller)
    return found


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON of a request. Raises BadRequest, HttpProblem."""
    check_content_type(request, "application/json")
    body = await _read_bounded(request)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not as it should be: {one_line(str(error))}") from None


def check_content_type(request: Request, wanted: str) -> None:
    """No page's form can send it. Raises HttpProblem."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != wanted:
        raise HttpProblem(415, "bad-request", f"send the body as Content-Type: {wanted}")


async def _read_bounded(request: Request) -> bytes:
    """Raises HttpProblem."""
    found = await read_bounded(request, MOST_BODY)
    if found is None:
        raise HttpProblem(
            413,
            "limit",
            f"the body has more than {MOST_BODY} bytes; put the data in a file and submit its path",
        )
    return found


async def read_bounded(request: Request, most: int) -> bytes | None:
    """None of one with more than ``most`` bytes, of which all is read: who is still sending does
    not hear us. Raises HttpProblem."""
    kept, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_LIMIT):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    kept += part
                elif size > MOST_DROPPED:
                    break
    except TimeoutError:
        raise HttpProblem(408, "limit", f"the body was not there within {BODY_LIMIT:g} s") from None
    return None if size > most else bytes(kept)


def read_limit(request: Request) -> int:
    return read_whole(request, "limit", _LEAST_LIMIT, _MOST_LIMIT, 100)


def read_whole(request: Request, name: str, least: int, most: int, default: int) -> int:
    """Raises BadRequest."""
    text = read_text(request, name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,16}", text) or not least <= int(text) <= most:
        raise BadRequest(f"{name} must be a whole number from {least} to {most}")
    return int(text)


def read_text(request: Request, name: str) -> str | None:
    """A parameter of the query. Raises BadRequest."""
    given = request.query_params.getlist(name)
    if len(given) > 1:
        raise BadRequest(f"{name} is given more than once")
    return given[0] if given else None


def silent_header(silent: list[messages.ExecutorStatus]) -> Iterator[tuple[str, str]]:
    """Of executors that did not answer, so that their runs' rows may be out of date."""
    if silent:
        names = ", ".join(ascii(executor.executor_id)[1:-1] for executor in silent)
        yield "runctl-silent", names
