"""One attempt's life: it waits for what is before it on its thread, opens the run's output, does
the work, writes the end, and tells whoever listens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio

from ...protocol.errors import Fenced, StreamUnfit
from ...protocol.model import Outcome, RunSpec, Status
from ..host.logs import about
from ..output.publisher import Streams
from ..output.writer import Writer
from ..queue.engine import Durable
from .attempt_start import Start, open_output
from .found_runs import FoundRuns
from .pushed_runs import PushedRuns
from .registry import Live, Registry
from .run_end import Ended
from .runners.protocol import Remains
from .thread_order import Order
from .work import Work

log = logging.getLogger("runctld")


class Attempts:
    """``dispatch`` is called for each attempt."""

    def __init__(
        self,
        executor: str,
        registry: Registry,
        order: Order,
        streams: Streams,
        durable: Durable,
        work: Work,
        found: FoundRuns,
        pushed: PushedRuns,
        on_end: Sequence[Callable[[Ended], None]],
    ) -> None:
        """``found``: runs that outlived an earlier daemon. ``pushed``: those whose work is done
        elsewhere. ``on_end``: told of each end in turn,
        before anybody else can know."""
        self._registry = registry
        self._order = order
        self._streams = streams
        self._durable = durable
        self._executor = executor
        self._work = work
        self._found = found
        self._pushed = pushed
        self._on_end = on_end

    async def dispatch(self, spec: RunSpec, attempt: int, unreadable: str | None = None) -> Outcome:
        """How the run ended. ``unreadable``: why its record cannot be read, if it cannot. When
        the daemon stops it neither returns nor raises, so that the row stays unfinished."""
        ended, fenced = await self._run_fenced(spec, attempt, unreadable)
        while fenced is not None and fenced.found is not None:
            counted = await self._durable.attempts.renumber(spec.run, attempt, fenced.found)
            if counted is None:
                break
            attempt = counted
            with about(thread=spec.thread, run=spec.run, attempt=attempt):
                log.warning("the database is older than the output, as from a backup: counting on")
            ended, fenced = await self._run_fenced(spec, attempt, unreadable)
        if ended is None:
            await trio.sleep_forever()
            raise AssertionError
        return ended.outcome

    async def _run_fenced(
        self, spec: RunSpec, attempt: int, unreadable: str | None
    ) -> tuple[Ended | None, Fenced | None]:
        """The attempt's end, or why it had to stop; neither when the daemon stops."""
        ended, fenced = None, None
        with about(thread=spec.thread, run=spec.run, attempt=attempt):
            with self._registry.start(spec, attempt) as live:
                broken: Exception | None = None
                try:
                    ended = await self._run(live, unreadable)
                except* Fenced as group:
                    (fenced,) = (e for e in group.exceptions[:1] if isinstance(e, Fenced))
                    log.warning("%s", fenced)
                except* Exception as group:
                    broken = group
                if broken is not None:
                    ended = await self._end_broken(live, broken)
            if ended is not None:
                for tell in self._on_end:
                    tell(ended)
        return ended, fenced

    async def _run(self, live: Live, unreadable: str | None) -> Ended | None:
        """None when the daemon stops."""
        spec = live.spec
        runner = self._work.choose(live)
        if spec.push is not None and unreadable is None:
            turn = partial(self._wait_turn, live)
            return await self._pushed.run(live, None if runner is None else runner[0], turn)
        writer = Writer(
            *(self._streams, spec.thread, spec.run, live.attempt, self._executor),
            tty=live.window is not None,
        )
        opened = False
        outcome = remains = None
        start = Start()
        found = self._found.take(spec.run, live.attempt)
        if found is not None and found.about is not None:
            live.go_on([at for at, _ in found.about.adopted])
        async with trio.open_nursery() as nursery:
            try:
                with live.scope:
                    await self._wait_turn(live)
                    if found is None or found.about is None:
                        start = await open_output(self._streams, self._work, live, writer, runner)
                        outcome = start.refused
                    else:
                        await self._found.note_adopted(found)
                        there = await writer.adopt(found.about.began)
                        if isinstance(there, Outcome):
                            start = Start(adopted=there)
                        else:
                            remains = Remains(found, there, writer.skip)
                    nursery.start_soon(self._durable.attempts.log.note, *start.notes)
                    if start.adopted is start.refused is None:
                        opened = True
                        nursery.start_soon(writer.pump)
                        if live.window is not None:
                            nursery.start_soon(live.window.watch)
                        outcome = await self._work.do(
                            live, writer, runner, unreadable, remains, start.resumption
                        )
            finally:
                if found is not None:
                    await self._found.give_up(found, over=start.adopted is not None)
            if live.window is not None:
                live.window.close()
            writer.close()
        if start.adopted is not None:
            await self._durable.attempts.count_back(spec.run, live.attempt, writer.ended_in)
            return Ended(spec, live.decide(start.adopted), written=False, stored=True)
        if outcome is None and not live.aborting:
            await self._work.note_stop(live, writer)
            return None
        decided = live.decide(outcome or Outcome(Status.ABORTED))
        if start.refused is not None:
            stored = await self._append_end(live, decided)
        else:
            stored = opened and await self._write_end(live, writer, decided)
        log.info("run %s%s", decided.status, f": {decided.error}" if decided.error else "")
        return Ended(spec, decided, opened or start.refused is not None, stored)

    async def _wait_turn(self, live: Live) -> None:
        """Until nothing of its thread is before it. Cancels it when it is not to begin."""
        for other in self._registry.before(live):
            live.wait_behind(other.spec.run)
            await other.gone.wait()
        if not await self._order.clear(live):
            live.abort()
        live.wait_behind(None)

    async def _write_end(self, live: Live, writer: Writer, decided: Outcome) -> bool:
        """Whether the stream has it by now."""
        stored = True
        try:
            await writer.end(decided)
        except StreamUnfit as unfit:  # the row says how it ended, and the stream later on
            log.warning("its end is not stored yet: %s", unfit)
            self._streams.defer_end(writer, decided)
            stored = False
        live.end_written()
        await self._work.forget(live)
        return stored

    async def _end_broken(self, live: Live, error: Exception) -> Ended | None:
        """The attempt was ended by a fault of our own: nobody must wait for it on."""
        if self._work.is_ending(live):
            return None
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        log.error("the attempt was ended by an internal error", exc_info=error)
        decided = live.decide(self._work.make_internal_error(error))
        try:
            stored = await self._append_end(live, decided)
        except Fenced as fenced:
            log.warning("%s", fenced)
            return None
        return Ended(live.spec, decided, True, stored)

    async def _append_end(self, live: Live, decided: Outcome) -> bool:
        """Behind whatever is stored of the run: whether the stream has it by now."""
        try:
            await self._streams.end(live.spec.thread, live.spec.run, live.attempt, decided)
        except StreamUnfit as unfit:
            log.warning("its end is not stored: %s", unfit)
            return False
        return True
