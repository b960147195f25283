"""One attempt's writer: ``open`` (the reset) or ``go_on`` (from a checkpoint), ``append``, ``end``.

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

from ...protocol.errors import BadRequest, StreamUnfit
from ...protocol.model import Outcome
from ...protocol.records import Chunk, Chunks, Continue, End, Reset, StreamName
from ...protocol.subjects import out_subject
from .continuation import Place
from .publisher import Streams
from .record_chain import RecordChain
from .tail import Tail

log = logging.getLogger("runctld.stream")

#: Roughly what msgpack adds to a chunk.
CHUNK_OVERHEAD = 16


class _Checkpoint:
    """What is to be stored once all that was appended before is, or ``loose``: with it, and not
    at all where the record goes on behind it."""

    def __init__(self, data: bytes, *, loose: bool = False) -> None:
        self.data = data
        self.loose = loose
        self.stored = trio.Event()


class _Anew:
    """What was appended before is void once this is stored."""


class Writer:
    """One attempt of one run. ``open`` or ``go_on``, then ``pump`` in a nursery, ``append`` any
    number of times, ``close``, ``end`` once. Any of them raises Fenced when a newer attempt took
    over."""

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
        self.executor = executor
        self._tty = tty
        self._closed = trio.Event()
        self._chain = RecordChain(
            *(streams, run, self._subject, attempt, lambda: self._closed),
        )
        #: When the attempt's output began, in Unix seconds.
        self.began = 0.0
        #: Which attempt the run's end is of: an earlier one, where that had stored it already.
        self.ended_in = attempt
        self._seq = 0
        self._total = 0
        #: Bytes of each stream that are stored.
        self._of: dict[StreamName, int] = {}
        self._notice: Callable[[Mapping[StreamName, int]], None] | None = None
        self._pending: list[Chunk | _Checkpoint | _Anew] = []
        #: Set once the stream says again how much of the output it has, or had.
        self._mark: trio.Event | None = None
        self._bytes = 0
        self._read_at = 0.0
        self._end: End | None = None
        self._changed = trio.Event()
        self._drained = trio.Event()

    async def open(self) -> Outcome | None:
        """Reset the subject for this attempt; or the outcome to adopt, when an earlier
        attempt had already written its end."""
        self.began = time.time()
        record = Reset(self.run, self._attempt, self.began, self.executor, self._tty)
        # Before a first attempt there is nothing, unless NATS says so; then it is read.
        tail = Tail(0, None) if self._attempt == 1 else None
        while True:
            life = self._streams.life.number
            if tail is None:
                tail = await self._streams.tail(self._subject)
            last = tail.record
            if isinstance(last, End):
                return self._adopt_end(last)
            if isinstance(last, Reset) and last == record:
                self._chain.begin(record, tail.sequence, life)
                return None
            if last is not None and last.attempt >= self._attempt:
                why = f"attempt {last.attempt} is already in the stream"
                raise self._chain.fenced(why, last.attempt)
            done = await self._streams.publish(self._subject, record, tail.sequence, rollup=True)
            if done is not None:
                self._chain.begin(record, done, life)
                self._streams.meters.reset()
                return None
            tail = None
            await self._streams.life.check()
            await self._streams.life.wait_until_fit()

    async def go_on(
        self, find: Callable[[], Awaitable[Place | None]], place: Place | None
    ) -> Outcome | Place | None:
        """Continue where ``find`` says. ``place``: what it has said a moment ago. None when there
        is none any more, and nothing was done. An outcome, when the run's end is stored
        already. Raises Fenced."""
        self.began = time.time()
        record: Continue | None = None
        while place is not None:
            life = self._streams.life.number
            tail = await self._streams.tail(self._subject)
            last = tail.record
            if isinstance(last, End):
                return self._adopt_end(last)
            if record is None or last != record:
                if last is not None and last.attempt >= self._attempt:
                    why = f"attempt {last.attempt} is already in the stream"
                    raise self._chain.fenced(why, last.attempt)
                if tail.sequence > place.last:  # the dead one's last words came meanwhile
                    place = await find()
                    continue
                record = Continue(
                    *(self.run, self._attempt, place.after, self.began, self.executor),
                    *(self._tty, place.total, place.base, place.chunks),
                )
                done = await self._streams.publish(self._subject, record, tail.sequence)
            else:
                done = tail.sequence
            if done is not None:
                self._chain.begin(record, done, life)
                self._seq = place.after + len(place.chunks)
                self._total = place.total + sum(len(chunk.data) for chunk in place.chunks)
                await self._streams.remove_void(place)
                return place
            await self._streams.life.check()
            await self._streams.life.wait_until_fit()
            place = await find()
        return None

    async def adopt(self, at: float) -> Outcome | dict[StreamName, int]:
        """Go on with the output of this attempt, which another daemon of this executor began at
        ``at``: how many bytes of each stream are stored. None are after a purge: then the output
        begins anew with what is left of it. An outcome, when its end is stored already.

        What that daemon still has on its way to NATS is not stored from here on: an empty record
        goes before it. Raises Fenced."""
        while True:
            life = self._streams.life.number
            tail = await self._streams.tail(self._subject)
            last = tail.record
            if isinstance(last, End):
                return self._adopt_end(last)
            if last is not None and last.attempt > self._attempt:
                why = f"attempt {last.attempt} is already in the stream"
                raise self._chain.fenced(why, last.attempt)
            ours = last is not None and last.attempt == self._attempt
            began = at if ours else time.time()  # another time: watchers start over
            reset = Reset(self.run, self._attempt, began, self.executor, self._tty)
            seq = total = 0
            of: dict[StreamName, int] = {}
            if isinstance(last, Chunks) and ours:
                seq, total, of = last.seq + len(last.chunks) - 1, last.total, last.of
            elif isinstance(last, Continue) and ours:
                seq = last.after + len(last.chunks)
                total = last.total + sum(len(chunk.data) for chunk in last.chunks)
            fence = Chunks(self._attempt, seq + 1, time.time(), [], total, of)
            record = fence if ours else reset
            done = await self._streams.publish(
                self._subject, record, tail.sequence, rollup=not ours
            )
            if done is not None:
                self._chain.begin(reset, done, life)
                self.began, self._seq, self._total, self._of = began, seq, total, of
                return of
            await self._streams.life.check()
            await self._streams.life.wait_until_fit()

    def _adopt_end(self, end: End) -> Outcome:
        self._streams.meters.adopted()
        self.ended_in = end.attempt
        return end.outcome

    def skip(self, of: Mapping[StreamName, int]) -> None:
        """Output up to there is lost, of each of these streams: before the first ``append``. A
        chunk's number is left out, by which watchers know of it."""
        self._seq += 1
        self._of |= of

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

    async def checkpoint(self, data: bytes) -> None:
        """``data`` is stored with all that was appended before when this returns. Raises
        BadRequest, when it is more than a record may hold."""
        if len(data) > self._streams.max_record:
            raise BadRequest(
                f"the data has {len(data)} bytes; at most {self._streams.max_record}, as the stream"
                " is small (stream.max_bytes)"
            )
        mark = _Checkpoint(data)
        self._pending.append(mark)
        self._changed.set()
        await mark.stored.wait()

    async def append_with(self, stream: StreamName, data: bytes, checkpoint: bytes) -> None:
        """``append`` what ``checkpoint`` is the state after: whatever is stored of the two is
        stored at once."""
        await self.append(stream, data)
        self._pending.append(_Checkpoint(checkpoint, loose=True))

    def start_over(self) -> None:
        """What was appended so far is void: the attempt's output begins again."""
        self._pending.append(_Anew())
        self._changed.set()

    async def begin_anew(self) -> None:
        """What is appended from here on comes of other pipes: none of that is stored yet."""
        while self._pending:
            await self._drained.wait()
        self._of = {}
        await self.mark()

    async def mark(self) -> None:
        """Its records were deleted on purpose: store an empty one, or the next daemon would take
        what it still has of that output for such as was never stored."""
        if self._mark is None:
            self._mark = trio.Event()
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
                    await self._chain.resync()
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
        await self._chain.store(self._end)

    def _note_marked(self) -> None:
        if self._mark is not None:
            self._mark.set()
            self._mark = None

    async def _flush_one(self) -> None:
        if self._pending and isinstance(self._pending[0], _Anew):
            await self._reset()
            return
        mark = self._mark
        size = taken = 0
        most = self._streams.max_record
        batch: list[Chunk] = []
        checkpoint: _Checkpoint | None = None
        for item in self._pending:
            if isinstance(item, _Anew) or len(batch) >= 4096:
                break
            full = size + len(item.data) + CHUNK_OVERHEAD * len(batch) > most
            if isinstance(item, _Checkpoint):
                if batch and full and not item.loose:
                    break
                checkpoint = item
                taken += 1
                if not item.loose:
                    break
                continue
            if batch and full:
                break
            checkpoint = None
            taken += 1
            size += len(item.data)
            batch.append(item)
        count = len(batch)
        total = self._total + size  # counted once it is stored: until then it may be tried again
        of = dict(self._of)
        for chunk in batch:
            of[chunk.stream] = of.get(chunk.stream, 0) + len(chunk.data)
        record = Chunks(
            *(self._attempt, self._seq + 1, self._read_at or time.time(), batch, total, of),
            checkpoint=msgspec.UNSET if checkpoint is None else checkpoint.data,
        )
        await self._chain.store(record)
        self._total, self._of = total, of
        if checkpoint is not None:
            checkpoint.stored.set()
        if mark is self._mark:
            self._note_marked()
        if self._notice is not None:
            self._notice(of)
        self._streams.meters.stored(count, size)
        del self._pending[:taken]
        self._read_at = time.time()
        self._seq += count
        self._bytes -= size
        self._drained.set()
        self._drained = trio.Event()

    async def _reset(self) -> None:
        """The same attempt, at another time: watchers start over."""
        self.began = time.time()
        await self._chain.restart(
            Reset(self.run, self._attempt, self.began, self.executor, self._tty)
        )
        self._streams.meters.reset()
        del self._pending[0]
        self._seq = self._total = 0
        self._of = {}
        self._drained.set()
        self._drained = trio.Event()
