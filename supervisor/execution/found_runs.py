"""Runs whose processes outlived an earlier daemon: which of them go on, and what becomes of the
others."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

import msgspec
import trio

from ..processes.keeper_client import Keeper, KeeperLost
from ..processes.keeper_visit import About, Found

log = logging.getLogger("runctld")

#: So many daemons may take a run over and die within ``SHORT`` seconds without having stored
#: anything of it: what takes its daemon down is not to do so for ever. And so many may in an hour.
MOST_IN_VAIN, SHORT, MOST_AN_HOUR = 3, 60.0, 20


def is_harmful(about: About, now: float) -> bool:
    """Whether the run seems to take its daemons down. ``now``: Unix seconds."""
    if sum(at > now - 3600 for at, _ in about.adopted) >= MOST_AN_HOUR:
        return True
    in_vain, later, stored = 0, now, -1
    for at, size in reversed(about.adopted):
        if later - at > SHORT or (size >= 0 and stored not in (-1, size)):
            break
        in_vain, later, stored = in_vain + 1, at, max(size, stored)
    return in_vain >= MOST_IN_VAIN


class FoundRuns:
    """What ``keeper`` has found of runs."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._by_run: dict[str, Found] = {}
        for tree in keeper.found.values():
            if tree.about is None or tree.about.kind != "run" or tree.cut:
                continue
            if is_harmful(tree.about, time.time()):
                log.error(
                    "run %s seems to take its daemon down: it is ended, and counts as an attempt",
                    tree.about.run,
                )
            else:
                self._by_run[tree.about.run] = tree

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
                # Of a run that is over, what it left behind goes on, as it was to.
                left_behind = tree.about is None and tree.status is not None
                if tree.number not in stay and not left_behind:
                    nursery.start_soon(self._end, tree)
        for tree in self._by_run.values():
            if tree.about is not None:  # how much is stored of it is not known yet
                adopted = [*tree.about.adopted, (time.time(), -1)][-MOST_AN_HOUR:]
                tree.about = msgspec.structs.replace(tree.about, adopted=adopted)
                await self._keeper.describe(tree.number, tree.about)
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
