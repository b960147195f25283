"""Events of the Responses API -> text, and whether they were a whole reply."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .body import Event
from .reply import Reply
from .request import Target

#: Of ``status``: nothing more comes.
_OVER = ("completed", "incomplete", "failed", "cancelled")
#: Of an item of the output: tools that somebody else than the endpoint has to run.
_CALLS = ("function_call", "custom_tool_call", "computer_call", "local_shell_call", "shell_call")


class Response(Reply):
    """One response as its events come: ``take`` each, then ``conclude``."""

    def __init__(self, target: Target, shown: Callable[[], str], after: int | None = None) -> None:
        """``shown``: what of the reply has been given away, by this answer and by earlier ones.
        ``after``: the number of the last event that was taken before this answer."""
        super().__init__(target, begun=bool(shown()))
        self._shown = shown
        self._after = -1 if after is None else after
        #: How it can be asked for, and the number of the event that was taken last.
        self.id: str | None = None
        self.number: int | None = None
        #: How it has ended.
        self.status: str | None = None

    def take(self, event: Event) -> tuple[str, bool]:
        if not event.data.strip() or event.data.lstrip().startswith("[DONE]"):
            return "", False  # its own last event is what says that it is over
        if event.name == "error":
            return super().take(event)
        self.heard = True
        value = self._parsed(event)
        response = value if value.get("object") == "response" else value.get("response")
        if not isinstance(response, dict):
            if self._is_error(value):
                raise self._reported(event.data)
            response = None
        kind = value.get("type")
        if response is None and not (isinstance(kind, str) and kind.startswith("response.")):
            if kind not in ("keepalive", "ping") and self._unknown is None:
                self._unknown = event.data
            return "", False
        self._choices = True
        text = self._sound(self._text(str(kind), value)) if self._count(value) else ""
        if response is not None:
            text += self._look(response)
        return text, True

    def conclude(self, cut: str | None = None) -> list[str]:
        if self.heard and self._choices and self.status is None:
            why = cut or "it ended before the response did"
            raise self.failed(f"the stream was cut mid-way ({why})", passing=True)
        return super().conclude(cut)

    def _count(self, value: dict[str, Any]) -> bool:
        """Whether the event was not taken before."""
        number = value.get("sequence_number")
        if not isinstance(number, int):
            return True
        new = number > self._after
        if new:
            self.number = number
        return new

    def _text(self, kind: str, value: dict[str, Any]) -> str:
        delta, item = value.get("delta"), value.get("item")
        if kind == "response.output_text.delta" and isinstance(delta, str):
            return delta
        if kind == "response.refusal.delta" and isinstance(delta, str):
            self._refusal += delta
        elif kind.startswith("response.reasoning"):
            self._found.add("reasoning")
        elif isinstance(item, dict) and item.get("type") in _CALLS:
            self._found.add("tool calls")
        return ""

    def _look(self, response: dict[str, Any]) -> str:
        """What is told of the whole: its name, and when it is over how it ended, and what of its
        text no event has told. Raises CallFailed."""
        name, status = response.get("id"), response.get("status")
        if self.id is None and isinstance(name, str) and name:
            self.id, self.named = name, True
        if status not in _OVER:
            return ""
        self.status, self.done = str(status), True
        if response.get("error"):
            raise self._reported(json.dumps({"error": response["error"]}))
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        self._finished(str(reason or status), again=False)
        if status != "completed":
            return ""
        whole, shown = _read_text(response), self._shown()
        return self._sound(whole[len(shown) :]) if whole.startswith(shown) else ""


def _read_text(response: dict[str, Any]) -> str:
    """All of its output's text."""
    output = response.get("output")
    found = []
    for item in output if isinstance(output, list) else []:
        parts = item.get("content") if isinstance(item, dict) else None
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and part.get("type") == "output_text":
                found.append(part.get("text"))
    return "".join(text for text in found if isinstance(text, str))
