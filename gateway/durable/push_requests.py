"""What writers of a push run's stream ask for, as their requests' headers and bodies have it."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

import msgspec
from starlette.requests import Request

from ...config.schema import Config
from ...protocol.errors import BadRequest
from ...protocol.model import Opening, Outcome, Status, one_line
from ...protocol.subjects import LEAST_RECORD, MAX_RECORD_BYTES, RECORD_SHARE
from ..service import read_bounded
from .push_content import JSON
from .push_log import too_large

#: A JavaScript client can count as far.
MOST_NUMBER = 2**53 - 1
#: No stream lives longer, seconds.
MOST_TTL = 10**10
#: What a body may begin with at creation: it waits in the database for the run's turn.
MOST_INITIAL = 256 * 1024
CONTENT_TYPE = re.compile(r"[!#-'*+.^-z|~A-Z0-9-]+/[!#-'*+.^-z|~A-Z0-9-]+[ -~]*")
DEFAULT_TYPE = "application/octet-stream"
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


@dataclass(frozen=True, slots=True)
class Producer:
    """Who numbers its requests, so that none counts twice."""

    id: str
    epoch: int
    number: int


@dataclass(frozen=True, slots=True)
class Append:
    """``outcome``: how the run ends with it, None if it goes on. ``data``: b"" for nothing."""

    data: bytes
    content_type: str | None
    outcome: Outcome | None
    producer: Producer | None
    order: str | None


def read_opening(request: Request) -> Opening:
    """Of a PUT. Raises BadRequest."""
    ttl, expires = _read_header(request, "stream-ttl"), _read_header(request, "stream-expires-at")
    if ttl is not None and expires is not None:
        raise BadRequest("give Stream-TTL or Stream-Expires-At, not both")
    if ttl is not None and (not re.fullmatch("0|[1-9][0-9]{0,10}", ttl) or int(ttl) > MOST_TTL):
        raise BadRequest(f"Stream-TTL must be a whole number of seconds, at most {MOST_TTL}")
    return Opening(
        _read_content_type(request) or DEFAULT_TYPE,
        None if ttl is None else int(ttl),
        None if expires is None else _read_time(expires),
        _read_closed(request),
    )


def _read_time(text: str) -> float:
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        return datetime.datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        raise BadRequest(
            "Stream-Expires-At must be a time such as 2030-01-01T00:00:00Z (RFC 3339)"
        ) from None


def find_most(config: Config) -> int:
    """Of one append, in bytes: a share of the stream, since each running run keeps its last."""
    return min(MAX_RECORD_BYTES, max(LEAST_RECORD, config.stream.max_bytes // RECORD_SHARE))


async def read_append(request: Request, most: int) -> Append:
    """Of a POST, with a body of up to ``most`` bytes. Raises BadRequest, HttpProblem."""
    producer, order = _read_producer(request), _read_header(request, "stream-seq")
    data = await read_bounded(request, most)
    if data is None:
        raise too_large(most)
    outcome = _read_outcome(request) if _read_closed(request) else None
    content_type = _read_content_type(request) if data or outcome is None else None
    if not data and outcome is None:
        raise BadRequest("the body is empty: append something, or say Stream-Closed: true")
    if data and content_type is None:
        raise BadRequest("say what the body is, with the Content-Type of the stream")
    return Append(data, content_type, outcome, producer, order)


def _read_outcome(request: Request) -> Outcome:
    """How the run is to end. Raises BadRequest."""
    code, error = _read_header(request, "runctl-exit-code"), _read_header(request, "runctl-error")
    if code is None and error is None:
        return Outcome(Status.SUCCEEDED)
    if code is not None and (not re.fullmatch("[0-9]{1,3}", code) or int(code) > 255):
        raise BadRequest("Runctl-Exit-Code must be a number from 0 to 255")
    number = None if code is None else int(code)
    if number == 0 and error is None:
        return Outcome(Status.SUCCEEDED, 0)
    return Outcome(Status.FAILED, number, one_line(error or f"exit code {number}"))


def _read_producer(request: Request) -> Producer | None:
    """Raises BadRequest."""
    names = "producer-id", "producer-epoch", "producer-seq"
    given = [_read_header(request, name) for name in names]
    if all(value is None for value in given):
        return None
    id_, epoch, number = given
    if not id_ or epoch is None or number is None:
        raise BadRequest("give Producer-Id, Producer-Epoch and Producer-Seq, or none of them")
    if len(id_) > 256:
        raise BadRequest("Producer-Id has more than 256 characters; use a shorter one")
    return Producer(
        id_, _read_number("Producer-Epoch", epoch), _read_number("Producer-Seq", number)
    )


def _read_number(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,16}", text) or int(text) > MOST_NUMBER:
        raise BadRequest(f"{name} must be a whole number from 0 to {MOST_NUMBER}")
    return int(text)


def _read_content_type(request: Request) -> str | None:
    """Raises BadRequest."""
    text = _read_header(request, "content-type")
    if text is None or not text.strip():
        return None
    if not CONTENT_TYPE.fullmatch(text) or len(text) > 256:
        raise BadRequest("Content-Type is not one, such as text/plain or application/json")
    return text


def _read_closed(request: Request) -> bool:
    return (_read_header(request, "stream-closed") or "").lower() == "true"


def _read_header(request: Request, name: str) -> str | None:
    """Raises BadRequest."""
    given = request.headers.getlist(name)
    if len(given) > 1:
        raise BadRequest(f"{name.title()} is given more than once")
    return given[0] if given else None


def is_same_type(one: str, other: str) -> bool:
    """Parameters such as a charset do not count."""
    return one.partition(";")[0].strip().lower() == other.partition(";")[0].strip().lower()


def split_messages(content_type: str, data: bytes) -> list[bytes]:
    """As they are stored: of JSON, each on a line of its own. Raises BadRequest."""
    if content_type.partition(";")[0].strip().lower() != JSON:
        return [data] if data else []
    if not data.strip():
        return []
    try:
        value = msgspec.json.decode(data, type=msgspec.Raw)
        if bytes(value).lstrip()[:1] != b"[":
            _check(value)
            return [bytes(value).strip() + b"\n"]
        found = msgspec.json.decode(data, type=list[msgspec.Raw])
        for each in found:
            _check(each)
        return [bytes(each).strip() + b"\n" for each in found]
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {one_line(str(error))}") from None


def _check(value: msgspec.Raw) -> None:
    """Raises ValueError."""
    msgspec.json.decode(value)
