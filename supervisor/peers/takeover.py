"""A dead executor's unfinished runs go back to the queue, for its peers.

Every executor of a group looks for members that hold no lease and own unfinished runs.
After ``after`` seconds, and when what it may run without its lease has surely ended, one of
them takes the dead one's lease itself, which keeps it from starting meanwhile, and re-enqueues
what is unfinished. After a restart of PostgreSQL nobody holds a lease: what was seen before
that counts for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from ...config.schema import Config
from ...protocol.errors import Unavailable
from ..cluster.members import TREES_GONE, Members
from ..queue.engine import Durable

log = logging.getLogger("runctld.takeover")

POLL = 0.25
Tell = Callable[[], Awaitable[None]]


class Takeover:
    """``watch`` in a nursery; ``tell`` is called when there is new work for anybody."""

    def __init__(
        self, config: Config, executor: str, members: Members, durable: Durable, tell: Tell
    ) -> None:
        self._settings = config.takeover
        self._executor = executor
        self._members = members
        self._durable = durable
        self._tell = tell
        self._gone: dict[str, float] = {}
        self._session = 0

    async def watch(self) -> None:
        while True:
            try:
                for executor in await self._overdue():
                    await self._take(executor)
            except Unavailable as error:
                log.debug("%s", error)  # the lease decides whether we go on
            except Exception as error:
                why = self._durable.explain(error)
                if why is None:
                    raise
                log.warning("takeover: %s", why)
            await trio.sleep(POLL)

    async def _overdue(self) -> list[str]:
        """Members of our group that have been gone for long enough."""
        members = await self._members.all()
        now = trio.current_time()
        if self._session != self._members.sessions:
            self._session = self._members.sessions
            self._gone.clear()
        gone = {
            member.id: max(self._settings.after, member.grace + TREES_GONE)
            for member in members
            if member.group == self._settings.group
            and not member.alive
            and member.id != self._executor
        }
        self._gone = {executor: self._gone.get(executor, now) for executor in gone}
        return [x for x, since in self._gone.items() if now - since >= gone[x]]

    async def _take(self, executor: str) -> None:
        if executor not in await self._durable.rows.list_owners(hooks=True):
            return
        async with self._members.in_place_of(executor) as dead:
            if dead:
                session = self._members.sessions
                tokens = await self._durable.read_tokens_of(executor)
                await self._members.see_session(session)
                runs = await self._durable.reenqueue(executor, tokens)
                log.info("executor %s is gone: %d runs taken over", ascii(executor), runs)
        await self._tell()
        self._gone.pop(executor, None)

    async def hand_over(self) -> None:
        """At an orderly end, when nothing of our runs is alive any more."""
        tokens = await self._durable.read_tokens_of(self._executor)
        runs = await self._durable.reenqueue(self._executor, tokens)
        await self._members.leave()
        await self._tell()
        log.info("%d runs handed over", runs)
