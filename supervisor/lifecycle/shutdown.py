"""The orderly end: nothing new is begun, runs get their grace, and other executors are told.

Rows of unfinished runs stay as they are and are replayed by the next daemon of this
executor ID.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from ..api.metrics_endpoint import Scrape
from ..api.server import Control
from ..cluster.members import Members
from ..execution.registry import Registry
from ..execution.settings import Settings
from ..host.database_files import DatabaseFiles
from ..host.stop_times import LEFT, STOPPED
from ..peers.takeover import Takeover
from ..queue.engine import Durable
from ..upkeep.hooks import Hooks
from .foundation import Foundation
from .signals import Wishes

log = logging.getLogger("runctld")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """What is to be ended, in ``run``'s order."""

    base: Foundation
    settings: Settings
    registry: Registry
    durable: Durable
    control: Control
    scrape: Scrape | None
    hooks: Hooks | None
    members: Members | None
    takeover: Takeover | None
    database: DatabaseFiles | None

    async def run(self, wishes: Wishes) -> None:
        with trio.move_on_after(self.settings.longest_grace + STOPPED) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hasten, wishes, limit)
                await self._end_runs()
                nursery.cancel_scope.cancel()
        self.base.fence.leave_if_away()
        if not limit.cancelled_caught:
            await self._tell_executors()
        if self.members is not None:
            self.members.close()
        self.base.fence.leave_if_away()
        self.base.fence.guard(None)  # SQLite removes the log itself when all is closed
        with trio.move_on_after(1):
            await self.durable.close()
        if self.database is not None:
            self.database.close()

    async def _end_runs(self) -> None:
        if self.scrape is not None:
            self.scrape.stopping()
        await self.control.stop()
        self.registry.mark_stopping()
        await self.durable.stop_claiming()
        keeper, grace = self.base.keeper, self.settings.queue.stop_grace
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.registry.stop_all)
            nursery.start_soon(keeper.end_kept, grace)
        # A run that ended by itself meanwhile may have left some more.
        await keeper.end_kept(grace)
        if self.hooks is not None:
            await self.hooks.stop()

    async def _hasten(self, wishes: Wishes, limit: trio.CancelScope) -> None:
        await wishes.hurry.wait()
        self.base.keeper.hasten()
        limit.deadline = min(limit.deadline, trio.current_time() + STOPPED)

    async def _tell_executors(self) -> None:
        """Nothing of ours runs any more."""
        with trio.move_on_after(LEFT):
            try:
                if self.takeover is not None:
                    await self.takeover.hand_over()
                elif self.members and not await self._has_rows():
                    await self.members.leave()
                elif self.members:
                    await self.members.rest()
            except Exception as error:  # what is not handed over is taken over, or replayed
                log.warning("the runs were not handed over: %s", error)

    async def _has_rows(self) -> bool:
        return self.base.executor in await self.durable.rows.list_owners(hooks=True)
