"""One attempt's writer: ``open`` (the reset), ``append``, ``end``.

The protocol (docs/design.md, "One reply, even mid-watch"): a reset is one publish that rolls
the subject up; each further publish names the subject's last sequence, one in flight, and what
arrives meanwhile goes into the next record. Whoever loses that comparison to another attempt is
fenced and must stop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import trio

from ...protocol.errors import Fenced, StreamUnfit
from ...protocol.model import Outcome
from ...protocol.records import Chunk, Chunks, End, Record, Reset, StreamName
from ...protocol.subjects import out_subject
from .publisher import Streams
from .replay_buffer import ReplayBuffer
from .tail import Tail

log = logging.getLogger("runctld.stream")

#: Before a publish that was not stored is tried again, seconds.
RETRY = 0.05
#: Roughly what msgpack adds to a chunk.
CHUNK_OVERHEAD = 16


class Writer:
    """One attempt of one run. ``open``, then ``pump`` in a nursery, ``append`` any number
    of times, ``close``, ``end`` once. Any of them raises Fenced when a newer attempt took over."""

    def __init__(
        self,
        streams: Streams,
        thread: str,
        run: str,
        attempt: int,
        executor: str,
        tty: bool = False,
    ) -> None:
        self._streams = streams
        self._subject = out_subject(thread, run)
        self.run = run
        self._attempt = attempt
        self._executor = executor
        self._tty = tty
        self._sequence = 0
        self._kept: ReplayBuffer | None = None
        #: When the attempt's output began, in Unix seconds.
        self.began = 0.0
        self._seq = 0
        self._total = 0
        #: Bytes of each stream that are stored.
        self._of: dict[StreamName, int] = {}
        self._notice: Callable[[Mapping[StreamName, int]], None] | None = None
        self._pending: list[Chunk] = []
        #: Set once the stream says again how much of the output it has, or had.
        self._mark: trio.Event | None = None
        self._bytes = 0
        self._read_at = 0.0
        self._end: End | None = None
        #: What is being stored, and was not acknowledged.
        self._sent: Record | None = None
        self._closed = trio.Event()
        self._life = streams.life.number
        self._changed = trio.Event()
        self._drained = trio.Event()

    async def open(self) -> Outcome | None:
        """Reset the subject for this attempt; or the outcome to adopt, when an earlier
        attempt had already written its end."""
        self.began = time.time()
        record = Reset(self.run, self._attempt, self.began, self._executor, self._tty)
        self._kept = ReplayBuffer(record)
        # Before a first attempt there is nothing, unless NATS says so; then it is read.
        tail = Tail(0, None) if self._attempt == 1 else None
        while True:
            self._life = self._streams.life.number
            if tail is None:
                tail = await self._streams.tail(self._subject)
            last = tail.record
            if isinstance(last, End):
                self._streams.meters.adopted()
                return last.outcome
            if isinstance(last, Reset) and last == record:
                self._sequence = tail.sequence
                return None
            if last is not None and last.attempt >= self._attempt:
                why = f"attempt {last.attempt} is already in the stream"
                raise self._fenced(why, last.attempt)
            done = await self._streams.publish(self._subject, record, tail.sequence, rollup=True)
            if done is not None:
                self._sequence = done
                self._streams.meters.reset()
                return None
            tail = None
            await self._streams.life.check()
            await self._streams.life.wait_until_fit()

    async def adopt(self, at: float) -> Outcome | dict[StreamName, int]:
        """Go on with the output of this attempt, which another daemon of this executor began at
        ``at``: how many bytes of each stream are stored. None are after a purge: then the output
        begins anew with what is left of it. An outcome, when its end is stored already.

        What that daemon still has on its way to NATS is not stored from here on: an empty record
        goes before it. Raises Fenced."""
        while True:
            self._life = self._streams.life.number
            tail = await self._streams.tail(self._subject)
            last = tail.record
            if isinstance(last, End):
                self._streams.meters.adopted()
                return last.outcome
            if last is not None and last.attempt > self._attempt:
                why = f"attempt {last.attempt} is already in the stream"
                raise self._fenced(why, last.attempt)
            ours = last is not None and last.attempt == self._attempt
            began = at if ours else time.time()  # another time: watchers start over
            reset = Reset(self.run, self._attempt, began, self._executor, self._tty)
            seq = total = 0
            of: dict[StreamName, int] = {}
            if isinstance(last, Chunks) and ours:
                seq, total, of = last.seq + len(last.chunks) - 1, last.total, last.of
            fence = Chunks(self._attempt, seq + 1, time.time(), [], total, of)
            record = fence if ours else reset
            done = await self._streams.publish(
                self._subject, record, tail.sequence, rollup=not ours
            )
            if done is not None:
                self._kept, self.began = ReplayBuffer(reset), began
                self._sequence, self._seq, self._total, self._of = done, seq, total, of
                return of
            await self._streams.life.check()
            await self._streams.life.wait_until_fit()

    def skip(self, of: Mapping[StreamName, int]) -> None:
        """Output up to there is lost, of each of these streams: before the first ``append``. A
        chunk's number is left out, by which watchers know of it."""
        self._seq += 1
        self._of |= of

    def _fenced(self, why: str, found: int | None = None) -> Fenced:
        self._streams.meters.fenced()
        return Fenced(f"run {self.run}: {why}", found)

    async def append(self, stream: StreamName, data: bytes) -> None:
        """Add one chunk; waits while more than ``most_buffered`` bytes are unacked."""
        while self._bytes > self._streams.most_buffered:
            await self._drained.wait()
        most = self._streams.max_record
        for start in range(0, len(data), most):
            piece = data[start : start + most]
            if not self._pending:
                self._read_at = time.time()
            self._pending.append(Chunk(stream, piece))
            self._bytes += len(piece)
        self._changed.set()

    async def mark(self) -> None:
        """Its records were deleted on purpose: store an empty one, or the next daemon would take
        what it still has of that output for such as was never stored."""
        self._mark = self._mark or trio.Event()
        self._changed.set()
        await self._mark.wait()

    def watch_stored(self, notice: Callable[[Mapping[StreamName, int]], None]) -> None:
        """Have ``notice`` told how many bytes of each stream are stored, whenever some more are."""
        self._notice = notice

    async def pump(self) -> None:
        """Publish what was appended, one record in flight, until closed and empty. Once
        closed it returns as well when the stream takes no records: ``end`` says so."""
        try:
            with self._streams.writing(self):
                while self._pending or not self._closed.is_set():
                    await self._changed.wait()
                    self._changed = trio.Event()
                    await self._resync()
                    while self._pending or self._mark is not None:
                        await self._flush_one()
        except StreamUnfit as error:
            log.debug("run %s: %s", self.run, error)
        finally:
            self._note_marked()

    def notice_stream_change(self) -> None:
        """The stream may be another one, or serve again."""
        self._changed.set()

    def close(self) -> None:
        """No more appends: ``pump`` returns when all is stored. It must not be cancelled
        instead: a publish in flight would be taken for somebody else's."""
        self._closed.set()
        self._changed.set()

    async def finish(self, outcome: Outcome) -> None:
        """Store what is left, and the end, of an attempt whose ``end`` raised StreamUnfit.
        Raises it again as long as that is so."""
        while self._pending:
            await self._flush_one()
        await self.end(outcome)

    async def end(self, outcome: Outcome) -> None:
        """Append the end record, after ``close`` and ``pump``. A reply that would take too
        much of the stream, or that NATS would not take, is left out: it is needed there
        only if the daemon dies right now, and then the thread's later turns do without it.

        Raises StreamUnfit, when the stream takes no records: ``Streams.defer_end`` it then."""
        if self._pending:
            raise StreamUnfit(self._streams.life.unfit or "the stream takes no records")
        if self._end is None:  # the same one each time, so that it is known when it is there
            if len((outcome.reply or "").encode()) > self._streams.max_end:
                outcome = msgspec.structs.replace(outcome, reply=None)
            self._end = End(self.run, self._attempt, self._seq, time.time(), outcome)
        await self._store(self._end)

    def _note_marked(self) -> None:
        if self._mark is not None:
            self._mark.set()
            self._mark = None

    async def _flush_one(self) -> None:
        mark = self._mark
        size = count = 0
        most = self._streams.max_record
        for chunk in self._pending:
            full = size + len(chunk.data) + CHUNK_OVERHEAD * count > most
            if (count and full) or count >= 4096:
                break
            size += len(chunk.data)
            count += 1
        batch = self._pending[:count]
        total = self._total + size  # counted once it is stored: until then it may be tried again
        of = dict(self._of)
        for chunk in batch:
            of[chunk.stream] = of.get(chunk.stream, 0) + len(chunk.data)
        await self._store(Chunks(self._attempt, self._seq + 1, self._read_at, batch, total, of))
        self._total, self._of = total, of
        if mark is self._mark:
            self._note_marked()
        if self._notice is not None:
            self._notice(of)
        self._streams.meters.stored(count, size)
        del self._pending[:count]
        self._read_at = time.time()
        self._seq += count
        self._bytes -= size
        self._drained.set()
        self._drained = trio.Event()

    async def _store(self, record: Record) -> None:
        """Store ``record`` behind the last one of ours, whatever NATS goes through.

        A tail that is older than what was acked is either a read of before (a leader that
        has lost its quorum answers for a while), or the loss of what was acked. Writing
        again what follows it is right in both cases: where nothing was lost it is refused.
        Fenced is who finds another attempt's record, or one of ours that we did not write."""
        self._sent = record
        await self._resync()
        known = expected = self._sequence
        while self._sent is not None:
            done = await self._streams.publish(self._subject, record, expected)
            if done is not None:
                self._note_stored(record, done)
                return
            await self._wait_until_fit()
            tail = await self._tail()
            if tail.record == record:
                self._note_stored(record, tail.sequence)
                return
            if self._life != self._streams.life.number:
                await self._resync()
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
                raise self._fenced("another attempt writes its stream")

    async def _wait_until_fit(self) -> None:
        """Returns when the stream takes records, as far as one knows. Raises StreamUnfit
        when it does not and the work has ended: nobody is to wait for it on."""
        life = self._streams.life
        await life.check()
        while life.unfit is not None:
            if self._closed.is_set():
                await life.wait_for_change()
                continue
            async with trio.open_nursery() as nursery:

                async def either(wait: Callable[[], Awaitable[object]]) -> None:
                    await wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(either, life.wait_until_fit)
                nursery.start_soon(either, self._closed.wait)

    async def _tail(self) -> Tail:
        """The subject's end. Raises StreamUnfit as ``_wait_until_fit`` does."""
        while True:
            try:
                return await self._streams.tail_now(self._subject)
            except StreamUnfit:
                await self._wait_until_fit()

    async def _resync(self) -> None:
        """After the stream was lost: see whether what we stored last is in the one that is
        there now, else write what is kept of it."""
        while self._life != (now := self._streams.life.number):
            await self._wait_until_fit()
            tail, known = await self._tail(), self._sequence
            last = tail.record
            if last is not None and last.attempt > self._attempt:
                raise self._fenced("another attempt writes its stream")
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
            raise self._fenced("somebody else has written its end")
        at, lost = tail.sequence, self._kept.records_after(tail.record)
        for record in lost:
            rollup = isinstance(record, Reset)
            done = await self._streams.publish(self._subject, record, at, rollup=rollup)
            if done is None:
                await trio.sleep(RETRY)
                return False
            at = done
        log.warning("run %s: NATS had lost %d stored records; rewritten", self.run, len(lost))
        self._sequence = at
        return True

    def _note_stored(self, record: Record, sequence: int) -> None:
        self._sequence = sequence
        self._sent = None
        if self._kept is not None:
            self._kept.add(record)
