"""What an agent reports while it works, as output: text, or JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ...protocol import json_text
from .output import STDERR, STDOUT, Output

#: Of a tool call's title, characters.
LONGEST_TITLE = 200
OVER = ("completed", "failed")
ANSWER, THOUGHT = "agent_message_chunk", "agent_thought_chunk"
#: Some agents say that a tool call is over when the answer to its result has begun. So long that
#: waits for this to be said, seconds.
HOLD = 1.0


class Display:
    """``show`` each update, in a loop. ``on_tool_end`` is called behind the end of a tool call, if
    all that was shown so far is in the agent's own history by then."""

    def __init__(self, output: Output, *, as_json: bool, on_tool_end: Callable[[], None]) -> None:
        self._output = output
        self._as_json = as_json
        self._on_tool_end = on_tool_end
        #: What is known of the calls that are not over, and of which it is not shown yet that
        #: they have begun: agents often know a better title a moment later.
        self._calls: dict[str, dict[str, Any]] = {}
        self._unannounced: list[str] = []
        self._over: set[str] = set()
        #: Of an answer, waiting for the end of a call; and whether some of one was shown since
        #: the last call began, which is then in no history yet.
        self._held: list[dict[str, Any]] = []
        self._release: asyncio.TimerHandle | None = None
        self._ahead = False
        #: Whether the last character on each was no end of a line.
        self._open = {STDOUT: False, STDERR: False}

    def show(self, update: dict[str, Any]) -> None:
        """``update``: as the agent sent it, of any shape."""
        kind = update.get("sessionUpdate")
        if kind in (ANSWER, THOUGHT):
            if self._calls and not self._ahead:
                self._hold(update)
            else:
                self._show_piece(update)
        elif kind in ("tool_call", "tool_call_update"):
            self._show_call(update)
        elif self._as_json:
            self._show_json(update)

    def note_permission(self, call: dict[str, Any], policy: str) -> None:
        """That the agent has asked for one, and what it was answered."""
        known = self._calls.get(str(call.get("toolCallId")), {})
        title = clean_title(call.get("title") or known.get("title"))
        self._end_line(STDERR)
        said = "allowed" if policy == "allow" else 'denied (permissions = "deny")'
        self._write(STDERR, f"[permission] {title} — {said}\n")

    def end(self, result: dict[str, Any]) -> None:
        """``result``: of the turn, as the agent sent it."""
        self.flush()
        if self._as_json:
            self._show_json(result)
        self._end_line(STDOUT)
        self._end_line(STDERR)

    def flush(self) -> None:
        """Show what is held."""
        if self._release is not None:
            self._release.cancel()
            self._release = None
        held, self._held = self._held, []
        for update in held:
            self._show_piece(update)

    def _hold(self, update: dict[str, Any]) -> None:
        self._held.append(update)
        if self._release is None:
            self._release = asyncio.get_running_loop().call_later(HOLD, self.flush)

    def _show_piece(self, update: dict[str, Any]) -> None:
        """Of an answer, or a thought."""
        self._announce()
        self._ahead = True
        text = read_text(update.get("content"))
        if self._as_json:
            self._show_json(update)
        elif update["sessionUpdate"] == THOUGHT:
            self._write(STDERR, text)
        else:
            self._end_line(STDERR)
            self._write(STDOUT, text)

    def _show_call(self, update: dict[str, Any]) -> None:
        name, status = str(update.get("toolCallId")), update.get("status")
        if name in self._over:
            if self._as_json:
                self._show_json(update)
            return
        begins = name not in self._calls
        known = self._calls.setdefault(name, {})
        known.update({k: v for k, v in update.items() if k in ("title", "status") and v})
        if begins:
            self.flush()
            self._announce()
            if update["sessionUpdate"] == "tool_call":  # else it began in an earlier process
                self._ahead = False
            if status not in OVER:
                self._unannounced.append(name)
        if not begins or status not in ("pending", None):
            self._announce()
        if self._as_json:
            self._show_json(update)
        if status in OVER:
            self._end_call(name, str(status))

    def _end_call(self, name: str, status: str) -> None:
        call = self._calls.pop(name)
        self._over.add(name)
        if not self._as_json:
            self._write_line(call, status)
        if not self._ahead:
            self._on_tool_end()
        if not self._calls:
            self.flush()

    def _announce(self) -> None:
        """Show which calls have begun."""
        names, self._unannounced = self._unannounced, []
        for name in names:
            if not self._as_json:
                self._write_line(self._calls[name], "started")

    def _write_line(self, call: dict[str, Any], status: str) -> None:
        self._end_line(STDERR)
        self._end_line(STDOUT)
        self._write(STDOUT, f"[tool] {clean_title(call.get('title'))} — {status}\n")

    def _show_json(self, value: dict[str, Any]) -> None:
        self._write(STDOUT, json_text.encode(value).decode() + "\n")

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
