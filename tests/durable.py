"""Clients of Durable Streams: reads over plain HTTP, in each of the ways that the protocol has."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx
from gateways import Gateway


@dataclass
class Read:
    """What one request gave. ``offset``: where to go on."""

    status: int
    messages: list[Any]
    offset: str
    closed: bool
    up_to_date: bool
    headers: httpx.Headers = field(default_factory=httpx.Headers)


def read(gateway: Gateway, path: str, offset: str = "-1", live: str = "", **headers: str) -> Read:
    """At once, or with ``live`` "long-poll"."""
    query = {"offset": offset, **({"live": live} if live else {})}
    answer = gateway.get(path, params=query, headers=headers)
    assert answer.status_code in (200, 204, 304), answer.text
    return Read(
        answer.status_code,
        answer.json() if answer.status_code == 200 else [],
        answer.headers["stream-next-offset"],
        answer.headers.get("stream-closed") == "true",
        answer.headers.get("stream-up-to-date") == "true",
        answer.headers,
    )


def follow_events(gateway: Gateway, path: str, offset: str, most: int = 2**30) -> Read:
    """Server-sent events, ``most`` pairs of them or until the response ends."""
    found = Read(200, [], offset, False, False)
    query = {"offset": offset, "live": "sse"}
    with gateway.client.stream("GET", path, params=query) as answer:
        assert answer.status_code == 200, answer.read()
        event, held, pairs = "", list[Any](), 0
        for line in answer.iter_lines():
            if line.startswith("event: "):
                event = line[7:]
            elif line.startswith("data:") and event == "data":
                held += json.loads(line[5:])
            elif line.startswith("data:"):
                control = json.loads(line[5:])
                found.messages += held
                found.offset = control["streamNextOffset"]
                found.closed = control.get("streamClosed", False)
                found.up_to_date = control.get("upToDate", False)
                held, pairs = [], pairs + 1
                if pairs >= most:
                    break
    return found


class RunReader:
    """What a client makes of a run's messages: each valid chunk once."""

    def __init__(self) -> None:
        self.chunks: list[str] = []
        self.told: list[str] = []
        self.attempt = 0

    def hear(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        assert "end" not in self.told, "something comes behind the end"
        self.told.append(kind)
        if kind == "reset":
            assert message["attempt"] > self.attempt, "a reset comes twice"
            self.attempt = message["attempt"]
            self.chunks.clear()
        elif kind == "continue":
            self.attempt = message["attempt"]
            del self.chunks[message["after"] :]
        elif kind == "chunk":
            assert message["seq"] == len(self.chunks) + 1, "a chunk is missing, or comes twice"
            self.chunks.append(message["data"])
