"""Anthropic's Messages API, which claude and claude-agent-acp speak."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from . import Ask, event, has_entry

PATH = "/messages"
SHELL = "Bash"


def read(body: dict[str, Any]) -> Ask:
    messages = body.get("messages", [])
    contents = [x["content"] for x in messages if isinstance(x.get("content"), list)]
    return Ask(
        shell=SHELL if any(x.get("name") == SHELL for x in body.get("tools") or ()) else None,
        streams=bool(body.get("stream")),
        has_result=any(has_entry(x, "tool_result") for x in contents),
        history=json.dumps(messages),
    )


def _message(**more: Any) -> dict[str, Any]:
    usage = {"input_tokens": 10, "output_tokens": 1}
    return {
        **{"id": "msg_1", "type": "message", "role": "assistant", "model": "loopback"},
        **{"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage},
        **more,
    }


def _block(index: int, begin: dict[str, Any], deltas: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    yield event({"type": "content_block_start", "index": index, "content_block": begin})
    for delta in deltas:
        yield event({"type": "content_block_delta", "index": index, "delta": delta})
    yield event({"type": "content_block_stop", "index": index})


def _text(words: Iterable[str]) -> Iterator[bytes]:
    deltas = ({"type": "text_delta", "text": word} for word in words)
    return _block(0, {"type": "text", "text": ""}, deltas)


def _framed(why: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield event({"type": "message_start", "message": _message()})
    yield from blocks
    delta = {"stop_reason": why, "stop_sequence": None}
    yield event({"type": "message_delta", "delta": delta, "usage": {"output_tokens": 20}})
    yield event({"type": "message_stop"})


def call(ask: Ask, command: str) -> Iterator[bytes]:
    arguments = json.dumps({"command": command, "description": "Append a line"})
    tool: dict[str, Any] = {"type": "tool_use", "id": "toolu_1", "name": ask.shell, "input": {}}
    deltas = [{"type": "input_json_delta", "partial_json": arguments}]
    yield from _framed("tool_use", [*_text(["I call the tool."]), *_block(1, tool, deltas)])


def say(ask: Ask, words: Iterable[str]) -> Iterator[bytes]:
    return _framed("end_turn", _text(words))


def whole(ask: Ask, text: str) -> dict[str, Any]:
    return _message(content=[{"type": "text", "text": text}], stop_reason="end_turn")
