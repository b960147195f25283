"""The ends of aborted runs. An abort that a crash cut short gets its end at the next start.

That an end is stored is noted in the database, for many at once and after the abort was
answered. Without the note, output that was purged or had its time would come back at the
next start, as an end with nothing before it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

import trio

from ...config.schema import ChatRunner, Runner
from ...protocol.errors import StreamUnfit
from ...protocol.model import ABORTED, Outcome, Status
from ...protocol.subjects import out_subject
from ..output.publisher import Streams
from ..queue.engine import Durable
from .registry import Registry
from .run_end import Ended
from .runners.chat import CANCEL_LIMIT, Chat
from .settings import Settings

log = logging.getLogger("runctld.endings")


class Endings:
    """``run`` in a nursery."""

    def __init__(
        self, streams: Streams, durable: Durable, registry: Registry, settings: Settings
    ) -> None:
        self._settings = settings
        self._streams = streams
        self._registry = registry
        self._durable = durable
        self._stored: dict[str, int | None] = {}
        self._some = trio.Event()
        #: What is being written, and the event of its end.
        self._writing: dict[str, int | None] = {}
        self._written = trio.Event()

    async def write(self, thread: str, run: str, attempt: int) -> None:
        """The end of a run that was aborted and has no live attempt here, unless it has one.
        A stream that takes no records gets it later (``mend``)."""
        if attempt:
            with trio.move_on_after(CANCEL_LIMIT):
                await self._cancel_upstream(thread, run)
        try:
            await self._streams.end(thread, run, attempt, ABORTED)
        except StreamUnfit as unfit:
            log.warning("the end of run %s is not stored yet: %s", run, unfit)
        else:
            self.stored(run)

    async def _cancel_upstream(self, thread: str, run: str) -> None:
        """What the run's endpoint still does for an attempt that is dead."""
        if not any(isinstance(x, ChatRunner) and x.background for x in self._runners()):
            return
        found = await self._durable.rows.get(run)
        runner = None if found is None else self._settings.runner(found[0].runner)
        if runner is None or not isinstance(runner[1], Chat):
            return
        if await self._streams.has_end(thread, run):
            return
        place = await self._streams.find_place(out_subject(thread, run), "checkpoint")
        if place is not None and place.checkpoint is not None:
            await runner[1].give_up(place.checkpoint)

    def _runners(self) -> Collection[Runner]:
        return self._settings.runners.values()

    def hear_end(self, end: Ended) -> None:
        if end.written and end.stored and end.outcome.status is Status.ABORTED:
            self.stored(end.spec.run, end.outcome.ended_ms)

    def stored(self, run: str, gone: int | None = None) -> None:
        """The end of an aborted run is in the stream. ``gone``: when its processes were, in Unix
        milliseconds, if that is known."""
        self._stored[run] = gone
        self._some.set()

    async def run(self) -> None:
        while True:
            await self._some.wait()
            self._some = trio.Event()
            self._writing, self._stored = self._stored, {}
            await self._durable.attempts.note_ends(self._writing)
            self._writing = {}
            self._written.set()
            self._written = trio.Event()

    async def noted(self, run: str) -> None:
        """Wait until the run's row says of its end what is known here."""
        while run in self._stored or run in self._writing:
            await self._written.wait()

    async def follow_stream(self, max_age: float) -> None:
        """Write what others than the running runs are to write after a loss of the stream."""
        life = self._streams.life
        number = life.number
        while True:
            change = life.next_change  # one that comes meanwhile counts as well
            if life.unfit is None:
                await self._streams.store_deferred_ends(self._note_deferred)
                if life.number != number:
                    number = life.number
                    await self.mend(max_age)
            await change.wait()

    def _note_deferred(self, run: str, outcome: Outcome) -> None:
        if outcome.status is Status.ABORTED:
            self.stored(run, outcome.ended_ms)

    async def mend(self, max_age: float) -> None:
        """Of runs that were aborted in the last ``max_age`` seconds, which output lasts."""
        try:
            found = await self._durable.attempts.list_without_end(time.time() - max_age)
        except Exception as error:  # no run depends on it; the next start looks again
            log.warning("ends of aborted runs are not looked for: %s", error)
            return
        for run in found:
            # One that was aborted just now gets its end when its processes are gone, and one
            # whose output is not stored yet gets it behind that.
            if self._registry.get(run.run) is None and not self._streams.has_deferred_end(run.run):
                await self.write(run.thread, run.run, run.attempt)
