"""The OpenAPI document of what is served below /v1."""

from __future__ import annotations

from typing import Any

import msgspec

from ..client.submit_lines import Line
from ..protocol import __version__, messages
from ..protocol.model import ThreadRow
from .problems import TYPE as PROBLEM
from .problems import Problem
from .threads import AbortBody, PurgeBody, SubmitBody

RUN_ID = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
THREAD = r"^[^\u0000-\u001f\u007f-\u009f]+$"
EVENT_ID = r"^[0-9]{1,15}\.([0-9]{1,15}|end)$"
OFFSET = r"^(-1|now|[0-9]{16}_[0-9]{16}_[0-9]{16})$"
STATUSES = ["queued", "running", "succeeded", "failed", "aborted", "dead"]
#: Any request may meet these: no token, none with that scope, one too many, a daemon that is away
#: or busy.
ALWAYS = (400, 401, 403, 421, 429, 431, 502, 503, 504)

Json = dict[str, Any]


class Runs(msgspec.Struct):
    """``runs``: the ids of those that were ended."""

    runs: list[str]


class Purged(msgspec.Struct):
    """``runs``: how many runs' output was deleted."""

    runs: int


class Submitted(msgspec.Struct):
    thread: str
    run: str
    status: str


def make_document() -> bytes:
    kinds = [
        *(ThreadRow, messages.RunRow, messages.RunDetails, messages.ThreadSession),
        *(messages.DaemonStatus, Submitted, Runs, Purged, SubmitBody, AbortBody, PurgeBody),
        *(Line, Problem),
    ]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    components["RunDetails"] = _flatten_details(components)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "runctl",
            "version": __version__,
            "description": "Streaming work that survives its daemon: docs/http.md.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{}, {"token": []}],
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "paths": _make_paths(),
    }
    return msgspec.json.encode(document)


_REF = "#/components/schemas/{name}"


def _ref(name: str) -> Json:
    return {"$ref": _REF.format(name=name)}


def _flatten_details(components: Json) -> Json:
    """As ``details_json`` has it: the run's own fields beside those of what was submitted."""
    details, run = components["RunDetails"], components["Run"]
    properties = {**run["properties"], **details["properties"]}
    for name in ("run", "reply", "push"):
        del properties[name]
    properties["run"] = run["properties"]["run"]
    return {
        "type": "object",
        "title": "RunDetails",
        "properties": properties,
        "required": [*run["required"]],
    }


_THREAD: Json = {
    "name": "thread",
    "in": "path",
    "required": True,
    "description": "The thread's name: up to 256 bytes of UTF-8, without control characters.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": THREAD},
    "example": "build",
}
_RUN: Json = {
    "name": "run",
    "in": "path",
    "required": True,
    "description": "The run's id. Where nothing is changed, the beginning of it is enough.",
    "schema": {"type": "string", "pattern": RUN_ID},
}


def _query(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "description": description, "schema": schema}


_PAGE = [
    _query("status", "Only those.", {"type": "string", "enum": [*STATUSES, "idle"]}),
    _query("limit", "Rows of a page.", {"type": "integer", "minimum": 1, "maximum": 500}),
    _query(
        "after",
        "What the Link header of the page before says.",
        {"type": "integer", "minimum": 0, "maximum": 2**53},
    ),
]


