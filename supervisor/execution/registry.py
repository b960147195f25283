"""The runs in flight on this executor, and their abort handles. Touches nothing durable.

``Live.abort`` is the wish, ``Live.gone`` the fact: it is set when the run's work,
process tree included, has ended. Only methods of ``Live`` change it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import trio

from ...protocol.model import ABORTED, TRANSITIONS, Outcome, RunSpec, Status, unix_ms
from ..processes.terminal_size import Window

#: So many times that a run was taken over are told.
MOST_TOLD = 20


@dataclass(eq=False)
class Live:
    """A run in flight. ``outcome`` is decided once, by ``decide``."""

    spec: RunSpec
    attempt: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    gone: trio.Event = field(default_factory=trio.Event)
    aborting: bool = False
    stopping: bool = False
    outcome: Outcome | None = None
    #: Its work is gone, and the end of its stream says so.
    ended: bool = False
    began: float = field(default_factory=time.monotonic)
    #: When its work began, and when it was gone, in Unix milliseconds.
    started_ms: int | None = None
    ended_ms: int | None = None
    #: When daemons took it over, in Unix milliseconds.
    adopted_ms: list[int] = field(default_factory=list)
    #: The run of its thread whose processes have to be gone before this one begins.
    behind: str | None = None
    #: Of a run on a terminal.
    window: Window | None = None

    def begin_abort(self) -> bool:
        """From now on this run can only end as aborted; False when it has ended already."""
        if self.outcome is not None and self.outcome.status is not Status.ABORTED:
            return False
        self.aborting = True
        return True

    def take_back_abort(self) -> None:
        """It is not aborted after all: it goes on, unless it has ended meanwhile."""
        self.aborting = False

    def abort(self) -> None:
        """End its work. It ends as aborted, if it has not ended already."""
        self.begin_abort()
        self.scope.cancel()

    def stop(self) -> None:
        """End its work for a daemon that stops: it has no outcome, and is to be replayed."""
        self.stopping = True
        self.scope.cancel()

    def go_on(self, adopted: Sequence[float]) -> None:
        """Its work outlived the daemon that began it, and maybe others. ``adopted``: when each of
        the next ones took it over, in Unix seconds."""
        self.adopted_ms = [int(at * 1000) for at in adopted[-MOST_TOLD:]]

    def go_back_to(self, attempt: int, started_ms: int) -> None:
        """It goes on with that attempt, whose work began then: perhaps under an earlier daemon."""
        self.attempt, self.started_ms = attempt, started_ms

    def wait_behind(self, run: str | None) -> None:
        """It waits for the processes of ``run`` before it begins; for nothing with None."""
        self.behind = run

    def show_in(self, window: Window) -> None:
        """It has a terminal of its own."""
        self.window = window

    @contextmanager
    def working(self, since: float | None = None) -> Iterator[None]:
        """While its work lasts, process tree included. ``since``: Unix seconds, of work that an
        earlier daemon has begun. Raises RuntimeError the second time."""
        if self.started_ms is not None:
            raise RuntimeError(f"the work of run {self.spec.run} has begun already")
        self.started_ms = unix_ms() if since is None else int(since * 1000)
        try:
            yield
        finally:
            self.ended_ms = unix_ms()

    def end_written(self) -> None:
        """The end of its stream is written, or will be. Raises RuntimeError before ``decide``."""
        if self.outcome is None:
            raise RuntimeError(f"nobody knows how run {self.spec.run} has ended")
        self.ended = True

    @property
    def aborted(self) -> bool:
        """It ended as aborted, and everybody can know."""
        return self.ended and self.outcome is not None and self.outcome.status is Status.ABORTED

    def decide(self, outcome: Outcome) -> Outcome:
        """How the run ended, and when; an abort that was wished for before wins. Raises
        ValueError, when a running run does not end so."""
        if outcome.status not in TRANSITIONS[Status.RUNNING] or not outcome.status.terminal:
            raise ValueError(f"a run does not end as {outcome.status}")
        if self.outcome is None:
            self.outcome = msgspec.structs.replace(
                ABORTED if self.aborting else outcome,
                started_ms=outcome.started_ms or self.started_ms,
                ended_ms=outcome.ended_ms or self.ended_ms or unix_ms(),
                adopted_ms=outcome.adopted_ms or self.adopted_ms,
            )
        return self.outcome


class Registry:
    def __init__(self) -> None:
        self._changed = trio.Event()
        self._live: dict[str, Live] = {}
        #: Of each thread in the order in which they came.
        self._threads: dict[str, list[Live]] = {}
        self._doomed: set[str] = set()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._live)

    def changed(self) -> trio.Event:
        """Set when a run comes or goes, or ``touch`` says that others are waiting."""
        return self._changed

    def touch(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def __iter__(self) -> Iterator[Live]:
        return iter(list(self._live.values()))

    def get(self, run: str) -> Live | None:
        return self._live.get(run)

    def of(self, thread: str) -> list[Live]:
        """The runs of ``thread`` that are here, in the order in which they came."""
        return list(self._threads.get(thread, []))

    def before(self, live: Live) -> list[Live]:
        """The runs of the same thread that came before ``live`` and are still here. A
        row that was aborted frees its thread before its process tree is gone."""
        there = self._threads[live.spec.thread]
        return there[: there.index(live)]

    @contextmanager
    def dooming(self, run: str) -> Iterator[None]:
        """While its row is made terminal a run that is not here can only end as aborted,
        should it begin in that moment."""
        self._doomed.add(run)
        try:
            yield
        finally:
            self._doomed.discard(run)

    @contextmanager
    def start(self, spec: RunSpec, attempt: int) -> Iterator[Live]:
        """Enter a run for as long as its work lasts."""
        live = Live(spec, attempt, stopping=self._stopping, aborting=spec.run in self._doomed)
        if self._stopping:
            live.stop()
        self._live[spec.run] = live
        there = self._threads.setdefault(spec.thread, [])
        there.append(live)
        self.touch()
        try:
            yield live
        finally:
            if self._live.get(spec.run) is live:
                del self._live[spec.run]
            there.remove(live)
            if not there:
                del self._threads[spec.thread]
            self.touch()
            live.gone.set()

    def mark_stopping(self) -> None:
        """From here on no run fails by what the stop does to it. They are not stopped yet."""
        self._stopping = True
        for live in self._live.values():
            live.stopping = True

    async def stop_all(self) -> None:
        """Stop every run's work and wait until it is gone. Rows stay to be replayed."""
        self.mark_stopping()
        runs = list(self._live.values())
        for live in runs:
            live.stop()
        for live in runs:
            await live.gone.wait()
