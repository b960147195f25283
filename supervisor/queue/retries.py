"""What the database refuses is tried again, by us and by DBOS.

By itself DBOS tries again when a connection breaks. What PostgreSQL refuses once (a query that
somebody cancels, a lock that was waited for too long, a serialization failure, a server that is
read-only while it fails over), and what SQLite refuses for want of disk or descriptors, it
gives up: the outcome of a run that ends meanwhile would be lost.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TypeVar

import sqlalchemy as sa
import trio

from . import dbos_internals

log = logging.getLogger("runctld.retries")

T = TypeVar("T")

#: Until when DBOS tries again, on the monotonic clock. Whoever waits for an answer is told.
until: ContextVar[float] = ContextVar("until", default=math.inf)
#: For an answer, seconds. DBOS's pause before the last try comes on top.
PATIENCE = 4.0
#: What is tried for as long as it takes is mentioned again after so many seconds.
SAY_AGAIN = 60.0
#: The pause between two tries of it, seconds: the first, and the longest.
FIRST, LONGEST = 0.2, 5.0
_WRONG = (
    sa.exc.ProgrammingError,
    sa.exc.IntegrityError,
    sa.exc.DataError,
    sa.exc.NotSupportedError,
)


def may_pass(error: BaseException) -> bool:
    """Whether the same may succeed later: nothing is wrong with the statement or its data."""
    if isinstance(error, sa.exc.DBAPIError):
        return error.connection_invalidated or not isinstance(error, _WRONG)
    return isinstance(error, sa.exc.TimeoutError)


def teach_dbos(stopping: threading.Event) -> None:
    """Have DBOS try again whatever may_pass, within ``until``."""

    def decide(error: Exception, theirs: bool) -> bool:
        if time.monotonic() > until.get():
            return False
        if theirs:
            return True
        # A disk has no room within seconds: whoever waits is told at once.
        waits = until.get() < math.inf and isinstance(_original(error), sqlite3.Error)
        return may_pass(error) and not waits and not stopping.is_set()

    dbos_internals.decide_retries(decide)


def _original(error: Exception) -> object:
    return getattr(error, "orig", None)


def reason(error: Exception) -> str:
    """In one line; of the database's errors what it said itself."""
    said = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    return str(said or error).strip().partition("\n")[0]


class Complaint:
    """Says that ``what`` cannot be stored (or otherwise ``done``): the first time, and then
    each minute. ``heard`` is told why each time."""

    def __init__(
        self,
        what: str,
        done: str = "stored",
        *,
        level: int = logging.WARNING,
        heard: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._what, self._done = what, done
        self._level, self._heard = level, heard
        self._began = 0.0
        self._said = -math.inf

    def refused(self, why: str) -> None:
        self._heard(why)
        now = time.monotonic()
        self._began = self._began or now
        if now - self._said >= SAY_AGAIN:
            self._said = now
            words = "%s cannot be %s (%s); it is tried again"
            log.log(self._level, words, self._what, self._done, why)

    def done(self) -> None:
        if self._began:
            took = time.monotonic() - self._began
            log.info("%s is %s, after %.0f s", self._what, self._done, took)


async def until_done(
    work: Callable[[], Awaitable[T]],
    complaint: Complaint,
    stopping: threading.Event,
    *,
    refusals: type[Exception] = Exception,
    pause: Callable[[float], Awaitable[None]] = trio.sleep,
) -> T:
    """``work``, tried again after each of ``refusals`` for as long as it takes, with pauses that
    grow. When it is refused while the daemon stops, this does not return: no run fails by that,
    and the next daemon makes up for it. ``pause``: of seconds, in whichever loop this is called.

    Raises: whatever else ``work`` does."""
    wait = FIRST
    while True:
        try:
            result = await work()
        except refusals as error:
            if stopping.is_set():
                await pause(math.inf)
            complaint.refused(reason(error))
        else:
            complaint.done()
            return result
        await pause(wait)
        wait = min(2 * wait, LONGEST)
