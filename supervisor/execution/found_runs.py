"""Runs whose processes outlived an earlier daemon: which of them go on, and what becomes of the
others."""

from __future__ import annotations

import logging
from collections.abc import Collection

import trio

from ..processes.keeper_client import Keeper, KeeperLost
from ..processes.keeper_visit import Found

log = logging.getLogger("runctld")


class FoundRuns:
    """What ``keeper`` has found of runs."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._by_run = {
            tree.about.run: tree
            for tree in keeper.found.values()
            if tree.about is not None and tree.about.kind == "run" and not tree.ending
        }

    def list_attempts(self) -> dict[str, int]:
        """Which attempt of each run there is."""
        return {run: tree.about.attempt for run, tree in self._by_run.items() if tree.about}

    async def settle(self, going_on: Collection[str]) -> None:
        """End all but those, whose rows say that they are running. Whatever else there is has no
        run that waits for it: it was aborted, or has ended, or another attempt is to come."""
        self._by_run = {run: tree for run, tree in self._by_run.items() if run in going_on}
        stay = {tree.number for tree in self._by_run.values()}
        async with trio.open_nursery() as nursery:
            for tree in list(self._keeper.found.values()):
                if tree.number not in stay and tree.about is not None:
                    nursery.start_soon(self._end, tree)
        if self._by_run:
            log.info("%d runs go on that outlived an earlier daemon", len(self._by_run))

    def take(self, run: str, attempt: int) -> Found | None:
        """The tree of this attempt, for whoever goes on with it, once."""
        tree = self._by_run.get(run)
        if tree is None or tree.about is None or tree.about.attempt != attempt:
            return None
        return self._by_run.pop(run)

    async def give_up(self, tree: Found) -> None:
        """Nobody has gone on with it."""
        if tree.number in self._keeper.found and not self._keeper.broken_off:
            with trio.CancelScope(shield=True):
                await self._end(tree)

    async def _end(self, tree: Found) -> None:
        try:
            await self._keeper.end_found(tree, 0)
        except KeeperLost:
            log.debug("tree %d went with its keeper", tree.number)
