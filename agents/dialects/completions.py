"""OpenAI's chat completions, which opencode speaks to a provider of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from . import Ask, event

PATH = "/chat/completions"
SHELL = "bash"


def read(body: dict[str, Any]) -> Ask:
    tools = [x.get("function", {}).get("name") for x in body.get("tools") or ()]
    messages = body.get("messages", [])
    return Ask(
        shell=SHELL if SHELL in tools else None,
        streams=bool(body.get("stream")),
        has_result=any(x.get("role") == "tool" for x in messages),
        history=json.dumps(messages),
    )


def _chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    head = {"id": "chat_1", "object": "chat.completion.chunk", "created": 1, "model": "loopback"}
    return event({**head, "choices": [choice], **({"usage": usage} if finish else {})})


def _framed(finish: str, deltas: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    yield _chunk({"role": "assistant", "content": ""})
    for delta in deltas:
        yield _chunk(delta)
    yield _chunk({}, finish)
    yield b"data: [DONE]\n\n"


def call(ask: Ask, command: str) -> Iterator[bytes]:
    arguments = json.dumps({"command": command, "description": "Append a line"})
    function = {"name": ask.shell, "arguments": arguments}
    tool = {"index": 0, "id": "call_1", "type": "function", "function": function}
    yield from _framed("tool_calls", [{"content": "I call the tool."}, {"tool_calls": [tool]}])


def say(ask: Ask, words: Iterable[str]) -> Iterator[bytes]:
    return _framed("stop", ({"content": word} for word in words))


def whole(ask: Ask, text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "chat_1", "object": "chat.completion", "created": 1, "choices": [choice]}