def _make_paths() -> Json:
    thread, run = "/v1/threads/{thread}", "/v1/runs/{run}"
    seconds = {"type": "string", "pattern": "^[1-5]?[0-9]s$"}
    wait = _query("wait", "Wait so long for its end, at most 60s.", seconds)
    sessions = _rows("ThreadSession")
    return {
        "/v1/threads": {"get": _get("listThreads", "All threads", _rows("ThreadRow"), _PAGE)},
        f"{thread}/runs": {
            "get": _get("listRuns", "A thread's runs", _rows("RunRow"), [_THREAD, *_PAGE], 404),
            "post": _submit(),
        },
        f"{thread}/run": {"get": _get("showCurrent", CURRENT, _ref("RunDetails"), [_THREAD], 404)},
        f"{thread}/abort": {
            "post": _post("abort", ABORT, (200, "Runs"), [_THREAD], 404, 409, body="AbortBody")
        },
        f"{thread}/purge": {
            "post": _post("purge", PURGE, (200, "Purged"), [_THREAD], 404, 409, body="PurgeBody")
        },
        f"{thread}/session": {
            "get": _get("showSession", SESSION, sessions, [_THREAD], 404),
            "delete": _get("forgetSession", FORGET, sessions, [_THREAD], 404),
        },
        "/v1/runs": {"post": _lines()},
        run: {"get": _get("showRun", SHOW, _ref("RunDetails"), [_RUN, wait], 404, 429)},
        f"{run}/events": {"get": _events()},
        f"{run}/stream": {
            "get": _stream(),
            "post": _append([_RUN]),
            "delete": _delete_stream([_RUN]),
        },
        "/v1/stream/{name}": _named_stream(),
        f"{run}/abort": {
            "post": _post("abortRun", "End this run", (200, "Runs"), [_RUN], 404, 409)
        },
        f"{run}/retry": {"post": _post("retry", RETRY, (201, "Submitted"), [_RUN], 404, 409, 429)},
        "/v1/changes": {"get": _changes()},
        "/v1/status": {"get": _get("status", "The daemon, NATS, the database", _STATUS, [])},
    }


CURRENT = "The thread's current run: the running one, else the next, else the last"
ABORT = "End the running run, and wait until its processes are gone"
PURGE = "Delete the thread's stored output"
SESSION = "By which names agents know the thread's conversation"
FORGET = "Have agents begin another conversation"
SHOW = "Where a run stands, and what was submitted"
RETRY = "Submit the work of a run that did not succeed again"
_STATUS: Json = {"type": "object", "required": ["executor_id", "version", "running", "queued"]}


def _submit() -> Json:
    summary = "Submit a run; with an id of one's own it is safe to submit it again"
    answer = (201, "Submitted")
    return _post("submit", summary, answer, [_THREAD], 404, 409, 429, body="SubmitBody")


def _rows(name: str) -> Json:
    return {"type": "array", "items": _ref(name)}


def _answers(status: int, content: Json, *problems: int) -> Json:
    found: Json = {str(status): {"description": "Done.", "content": content}}
    for code in sorted({*ALWAYS, *problems}):
        found[str(code)] = {
            "description": "See `code` and `detail`.",
            "content": {PROBLEM: {"schema": _ref("Problem")}},
        }
    return found


def _get(name: str, summary: str, schema: Json, parameters: list[Json], *problems: int) -> Json:
    return {
        "operationId": name,
        "summary": summary,
        "parameters": parameters,
        "responses": _answers(200, {"application/json": {"schema": schema}}, *problems),
    }


def _post(
    name: str,
    summary: str,
    answer: tuple[int, str],
    parameters: list[Json],
    *problems: int,
    body: str | None = None,
) -> Json:
    status, kind = answer
    schema = _ref(body) if body is not None else {"type": "object", "additionalProperties": False}
    return {
        "operationId": name,
        "summary": summary,
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        },
        "responses": _answers(
            status, {"application/json": {"schema": _ref(kind)}}, 408, 413, 415, *problems
        ),
    }


def _lines() -> Json:
    lines = {"application/x-ndjson": {"schema": {"type": "string"}}}
    return {
        "operationId": "submitLines",
        "summary": "Submit many runs: a JSON object a line, and an answer to each, in order",
        "requestBody": {"required": True, "content": lines},
        "responses": _answers(200, lines, 415),
    }


