"""What a run says of itself while it works: a line on how far it is, and what it has used."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable

import trio

from ...protocol.errors import BadRequest
from ...protocol.model import one_line, shortened
from ..queue.attempt_log import AttemptLog, AttemptNote

#: Of the names of what a run uses, and how many there may be.
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
MOST_NAMES = 16
#: Of the ids of what was added last, and how long one may be.
MOST_IDS, LONGEST_ID = 64, 64
#: Beyond it readers of JSON lose digits.
_MOST = 2.0**53


class RunNotes:
    """Of one attempt. ``changed`` is called when its line is another one."""

    def __init__(
        self, log: AttemptLog, run: str, attempt: int, changed: Callable[[], Awaitable[None]]
    ) -> None:
        self._log = log
        self._run = run
        self._attempt = attempt
        self._changed = changed
        self._adding = trio.Lock()
        self._known: AttemptNote | None = None

    async def say(self, text: str) -> None:
        """``text``, on one line and shortened, is what lists show of it: durable when this
        returns. Raises Unavailable."""
        line = one_line(shortened(text))
        await self._log.store(AttemptNote(run=self._run, attempt=self._attempt, says=line))
        await self._changed()

    async def add_usage(self, text: str) -> None:
        """Add up what ``text`` says, "NAME=NUMBER ...": durable when this returns. With "id=TEXT"
        what was said before with the same is not added again. Raises BadRequest, Unavailable."""
        more, token = read_usage(text)
        async with self._adding:
            if self._known is None:  # an earlier daemon may have stored some of this attempt
                self._known = await self._log.find(self._run, self._attempt)
            total, ids = dict(self._known.usage or {}), self._known.ids or []
            if token is not None and token in ids:
                return
            for name, value in more.items():
                total[name] = total.get(name, 0) + value
            if len(total) > MOST_NAMES:
                raise BadRequest(f"more than {MOST_NAMES} names: {', '.join(sorted(total))}")
            if token is not None:
                ids = [*ids, token][-MOST_IDS:]
            note = AttemptNote(run=self._run, attempt=self._attempt, usage=total, ids=ids)
            await self._log.store(note)
            self._known = note


def read_usage(text: str) -> tuple[dict[str, int | float], str | None]:
    """What was used, and the id of that, if there is one. Raises BadRequest."""
    found: dict[str, int | float] = {}
    token = None
    for part in text.split():
        name, equals, number = part.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise BadRequest(f"{part[:80]!a} is no NAME=NUMBER, as in input=1200")
        if name == "id":
            token = number[:LONGEST_ID]
            continue
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 <= value <= _MOST:
            raise BadRequest(f"{name} is no number from 0 on: {number[:40]!a}")
        found[name] = found.get(name, 0) + (int(value) if value.is_integer() else value)
    if not found:
        raise BadRequest("what was used is missing: NAME=NUMBER, as in input=1200 output=300")
    return found, token
