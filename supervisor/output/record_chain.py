"""The records of one attempt in the stream, each behind the one before, whatever NATS goes
through: what it refuses, what it loses in spite of its acknowledgement, and what others write.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from ...protocol.errors import Fenced, StreamUnfit
from ...protocol.records import Continue, End, Record, Reset
from .publisher import Streams
from .replay_buffer import ReplayBuffer
from .tail import Tail

log = logging.getLogger("runctld.stream")

#: Before a publish that was not stored is tried again, seconds.
RETRY = 0.05


class RecordChain:
    """``begin``, once the first record is stored, then ``store`` any number of times."""

    def __init__(
        self,
        streams: Streams,
        run: str,
        subject: str,
        attempt: int,
        closed: Callable[[], trio.Event],
    ) -> None:
        """``closed``: set when the attempt's work has ended, and nobody is to wait for it on."""
        self._streams = streams
        self._run = run
        self._subject = subject
        self._attempt = attempt
        self._closed = closed
        self._sequence = 0
        self._life = 0
        self._kept: ReplayBuffer | None = None
        #: What is being stored, and was not acknowledged.
        self._sent: Record | None = None

    def begin(self, first: Reset | Continue, sequence: int, life: int) -> None:
        """``sequence``: of the last record that is stored. ``life``: the stream's number when that
        was looked for. ``first`` is written again before what else may have to be."""
        self._kept, self._sequence, self._life = ReplayBuffer(first), sequence, life

    def fenced(self, why: str, found: int | None = None) -> Fenced:
        self._streams.meters.fenced()
        return Fenced(f"run {self._run}: {why}", found)

    async def store(self, record: Record) -> None:
        """Store ``record`` behind the last one of ours, whatever NATS goes through.

        A tail that is older than what was acked is either a read of before (a leader that
        has lost its quorum answers for a while), or the loss of what was acked. Writing
        again what follows it is right in both cases: where nothing was lost it is refused.
        Fenced is who finds another attempt's record, or one of ours that we did not write."""
        self._sent = record
        await self.resync()
        known = expected = self._sequence
        while self._sent is not None:
            done = await self._streams.publish(
                self._subject, record, expected, rollup=isinstance(record, Reset)
            )
            if done is not None:
                self._note_stored(record, done)
                return
            await self._wait_until_fit()
            tail = await self._tail()
            if tail.record == record:
                self._note_stored(record, tail.sequence)
                return
            if self._life != self._streams.life.number:
                await self.resync()
                known = expected = self._sequence
            elif tail.record is None:
                if expected == tail.sequence:
                    await trio.sleep(RETRY)
                expected = tail.sequence  # purged, or expired while the run was silent
            elif tail.record.attempt == self._attempt and tail.at == known:
                if expected == tail.sequence:
                    await trio.sleep(RETRY)  # not stored; NATS is away
                expected = tail.sequence  # behind what others published there
            elif tail.record.attempt <= self._attempt and tail.at < known:
                await self._rewrite_after(tail)
                known = expected = self._sequence
            else:
                raise self.fenced("another attempt writes its stream")

    async def restart(self, first: Reset) -> None:
        """Store ``first`` in place of all that is stored of the run."""
        await self.store(first)
        self._kept = ReplayBuffer(first)

    async def _wait_until_fit(self) -> None:
        """Returns when the stream takes records, as far as one knows. Raises StreamUnfit
        when it does not and the work has ended: nobody is to wait for it on."""
        life = self._streams.life
        await life.check()
        while life.unfit is not None:
            if self._closed().is_set():
                await life.wait_for_change()
                continue
            async with trio.open_nursery() as nursery:

                async def either(wait: Callable[[], Awaitable[object]]) -> None:
                    await wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(either, life.wait_until_fit)
                nursery.start_soon(either, self._closed().wait)

    async def _tail(self) -> Tail:
        """The subject's end. Raises StreamUnfit as ``_wait_until_fit`` does."""
        while True:
            try:
                return await self._streams.tail_now(self._subject)
            except StreamUnfit:
                await self._wait_until_fit()

    async def resync(self) -> None:
        """After the stream was lost: see whether what we stored last is in the one that is
        there now, else write what is kept of it."""
        while self._life != (now := self._streams.life.number):
            await self._wait_until_fit()
            tail, known = await self._tail(), self._sequence
            last = tail.record
            if last is not None and last.attempt > self._attempt:
                raise self.fenced("another attempt writes its stream")
            assert self._kept is not None
            if self._sent is not None and last == self._sent:
                self._note_stored(self._sent, tail.sequence)
                self._life = now
                continue
            there = tail.at == known and not self._kept.records_after(last)
            if there or await self._rewrite_after(tail):
                self._life = now

    async def _rewrite_after(self, tail: Tail) -> bool:
        """Write what follows ``tail``, as if it were lost; False as long as it is not all
        there, and then it is to be looked at again."""
        assert self._kept is not None
        if isinstance(tail.record, End) and tail.record not in self._kept:
            raise self.fenced("somebody else has written its end")
        at, lost = tail.sequence, self._kept.records_after(tail.record)
        for record in lost:
            rollup = isinstance(record, Reset)
            done = await self._streams.publish(self._subject, record, at, rollup=rollup)
            if done is None:
                await trio.sleep(RETRY)
                return False
            at = done
        log.warning("run %s: NATS had lost %d stored records; rewritten", self._run, len(lost))
        self._sequence = at
        return True

    def _note_stored(self, record: Record, sequence: int) -> None:
        self._sequence = sequence
        self._sent = None
        if self._kept is not None:
            self._kept.add(record)