def _events() -> Json:
    stream: Json = {"text/event-stream": {}}  # events, each with its own schema: docs/schema
    last = {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "The id of the last event that was seen; counts for more than `after`.",
        "schema": {"type": "string", "pattern": EVENT_ID},
    }
    answers = _answers(200, stream, 404, 429)
    answers["204"] = {"description": "The run's end was seen already: do not connect again."}
    return {
        "operationId": "watch",
        "summary": "The run's events, live, until its end (server-sent events)",
        "parameters": [
            _RUN,
            _query("after", "Go on behind that event.", {"type": "string", "pattern": EVENT_ID}),
            last,
        ],
        "responses": answers,
    }


def _stream() -> Json:
    """Where a client stands is its own: what it was told last, or one of the two words."""
    offsets = {"type": "string", "pattern": OFFSET}
    answers = _answers(200, {"application/json": {"schema": _JSON_EVENTS}}, 404, 410, 429)
    answers["200"]["content"]["text/event-stream"] = {}
    answers["204"] = {"description": "There was no more: ask again, unless Stream-Closed says not."}
    answers["304"] = {"description": "Nothing has changed since If-None-Match."}
    return {
        "operationId": "readStream",
        "summary": "The run's events as a Durable Stream",
        "parameters": [
            _RUN,
            _query("offset", "Where to begin.", offsets),
            _query("live", "Wait for more.", {"type": "string", "enum": ["long-poll", "sse"]}),
            _query("cursor", "Stream-Cursor of the answer before.", {"type": "string"}),
        ],
        "responses": answers,
    }


_CLOSED: Json = {
    "name": "Stream-Closed",
    "in": "header",
    "description": "Nothing comes behind it.",
    "schema": {"type": "string", "enum": ["true"]},
}
_NAME: Json = {**_THREAD, "name": "name", "description": "A thread's name, as the stream's."}
_ANY: Json = {"*/*": {}}


def _append(parameters: list[Json]) -> Json:
    answers = _answers(204, {}, 404, 405, 408, 409, 413)
    del answers["204"]["content"]
    answers["200"] = {"description": "Done, as the producer's next."}
    return {
        "operationId": f"append{parameters[0]['name'].title()}",
        "summary": "Append to a push run, or close it, or both",
        "parameters": [*parameters, _CLOSED],
        "requestBody": {"required": True, "content": _ANY},
        "responses": answers,
    }


def _delete_stream(parameters: list[Json]) -> Json:
    answers = _answers(204, {}, 404, 405, 409)
    del answers["204"]["content"]
    return {
        "operationId": f"deleteStream{parameters[0]['name'].title()}",
        "summary": "End a push run, unless it has ended, and delete its output",
        "parameters": parameters,
        "responses": answers,
    }


def _named_stream() -> Json:
    made = _answers(201, {}, 408, 409, 413, 429)
    del made["201"]["content"]
    made["200"] = {"description": "There is such a stream."}
    number = {"type": "string", "pattern": "^(0|[1-9][0-9]{0,9})$"}
    ttl = {"name": "Stream-TTL", "in": "header", "description": "Seconds.", "schema": number}
    read = {**_stream(), "operationId": "readNamedStream", "summary": "A stream, as it was pushed"}
    read["parameters"] = [_NAME, *read["parameters"][1:]]
    read["responses"] = {**read["responses"], "200": {"description": "Done.", "content": _ANY}}
    return {
        "put": {
            "operationId": "createStream",
            "summary": "Make a push run as a Durable Stream",
            "parameters": [_NAME, _CLOSED, ttl],
            "requestBody": {"required": False, "content": _ANY},
            "responses": made,
        },
        "get": read,
        "post": _append([_NAME]),
        "delete": _delete_stream([_NAME]),
    }


_JSON_EVENTS: Json = {"type": "array", "items": {"type": "object", "required": ["type"]}}


def _changes() -> Json:
    return {
        "operationId": "watchThreads",
        "summary": "Which threads have changed, live, for ever (server-sent events)",
        "responses": _answers(200, {"text/event-stream": {}}, 429),
    }
