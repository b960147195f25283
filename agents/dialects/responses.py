"""OpenAI's Responses API, which codex speaks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from . import Ask, event, has_entry

PATH = "/responses"


def _arguments(shell: str, command: str) -> dict[str, Any]:
    if shell == "exec_command":
        # So long it waits before it tells the model that the command still runs.
        return {"cmd": command, "yield_time_ms": 30_000}
    return {"command": command if shell == "shell_command" else ["sh", "-c", command]}


def read(body: dict[str, Any]) -> Ask:
    tools = [x.get("name") or x.get("type") for x in body.get("tools") or ()]
    shells = (x for x in ("exec_command", "shell_command", "shell") if x in tools)
    entries = body.get("input", [])
    return Ask(
        shell=next(shells, None),
        streams=bool(body.get("stream")),
        has_result=has_entry(entries, "function_call_output", "custom_tool_call_output"),
        history=json.dumps(entries),
    )


def _item(kind: str, item: dict[str, Any]) -> bytes:
    return event({"type": f"response.output_item.{kind}", "output_index": 0, "item": item})


def _text(words: Iterable[str]) -> Iterator[bytes]:
    item: dict[str, Any] = {"type": "message", "role": "assistant", "id": "msg_1", "content": []}
    yield _item("added", item)
    said = ""
    for word in words:
        said += word
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        yield event({"type": "response.output_text.delta", "delta": word, **place})
    yield _item("done", {**item, "content": [{"type": "output_text", "text": said}]})


def _framed(items: Iterable[bytes]) -> Iterator[bytes]:
    yield event({"type": "response.created", "response": {"id": "resp_1"}})
    yield from items
    usage = {"input_tokens": 10, "output_tokens": 20, "total_tokens": 30}
    yield event({"type": "response.completed", "response": {"id": "resp_1", "usage": usage}})


def call(ask: Ask, command: str) -> Iterator[bytes]:
    arguments = json.dumps(_arguments(str(ask.shell), command))
    item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": ask.shell}
    done = _item("done", {**item, "arguments": arguments})
    yield from _framed([*_text(["I call the tool."]), done])


def say(ask: Ask, words: Iterable[str]) -> Iterator[bytes]:
    return _framed(_text(words))


def whole(ask: Ask, text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text}]
    item = {"type": "message", "role": "assistant", "id": "msg_1", "content": content}
    return {"id": "resp_1", "object": "response", "status": "completed", "output": [item]}
