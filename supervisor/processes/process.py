"""The root of a process tree, as whoever runs it sees it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import trio

from .keeper_link import KeeperLost
from .keeper_visit import About

if TYPE_CHECKING:
    from .keeper_client import Keeper


class Left(NamedTuple):
    """What a root left behind: each as "name (pid)", ``MOST_NAMED`` at most and then "...".
    ``ended``: what was ended with its tree; ``kept``: what goes on."""

    ended: list[str]
    kept: list[str]


class Process:
    """The root of a tree. ``pid``: its process id, which is also its session."""

    def __init__(self, keeper: Keeper, tree: int, pid: int) -> None:
        self._keeper = keeper
        self._tree = tree
        self.pid = pid
        self._status: int | None = None
        self._exited = trio.Event()
        #: Once it has ended: "limit", if it was killed since its tree had all the memory that
        #: it may have; "machine", if it was killed since there was none left; else "".
        self.starved = ""

    async def wait(self) -> int:
        """Exit code of the root, or minus the signal that ended it. Raises KeeperLost."""
        await self._exited.wait()
        if self._status is None:
            raise KeeperLost(self._keeper.stopped)
        return self._status

    def note_exit(self, status: int, starved: str) -> None:
        """How it ended is known."""
        self._status, self.starved = status, starved
        self._exited.set()

    async def forget(self) -> None:
        """The next daemon need not be told of it."""
        await self._keeper.forget(self._tree)

    async def drop(self, names: Sequence[str]) -> None:
        """What is kept of it for the next daemon by these ``names`` is of no more use."""
        await self._keeper.drop(self._tree, names)

    async def describe(self, about: About) -> None:
        """What the next daemon is told of it."""
        await self._keeper.describe(self._tree, about)

    async def end(self, grace: float, *, keep: bool = False) -> Left:
        """TERM the whole tree, KILL it after ``grace`` seconds; returns when it is
        verified empty, however long that takes. May be called again, also at the same
        time: a shorter grace then hastens all. Cancelling the call does not cancel what
        it began. With ``keep`` what has left the root's session goes on, until it is ended
        by another call, by ``end_kept``, or with the keeper. Raises KeeperLost."""
        return await self._keeper.end_process(self, self._tree, grace, keep)

    def note_lost(self) -> None:
        """Its keeper is gone: nobody knows how it ends."""
        self._exited.set()


async def wait_gone(pid: int) -> None:
    """Until this process, which is there or was a moment ago, has ended. Returns at once where
    the system does not tell of it."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return
    try:
        await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
