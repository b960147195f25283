"""Which of its conversations an agent goes on with: that of the thread, or a new one.

docs/agents.md has what agents of today do with the requests for that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from .stops import Trouble

METHOD_NOT_FOUND, AUTH_REQUIRED = -32601, -32000
#: By which agents say that they do not know a session; and one that says no more than that
#: something is wrong inside it, and in its text what.
UNKNOWN, INTERNAL = (-32002, -32602), -32603
_UNKNOWN_TEXT = re.compile(
    r"(session|conversation|thread|rollout)\b.*\b(not found|missing|unknown|invalid|not exist)"
    r"|\b(no|unknown|invalid|find)\b.*\b(sessions?|conversations?|threads?|rollouts?)\b",
    re.IGNORECASE | re.DOTALL,
)


class Refused(Exception):
    """The agent has answered with an error: its ``code`` and ``text``."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text

    @property
    def says_unknown(self) -> bool:
        if self.code in UNKNOWN:
            return True
        return self.code == INTERNAL and _UNKNOWN_TEXT.search(self.text) is not None


#: Sends a request, and returns its result. Raises Refused, Trouble.
Ask = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Capabilities:
    resume: bool
    load: bool


def read_capabilities(initialized: dict[str, Any]) -> Capabilities:
    """Of the result of ``initialize``."""
    found = _table(initialized.get("agentCapabilities"))
    resume = _table(found.get("sessionCapabilities")).get("resume")
    return Capabilities(
        resume is not None and resume is not False, found.get("loadSession") is True
    )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass(slots=True)
class Opening:
    """``ask`` the agent for a session in ``cwd``. ``say``: a line for whoever reads the run.
    ``heard`` counts what it has told of the conversation meanwhile: ``session/load`` repeats
    all of it."""

    ask: Ask
    can: Capabilities
    cwd: str
    say: Callable[[str], None]
    heard: int = field(default=0)

    async def open(self, known: str | None) -> tuple[str, bool]:
        """The session's name, and whether it is the ``known`` one. Raises Trouble."""
        if known is not None and await self._go_on(known):
            return known, True
        result = await self._ask("session/new", {"cwd": self.cwd, "mcpServers": []})
        name = result.get("sessionId")
        if not isinstance(name, str) or not name:
            raise Trouble("its answer to session/new names no session")
        return name, False

    async def _go_on(self, known: str) -> bool:
        params = {"sessionId": known, "cwd": self.cwd, "mcpServers": []}
        why = "it goes on with no session of an earlier process"
        if self.can.resume:
            found, why = await self._try("session/resume", params)
            if found:
                return True
        if self.can.load and (not self.can.resume or why == _NO_SUCH_METHOD):
            self.heard = 0
            found, why = await self._try("session/load", params)
            if found and self.heard:
                return True
            # Some answer so for a name that they do not know.
            why = "it is empty" if found else why
        self.say(f"session {known} cannot be gone on with ({why}): a new one is begun")
        return False

    async def _try(self, method: str, params: dict[str, Any]) -> tuple[bool, str]:
        """Whether the agent knows the session; else what it says. Raises Trouble."""
        try:
            await self.ask(method, params)
        except Refused as refused:
            if refused.code == METHOD_NOT_FOUND:
                return False, _NO_SUCH_METHOD
            if not refused.says_unknown:
                raise _explain(method, refused) from None
            return False, refused.text
        return True, ""

    async def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self.ask(method, params)
        except Refused as refused:
            raise _explain(method, refused) from None


_NO_SUCH_METHOD = "it has no such method"


def _explain(method: str, refused: Refused) -> Trouble:
    if refused.code == AUTH_REQUIRED:
        return Trouble(
            f"it wants to be logged in ({refused.text}): do that as the run's user, or have its key"
            " in the runner's env"
        )
    return Trouble(f"it refuses {method}: {refused.text} ({refused.code})")


def describe_error(message: str, data: Any) -> str:
    """What an error of JSON-RPC says, in one line; what is in ``data`` often says more."""
    more = "" if data is None else data if isinstance(data, str) else json.dumps(data)
    text = " ".join(f"{message}: {more}".split()) if more and more not in message else message
    return text if len(text) <= 500 else text[:499] + "…"
