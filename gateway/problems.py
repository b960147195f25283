"""Errors as ``application/problem+json`` (RFC 9457), with the texts that the command line has."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from starlette.responses import Response

from ..protocol import json_text
from ..protocol.errors import (
    Away,
    BadRequest,
    Busy,
    Denied,
    NotFound,
    NotGone,
    QueueFull,
    Refused,
    RequestError,
    RunctlError,
    Unavailable,
)
from ..protocol.model import one_line

TYPE = "application/problem+json"
#: The first that an error is a kind of. Away: nothing was done; else it may have been.
STATUS: tuple[tuple[type[RunctlError], int, str], ...] = (
    (Away, 503, "unavailable"),
    (Unavailable, 504, "unanswered"),
    (BadRequest, 400, BadRequest.code),
    (NotFound, 404, NotFound.code),
    (NotGone, 409, NotGone.code),
    (QueueFull, 429, QueueFull.code),
    (Busy, 503, Busy.code),
    (Denied, 403, "denied"),
    (Refused, 409, Refused.code),
    (RequestError, 502, RequestError.code),
)
#: Seconds after which it makes sense to try again.
RETRY = {429: "1", 503: "1"}


class HttpProblem(RunctlError):
    """What only HTTP knows: a status, a code, and one line that says what to do."""

    def __init__(
        self, status: int, code: str, detail: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.headers = headers or {}


class Problem(msgspec.Struct):
    """``code`` says what it is in one word, ``detail`` in one line what to do."""

    title: str
    status: int
    code: str
    detail: str


def encode_problem(status: int, code: str, detail: str) -> bytes:
    return json_text.encode(Problem(HTTPStatus(status).phrase, status, code, one_line(detail)))


def classify(error: RunctlError) -> tuple[int, str]:
    """(status, code)."""
    if isinstance(error, HttpProblem):
        return error.status, error.code
    return next(((n, code) for kind, n, code in STATUS if isinstance(error, kind)), (500, "error"))


def answer_error(error: RunctlError) -> Response:
    status, code = classify(error)
    headers = {"x-content-type-options": "nosniff"}
    if isinstance(error, HttpProblem):
        headers |= error.headers
    if status in RETRY:
        headers.setdefault("retry-after", RETRY[status])
    return Response(encode_problem(status, code, str(error)), status, headers, TYPE)
