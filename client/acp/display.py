"""What an agent reports while it works, as output: text, or JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...protocol import json_text
from .output import STDERR, STDOUT, Output

#: Of a tool call's title, characters.
LONGEST_TITLE = 200
OVER = ("completed", "failed")


class Display:
    """``show`` each update. ``on_tool_end`` is called behind the line that says of a tool call
    that it is over: what was shown so far is in the agent's own history by then."""

    def __init__(self, output: Output, *, as_json: bool, on_tool_end: Callable[[], None]) -> None:
        self._output = output
        self._as_json = as_json
        self._on_tool_end = on_tool_end
        self._tools: dict[str, dict[str, Any]] = {}
        #: Whether the last character on each was no end of a line.
        self._open = {STDOUT: False, STDERR: False}

    def show(self, update: dict[str, Any]) -> None:
        """``update``: as the agent sent it, of any shape."""
        kind = update.get("sessionUpdate")
        if self._as_json:
            self._write(STDOUT, json_text.encode(update).decode() + "\n")
        elif kind == "agent_message_chunk":
            self._end_line(STDERR)
            self._write(STDOUT, read_text(update.get("content")))
        elif kind == "agent_thought_chunk":
            self._write(STDERR, read_text(update.get("content")))
        if kind in ("tool_call", "tool_call_update"):
            self._show_tool(update)

    def note_permission(self, call: dict[str, Any], policy: str) -> None:
        """That the agent has asked for one, and what it was answered."""
        known = self._tools.get(str(call.get("toolCallId")), {})
        title = clean_title(call.get("title") or known.get("title"))
        self._end_line(STDERR)
        said = "allowed" if policy == "allow" else 'denied (permissions = "deny")'
        self._write(STDERR, f"[permission] {title} — {said}\n")

    def end(self, result: dict[str, Any]) -> None:
        """``result``: of the turn, as the agent sent it."""
        if self._as_json:
            self._write(STDOUT, json_text.encode(result).decode() + "\n")
        self._end_line(STDOUT)
        self._end_line(STDERR)

    def _show_tool(self, update: dict[str, Any]) -> None:
        known = self._tools.setdefault(str(update.get("toolCallId")), {})
        begins, was_over = not known, known.get("status") in OVER
        known.update({k: v for k, v in update.items() if k in ("title", "status") and v})
        known.setdefault("status", "pending")
        over = known["status"] in OVER
        if begins or (over and not was_over):
            if not self._as_json:
                self._end_line(STDERR)
                self._end_line(STDOUT)
                status = known["status"] if over else "started"
                self._write(STDOUT, f"[tool] {clean_title(known.get('title'))} — {status}\n")
            if over:
                self._on_tool_end()

    def _end_line(self, fd: int) -> None:
        if self._open[fd]:
            self._write(fd, "\n")

    def _write(self, fd: int, text: str) -> None:
        if text:
            self._output.write(fd, text)
            self._open[fd] = not text.endswith("\n")


def read_text(content: Any) -> str:
    """Of a content block; for one that is no text what it is."""
    if not isinstance(content, dict):
        return ""
    if content.get("type") == "text":
        return str(content.get("text") or "")
    return f"[{content.get('type')}: {content.get('uri') or content.get('mimeType') or 'data'}]"


def clean_title(title: Any) -> str:
    """One line of printable text."""
    text = " ".join(str(title or "a tool").split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= LONGEST_TITLE else text[: LONGEST_TITLE - 1] + "…"
