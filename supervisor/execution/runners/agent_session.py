"""Agents that keep a conversation under a name: which command a run is, and how that name is
found in its output.

docs/agents.md has what agents of today do with their sessions.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ....config.prompts import PROMPT, RUN, SESSION, THREAD, takes_prompt
from ....config.schema import CommandRunner
from ....protocol.errors import BadRequest
from ....protocol.model import Outcome, RunSpec, Status, token
from ....protocol.records import StreamName
from .protocol import Emit, Sessions

log = logging.getLogger("runctld.command")

#: A name that goes into arguments and paths.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,199}")
_PLACE = re.compile("|".join(map(re.escape, (PROMPT, SESSION, THREAD, RUN))))
#: The name of a session is looked for in so much of the output, and the words that say that it
#: is missing in so much at its end, bytes.
MOST_SEARCHED = 1024 * 1024
LAST_WORDS = 8 * 1024


@dataclass(frozen=True, slots=True)
class Invocation:
    """``argv``, and ``stdin`` where the prompt goes there. ``session``: "" for none, or one that
    has no name yet. ``goes_on``: with a session that should be there."""

    argv: list[str]
    stdin: bytes | None
    session: str = ""
    goes_on: bool = False


async def choose(
    config: CommandRunner, spec: RunSpec, sessions: Sessions | None, *, resumed: bool
) -> Invocation:
    """What to run. ``resumed``: after an interruption."""
    told = spec.prompt
    if resumed and told is not None:
        told = config.resume_prompt.replace(PROMPT, told)
    if config.session is None or sessions is None:
        named = (await sessions.look() or "") if sessions is not None else ""
        if resumed and config.resume_argv:  # from a checkpoint
            return invoke(config, spec, config.resume_argv, told, named)
        return invoke(config, spec, config.argv, spec.prompt, named)
    session = await sessions.find()
    if session is None:
        return await begin(config, spec, sessions)
    if resumed:
        argv = config.resume_argv or config.next_argv or config.argv
    else:
        argv = config.next_argv or config.resume_argv or config.argv
    return invoke(config, spec, argv, told, session, goes_on=True)


async def begin(config: CommandRunner, spec: RunSpec, sessions: Sessions) -> Invocation:
    """With a new session."""
    session = ""
    if config.session == "uuid":
        session = await sessions.find() or str(uuid.uuid4())
        await sessions.store(session)  # before anybody can have it
    return invoke(config, spec, config.argv, spec.prompt, session)


def invoke(
    config: CommandRunner,
    spec: RunSpec,
    template: Sequence[str],
    prompt: str | None,
    session: str,
    *,
    goes_on: bool = False,
) -> Invocation:
    if not config.argv:
        return Invocation(list(spec.argv), None if prompt is None else prompt.encode(), session)
    values = {SESSION: session, THREAD: spec.thread, RUN: spec.run}
    stdin = None if prompt is None else prompt.encode()
    if prompt is not None and takes_prompt(template):
        values[PROMPT], stdin = prompt, None
    argv = [*(fill(part, values) for part in template), *spec.argv]
    return Invocation(argv, stdin, session, goes_on)


def fill(text: str, values: Mapping[str, str]) -> str:
    """``text`` with its placeholders replaced, and nothing within what replaced them."""
    return _PLACE.sub(lambda found: values.get(found[0], found[0]), text)


def fill_name(text: str, spec: RunSpec, session: str) -> str:
    """The same for a path or a variable, in which a thread is one name."""
    return fill(text, {SESSION: session, THREAD: token(spec.thread), RUN: spec.run})


class SessionWatch:
    """Passes a command's output on to ``emit``, and looks at it on its way: for the name of a
    session, which is stored before the line that says it goes on, and for its last words."""

    def __init__(self, config: CommandRunner, emit: Emit, sessions: Sessions | None) -> None:
        self._emit = emit
        self._sessions = sessions
        self._missing = (config.session_missing or "").encode()
        wanted = config.session or ""
        self._keys = wanted.removeprefix("json:").split(".") if ":" in wanted else []
        self._line = b""
        self._searched = 0
        self._words = {"stdout": b"", "stderr": b""}
        self._one = config.tty or config.merge_output
        self._said = 0

    def stop_searching(self) -> None:
        """The session is known."""
        self._keys = []

    async def emit(self, stream: StreamName, data: bytes) -> None:
        if stream == "stdout":
            self._said += len(data)
            if self._keys:
                await self._search(data)
        if self._missing:
            self._words[stream] = (self._words.get(stream, b"") + data)[-LAST_WORDS:]
        await self._emit(stream, data)

    def is_missing(self, outcome: Outcome) -> bool:
        """Whether the command ended so because it does not know its session."""
        if not self._missing or outcome.status is not Status.FAILED:
            return False
        if self._one:
            return self._said <= LAST_WORDS and self._missing in self._words["stdout"]
        return not self._said and self._missing in self._words["stderr"]

    async def _search(self, data: bytes) -> None:
        self._searched += len(data)
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            name = find_name(line, self._keys)
            if name is not None:
                await self._store(name)
                self._keys, self._line = [], b""
                return
        if self._searched > MOST_SEARCHED:
            log.warning("the output names no session, at %s", ".".join(self._keys))
            self._keys, self._line = [], b""

    async def _store(self, name: str) -> None:
        if self._sessions is None:
            return
        try:
            await store_name(self._sessions, name)
        except BadRequest as error:
            log.warning("the output names a session that cannot be used: %s", error)


async def store_name(sessions: Sessions, name: str) -> None:
    """Durable when this returns. Raises BadRequest; Unavailable, sessions cannot be stored."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"a session's name is 1 to 200 of A-Z a-z 0-9 _ . : @ -, and begins with a letter, a"
            f" digit or _; this is {name[:100]!a}"
        )
    if name != await sessions.find():
        await sessions.store(name)


def find_name(line: bytes, keys: Sequence[str]) -> str | None:
    """What stands at ``keys``, each within the one before, of a line that is a JSON object."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        found: Any = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return None
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found if isinstance(found, str) else None
