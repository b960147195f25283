"""Runs whose processes outlived an earlier daemon: which of them go on, and what becomes of the
others."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

import msgspec
import trio

from ..processes.keeper_client import Keeper
from ..processes.keeper_link import KeeperLost
from ..processes.keeper_visit import About, Found

log = logging.getLogger("runctld")

#: So many daemons may take a run over and die within ``SHORT`` seconds without having stored
#: anything of it: what takes its daemon down is not to do so for ever. And so many may in an hour.
MOST_IN_VAIN, SHORT, MOST_AN_HOUR = 3, 60.0, 100


def is_harmful(about: About, now: float) -> bool:
    """Whether the run seems to take its daemons down. ``now``: Unix seconds."""
    adopted = [(at, size) for at, size in about.adopted if at >= about.calm_since]
    if sum(at > now - 3600 for at, _ in adopted) >= MOST_AN_HOUR:
        return True
    # Before the adoption number ``since`` something was stored: earlier ones were not in vain.
    since, stored = 0, -1
    for n, (_, size) in enumerate(adopted):
        if size < 0:
            continue
        if stored not in (-1, size):
            since = n
        stored = size
    in_vain, later = 0, now
    for at, _ in reversed(adopted[since:]):
        if later - at > SHORT:
            break
        in_vain, later = in_vain + 1, at
    return in_vain >= MOST_IN_VAIN


class FoundRuns:
    """What ``keeper`` has found of runs."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._by_run: dict[str, Found] = {}
        self._taken = trio.Event()
        for tree in keeper.found.values():
            if tree.about is None or tree.about.kind != "run" or tree.cut:
                continue
            if not keeper.found_left and is_harmful(tree.about, time.time()):
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
                left_behind = tree.about is None and tree.kept
                if tree.number not in stay and not left_behind:
                    nursery.start_soon(self._end, tree, 0.0)
        if not self._by_run:
            self._taken.set()
        else:
            log.info("%d runs go on that outlived an earlier daemon", len(self._by_run))

    def take(self, run: str, attempt: int) -> Found | None:
        """The tree of this attempt, for whoever goes on with it, once."""
        tree = self._by_run.get(run)
        if tree is None or tree.about is None or tree.about.attempt != attempt:
            return None
        now = time.time()  # how much is stored of it is not known yet
        tree.about = msgspec.structs.replace(
            tree.about,
            adopted=[*tree.about.adopted, (now, -1)][-MOST_AN_HOUR:],
            calm_since=now if self._keeper.found_left else tree.about.calm_since,
        )
        del self._by_run[run]
        if not self._by_run:
            self._taken.set()
        return tree

    async def wait_taken(self, seconds: float) -> None:
        """Until somebody goes on with each, and an abort finds it. What nobody takes within
        ``seconds`` is ended: its row has changed meanwhile."""
        with trio.move_on_after(seconds):
            await self._taken.wait()
        for run in list(self._by_run):
            log.warning("nothing goes on with run %s: what is there of it is ended", run)
            await self._end(self._by_run.pop(run), 0.0)

    async def note_adopted(self, tree: Found) -> None:
        """Should we die from here on, it may be the run's doing."""
        if tree.about is not None:
            await self._keeper.describe(tree.number, tree.about)

    async def give_up(self, tree: Found, *, over: bool) -> None:
        """End it, if nobody has gone on with it. ``over``: its run has ended, and what was to be
        kept of it is."""
        if tree.number not in self._keeper.found or self._keeper.broken_off:
            return
        with trio.CancelScope(shield=True):
            if over and tree.kept:
                await self._keeper.forget_found(tree)
            else:
                await self._end(tree, tree.about.grace if tree.about else 0.0)

    async def _end(self, tree: Found, grace: float) -> None:
        try:
            await self._keeper.end_found(tree, grace)
        except KeeperLost:
            log.debug("tree %d went with its keeper", tree.number)
