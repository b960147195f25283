"""The orderly end: nothing new is begun, runs get their grace, and other executors are told.

Rows of unfinished runs stay as they are and are replayed by the next daemon of this
executor ID.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from ..api.presence import Presence
from ..api.server import Control
from ..execution.work import note_stopped
from ..host.database_files import DatabaseFiles
from ..host.stop_times import CLOSE_WAIT, LEFT, STOPPED
from ..peers.takeover import Takeover
from ..processes.process import wait_gone
from ..upkeep.hooks import Hooks
from .core import Core
from .signals import Wishes

log = logging.getLogger("runctld")


@dataclass(frozen=True, slots=True)
class Shutdown:
    """What is to be ended besides ``core``."""

    core: Core
    control: Control
    hooks: Hooks | None
    takeover: Takeover | None
    database: DatabaseFiles | None
    presence: Presence | None

    async def run(self, wishes: Wishes) -> None:
        core, fence = self.core, self.core.base.fence
        if wishes.leave and self._may_leave(wishes):
            await self._leave(wishes)
            if wishes.leave:
                return
            core.base.keeper.broken_off = False
        with trio.move_on_after(core.settings.longest_grace + STOPPED) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hasten, wishes, limit)
                await self._end_runs()
                nursery.cancel_scope.cancel()
        await self._leave_if_away()
        if not limit.cancelled_caught:
            await self._tell_executors()
        if core.members is not None:
            core.members.close()
        await self._leave_if_away()
        fence.guard(None)  # SQLite removes the log itself when all is closed
        with trio.move_on_after(1):
            await core.durable.close()
        if self.database is not None:
            self.database.close()

    async def _leave_if_away(self) -> None:
        """We were told to stop: the keeper does not wait for another daemon of ours."""
        base = self.core.base
        if not base.fence.holds():
            with trio.move_on_after(CLOSE_WAIT):
                await base.keeper.say_bye()
                await wait_gone(base.keeper.origin.pid)
            base.fence.leave_if_away()

    def _may_leave(self, wishes: Wishes) -> bool:
        base = self.core.base
        groups = base.keeper.cgroups
        if not base.outlives or wishes.again or groups is None or not groups.hinder_restart():
            return base.outlives
        log.warning(
            "a systemd older than 254 cannot start a daemon beside runs with limits: all are ended,"
            " and replayed; `runctl restart` lets them go on"
        )
        return False

    async def _leave(self, wishes: Wishes) -> None:
        """What runs goes on, for the next daemon to adopt, unless we are told to stop meanwhile."""
        if self.core.scrape is not None:
            self.core.scrape.stopping()
        await self.control.stop()
        await self.core.durable.stop_claiming()
        if wishes.leave:
            await self._note_stopped()
        if wishes.leave:
            await self.core.base.keeper.leave()

    async def _note_stopped(self) -> None:
        """What ends with us, and begins again under the next daemon: chats, and what waits."""
        base, attempts = self.core.base, self.core.durable.attempts
        stay = base.keeper.list_runs()
        with trio.move_on_after(LEFT):
            async with trio.open_nursery() as nursery:
                for live in self.core.registry:
                    if live.spec.run not in stay:
                        note = note_stopped(live, base.executor)
                        nursery.start_soon(attempts.log.note, note)

    async def _end_runs(self) -> None:
        if self.core.scrape is not None:
            self.core.scrape.stopping()
        await self.control.stop()
        if self.presence is not None:
            await self.presence.withdraw()
        self.core.registry.mark_stopping()
        await self.core.durable.stop_claiming()
        keeper, grace = self.core.base.keeper, self.core.settings.queue.stop_grace
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.core.registry.stop_all)
            nursery.start_soon(keeper.end_kept, grace)
        # A run that ended by itself meanwhile may have left some more.
        await keeper.end_kept(grace)
        if self.hooks is not None:
            await self.hooks.stop()

    async def _hasten(self, wishes: Wishes, limit: trio.CancelScope) -> None:
        await wishes.hurry.wait()
        self.core.base.keeper.hasten()
        limit.deadline = min(limit.deadline, trio.current_time() + STOPPED)

    async def _tell_executors(self) -> None:
        """Nothing of ours runs any more."""
        with trio.move_on_after(LEFT):
            try:
                if self.takeover is not None:
                    await self.takeover.hand_over()
                elif self.core.members and not await self._has_rows():
                    await self.core.members.leave()
                elif self.core.members:
                    await self.core.members.rest()
            except Exception as error:  # what is not handed over is taken over, or replayed
                log.warning("the runs were not handed over: %s", error)

    async def _has_rows(self) -> bool:
        return self.core.base.executor in await self.core.durable.rows.list_owners(hooks=True)
