"""Runs whose work is done elsewhere: their output is appended by gateways, over HTTP.

The daemon opens a run's output when its turn comes, which is what its writers wait for, and
waits until they have said its end there. It holds nothing: everything is in the stream, and the
next daemon, or another executor, goes on with the same attempt.
"""

from __future__ import annotations

import base64
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import trio

from ...config.schema import PushRunner
from ...config.schema import Runner as RunnerConfig
from ...config.units import format_duration
from ...protocol.errors import StreamUnfit
from ...protocol.model import ABORTED, Outcome, Status
from ...protocol.push import PushState
from ...protocol.records import Chunk, Chunks, End, Record, Reset, find_push
from ...protocol.subjects import out_subject
from ..host.logs import about
from ..output.publisher import Streams
from ..output.tail import Tail
from ..queue.attempt_log import AttemptNote
from ..queue.engine import Durable
from .registry import Live
from .run_end import Ended

log = logging.getLogger("runctld")

#: A writer tells of what is to be looked at. Should that be lost, it is seen after so many seconds.
LOOK = 60.0


class PushedRuns:
    def __init__(self, executor: str, streams: Streams, durable: Durable) -> None:
        self._executor = executor
        self._streams = streams
        self._durable = durable
        #: Those that are open here: set to have them looked at.
        self._open: dict[str, trio.Event] = {}

    def look(self, runs: Iterable[str] | None = None) -> None:
        """Something may have changed in the output of these, or of all."""
        for run in list(self._open) if runs is None else runs:
            if run in self._open:
                self._open[run].set()

    async def abort(self, live: Live) -> bool | None:
        """End it, unless its writer has by now: then False. None: it is not open here."""
        run = live.spec.run
        if run not in self._open:
            return None
        await self._streams.end(live.spec.thread, run, live.attempt, ABORTED)
        self.look([run])
        await live.gone.wait()
        return live.outcome is not None and live.outcome.status is Status.ABORTED

    async def run(
        self, live: Live, runner: RunnerConfig | None, wait_turn: Callable[[], Awaitable[None]]
    ) -> Ended | None:
        """From its turn to its end; None when the daemon stops. Raises Fenced."""
        spec = live.spec
        settings = runner if isinstance(runner, PushRunner) else PushRunner(spec.runner)
        outcome = None
        with live.scope:
            await wait_turn()
            self._open[spec.run] = trio.Event()
            try:
                outcome = await self._follow(live, settings)
            finally:
                del self._open[spec.run]
        if outcome is None and not live.aborting:
            return None
        decided = live.decide(outcome or ABORTED)
        stored = True
        try:
            await self._streams.end(spec.thread, spec.run, live.attempt, decided)
        except StreamUnfit as unfit:
            log.warning("its end is not stored: %s", unfit)
            stored = False
        live.end_written()
        with about(attempt=live.attempt):
            log.info("run %s%s", decided.status, f": {decided.error}" if decided.error else "")
        return Ended(spec, decided, written=True, stored=stored)

    async def _follow(self, live: Live, settings: PushRunner) -> Outcome:
        subject = out_subject(live.spec.thread, live.spec.run)
        with live.working():
            opened = False
            while True:
                self._open[live.spec.run] = trio.Event()
                tail = await self._streams.tail(subject)
                if isinstance(tail.record, End):
                    if not opened:
                        await self._count_back(live, tail.record)
                    return tail.record.outcome
                state = find_push(tail.record)
                if state is None:
                    await self._begin(live, settings, subject, tail, again=opened)
                    continue
                if not opened:
                    opened = True
                    await self._note_open(live, tail.record, state)
                if state.closing is not None:
                    return state.closing
                due, why = _find_deadline(state, settings)
                now = time.time()
                if now >= due:
                    await self._end(live, subject, tail, Outcome(Status.FAILED, error=why))
                    continue
                with trio.move_on_after(min(LOOK, due - now)):
                    await self._open[live.spec.run].wait()

    async def _begin(
        self, live: Live, settings: PushRunner, subject: str, tail: Tail, *, again: bool
    ) -> None:
        """The next step towards an open stream. ``again``: it was purged, or lost."""
        record = tail.record
        if isinstance(record, Reset):
            await self._publish(
                live, subject, self._make_first(live, settings, record, again), tail
            )
            return
        if record is not None:
            log.warning("what is stored of it is not of a run like it: it begins anew")
        reset = Reset(live.spec.run, live.attempt, time.time(), self._executor, push=True)
        await self._publish(live, subject, reset, tail)

    def _make_first(self, live: Live, settings: PushRunner, reset: Reset, again: bool) -> Chunks:
        spec = live.spec
        assert spec.push is not None
        given = spec.push.content_type or settings.content_type
        data = [] if again else [base64.b64decode(text) for text in spec.initial]
        state = PushState(
            msgspec.structs.replace(spec.push, content_type=given),
            int(reset.at * 1000),
            time.time(),
            nonce=secrets.token_hex(8),
            closing=Outcome(Status.SUCCEEDED) if spec.push.closed else None,
        )
        size = sum(map(len, data))
        chunks = [Chunk("stdout", one) for one in data]
        return Chunks(
            reset.attempt,
            1,
            time.time(),
            chunks,
            size,
            {"stdout": size} if size else {},
            push=state,
        )

    async def _publish(self, live: Live, subject: str, record: Record, tail: Tail) -> None:
        """Behind ``tail``, if that is still the last. Whoever reads it again sees what was done."""
        done = await self._streams.publish(
            subject, record, tail.sequence, rollup=isinstance(record, Reset)
        )
        if done is None:
            await self._streams.life.check()
            await self._streams.life.wait_until_fit()

    async def _end(self, live: Live, subject: str, tail: Tail, outcome: Outcome) -> None:
        """Unless something was appended since."""
        assert isinstance(tail.record, Chunks)
        last = tail.record
        count = last.seq + len(last.chunks) - 1
        state = find_push(last)
        assert state is not None
        push = state.behind(tail.at)
        end = End(live.spec.run, last.attempt, count, time.time(), outcome, push=push)
        await self._publish(live, subject, end, tail)

    async def _count_back(self, live: Live, record: Record) -> None:
        await self._durable.attempts.count_back(live.spec.run, live.attempt, record.attempt)

    async def _note_open(self, live: Live, record: Record | None, state: PushState) -> None:
        """It may have been open before: its attempt is that of the stream."""
        assert record is not None
        if record.attempt != live.attempt:
            await self._count_back(live, record)
            live.go_on([time.time()])
            with about(attempt=record.attempt):
                log.info("run goes on, as an earlier daemon began it")
        else:
            log.info("run started")
        live.go_back_to(record.attempt, state.epoch)
        await self._durable.attempts.log.note(
            AttemptNote(
                run=live.spec.run,
                attempt=record.attempt,
                executor=self._executor,
                began=state.epoch,
            )
        )


def _find_deadline(state: PushState, settings: PushRunner) -> tuple[float, str]:
    """Until when more is waited for, in Unix seconds, and why no longer."""
    due, why = math.inf, ""
    if settings.idle_timeout:
        due = state.appended + settings.idle_timeout
        shown = format_duration(settings.idle_timeout)
        why = f"nothing was appended for {shown} (idle_timeout)"
    if state.expires is not None and state.expires < due:
        due, why = state.expires, "its stream has expired (Stream-TTL, Stream-Expires-At)"
    return due, why
