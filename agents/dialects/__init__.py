"""The APIs by which agents ask their models. Each is a module with

PATH                      what the path of a request ends with
read(body)                what is asked
call(ask, command)        the events of an answer that has the shell run a command
say(ask, words)           those of an answer of these words, each when it comes
whole(ask, text)          an answer that is not streamed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Ask:
    """``shell``: the tool that runs commands; None for a request without one, such as for a title.
    ``has_result``: of a tool that was called before. ``history``: all that the model is told, as
    JSON."""

    shell: str | None
    streams: bool
    has_result: bool
    history: str


class Dialect(Protocol):
    @property
    def PATH(self) -> str: ...

    def read(self, body: dict[str, Any]) -> Ask: ...

    def call(self, ask: Ask, command: str) -> Iterator[bytes]: ...

    def say(self, ask: Ask, words: Iterable[str]) -> Iterator[bytes]: ...

    def whole(self, ask: Ask, text: str) -> dict[str, Any]: ...


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event, named by its ``type`` if it has one."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def has_entry(entries: Iterable[Any], *types: str) -> bool:
    """Whether one of them is of such a type."""
    return any(isinstance(x, dict) and x.get("type") in types for x in entries)
