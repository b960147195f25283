"""Which finished runs stay listed: by age, by count. The database stays bounded.

* age: a run is forgotten ``max_age`` after its end. On a thread that was used since, or
  has a run to do, the newest runs stay: as many as its next chat turn may refer to.
* count: of all finished runs the newest ``max_runs`` stay.

Their output has limits of its own (``retention``). Several executors may do this at the
same time: what is gone already is not there to be deleted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import trio

from ...config.schema import ChatRunner, History, Runner
from ..queue.engine import Durable

log = logging.getLogger("runctld.housekeeping")

#: Rows deleted in one transaction: other writers wait for it.
AT_ONCE = 200
#: More than the limit may be there by this share of it: one look serves many runs.
SLACK = 0.01
#: Longest sleep: a machine that slept, or whose clock was set, is not late by more.
LONGEST = 3600.0
#: One look serves what ends within so many seconds.
PACE = 1.0
#: Seconds until another try, when the database fails.
PAUSE = 5.0


class Housekeeping:
    """``run`` in a nursery. ``runners``: those that are configured now."""

    def __init__(
        self, limits: History, durable: Durable, runners: Callable[[], Mapping[str, Runner]]
    ) -> None:
        self._limits = limits
        self._durable = durable
        self._runners = runners
        durable.on_recorded = self._note_recorded
        self._ended = 0
        self._due = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_count)
            nursery.start_soon(self._keep_age)

    def _note_recorded(self) -> None:
        self._ended += 1
        if self._ended > self._limits.max_runs * SLACK:
            self._due.set()

    def _context(self) -> int:
        """How many of a thread's runs its next chat turn may refer to."""
        chats = (r for r in self._runners().values() if isinstance(r, ChatRunner))
        return max((chat.history for chat in chats), default=0)

    async def _keep_count(self) -> None:
        most = self._limits.max_runs
        while most:
            self._ended = 0
            self._due = trio.Event()
            try:
                excess = await self._durable.history.count_finished() - most
                if excess > 0:
                    await self._forget(await self._durable.history.list_oldest(excess))
            except Exception as error:  # the database is away
                log.debug("finished runs were not counted: %r", error)
                await trio.sleep(PAUSE)
                continue
            await self._due.wait()
            await trio.sleep(PACE)

    async def _keep_age(self) -> None:
        """Look when the oldest end is due."""
        limit = self._limits.max_age
        while True:
            now = time.time()
            try:
                history = self._durable.history
                await self._forget(await history.list_before(now - limit, self._context()))
                oldest = await history.find_oldest_end(now - limit)
            except Exception as error:
                log.debug("age was not looked at: %r", error)
                oldest = now - limit + PAUSE
            due = min(oldest, now) + limit
            await trio.sleep(min(LONGEST, max(due - time.time(), limit * SLACK)))

    async def _forget(self, runs: list[str]) -> None:
        for start in range(0, len(runs), AT_ONCE):
            await self._durable.forget(runs[start : start + AT_ONCE])
        if runs:
            log.info("%d finished runs were forgotten", len(runs))
            await self._durable.give_back_space()
