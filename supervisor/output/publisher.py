"""The writer's side of JetStream: ``Attempt`` (reset, append, end).

The protocol (docs/design.md, "One reply, even mid-watch"): a reset is one publish that rolls
the subject up; each further publish names the subject's last sequence, one in flight, and what
arrives meanwhile goes into the next record. Whoever loses that comparison to another attempt is
fenced and must stop.

A full stream refuses records (``discard=new``; what JetStream would discard by itself is
the head of the longest running run). Writers then wait in ``Room`` for retention.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import trio
import trio_asyncio

from ...protocol.errors import Fenced, StreamUnfit, Unavailable
from ...protocol.model import Outcome
from ...protocol.records import (
    SUMMARY_HEADER,
    Chunk,
    Chunks,
    End,
    NewerRecord,
    Record,
    Reset,
    StreamName,
    encode_record,
    summary,
)
from ...protocol.subjects import MAX_RECORD_BYTES, out_subject
from ..host.metrics import Meters
from .backpressure import Room
from .replay_buffer import Kept
from .stream_life import Life
from .tail import Tail, read_tail

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from ...config.schema import Config

log = logging.getLogger("runctld.stream")
aio = trio_asyncio.aio_as_trio

ACK_TIMEOUT = 2.0
#: Before a publish that was not stored is tried again, seconds.
RETRY = 0.05
#: Output that waits for its publish, per run, before the writer is held back.
MAX_BUFFERED = 1024 * 1024
#: The same of all runs together, as long as that leaves each ``LEAST_BUFFERED``.
ALL_BUFFERED = 32 * 1024 * 1024
LEAST_BUFFERED = 64 * 1024
#: A record's share of the stream, at most: each running run keeps its last one.
RECORD_SHARE = 64
LEAST_RECORD = 16 * 1024
#: An end that holds more than this share of the stream, or than a record may, leaves its
#: reply out.
END_SHARE = 8
#: Roughly what msgpack adds to a chunk.
CHUNK_OVERHEAD = 16
#: So many publishes in a row without an answer, while reads have theirs: it stores nothing.
UNANSWERED = 2
#: JetStream's "maximum bytes exceeded".
STORE_FAILED = 10077


class _Full(Exception):
    """The stream has no room for the record: surely not stored."""


class _Ack:
    """``there``: it has come, or ``error`` says why it will not."""

    def __init__(self) -> None:
        self.there = trio.Event()
        self.data = b""
        self.error: Exception | None = None


class Streams:
    """All output streams of this daemon, over one NATS connection."""

    def __init__(
        self,
        client: Client,
        room: Room,
        clear: Callable[[], Awaitable[None]] | None = None,
        renew: Callable[[], Awaitable[None]] | None = None,
        meters: Meters | None = None,
    ) -> None:
        """``clear`` is awaited before each publish: what it does not return from is not sent.
        ``renew``: replaces a server that stores nothing, where that is up to us."""
        self._nc = client
        self.meters = meters or Meters()
        self._room = room
        self._clear = clear
        self._renew = renew
        self._unanswered = 0
        self.max_record = MAX_RECORD_BYTES
        self.max_end = 2**62
        self.life = Life(client)
        self.life.told = self._poke
        self._inbox = client.new_inbox()
        self._waiting: dict[str, _Ack] = {}
        self._token = 0
        self._writers: set[Attempt] = set()
        #: Attempts whose work has ended, and how; their output is not stored yet.
        self._owed: dict[Attempt, Outcome] = {}

    @contextmanager
    def writing(self, attempt: Attempt) -> Iterator[None]:
        """One run more has output to store."""
        self._writers.add(attempt)
        try:
            yield
        finally:
            self._writers.discard(attempt)

    def _poke(self) -> None:
        for attempt in self._writers:
            attempt.look()

    def owe(self, attempt: Attempt, outcome: Outcome) -> None:
        """The attempt's work has ended so, and the stream takes no records: what is left of
        its output, and the end, are stored when it does (``pay``), which may be by now."""
        self._owed[attempt] = outcome
        self.life.tell()

    def owes(self, run: str) -> bool:
        """Whether the run's work has ended, and its end is not stored yet."""
        return any(attempt.run == run for attempt in self._owed)

    async def pay(self, paid: Callable[[str, Outcome], object]) -> None:
        """Store what is owed, as far as the stream lets us; ``paid`` is called with each run
        whose end is stored, and its outcome."""
        for attempt, outcome in list(self._owed.items()):
            try:
                await attempt.finish(outcome)
            except StreamUnfit:
                return
            except Fenced as fenced:
                log.warning("%s", fenced)
            else:
                paid(attempt.run, outcome)
            del self._owed[attempt]

    @property
    def most_buffered(self) -> int:
        """Bytes that may wait for their publish, of each run."""
        share = ALL_BUFFERED // max(1, len(self._writers))
        return min(MAX_BUFFERED, max(LEAST_BUFFERED, share))

    async def open(self, config: Config) -> None:
        """Subscribe for acks and see that the stream exists.

        Raises Unavailable; ConfigError, when it cannot serve us."""
        share = config.stream.max_bytes // RECORD_SHARE
        self.max_record = min(MAX_RECORD_BYTES, max(LEAST_RECORD, share))
        self.max_end = min(MAX_RECORD_BYTES, config.stream.max_bytes // END_SHARE)
        await aio(self._nc.subscribe)(self._inbox + ".*", cb=self._on_ack)
        await self.life.open(config)

    async def info(self) -> tuple[int, int]:
        """(bytes, messages) stored over all threads. Raises Unavailable."""
        found = await self.life.look()
        if found is None:
            raise Unavailable("JetStream does not answer")
        return found

    async def tail(self, subject: str) -> Tail:
        """The end of ``subject``, by leader reads; waits while NATS is away, or the stream
        is.

        Raises: Fenced, when a newer runctl wrote there."""
        while True:
            try:
                return await self.tail_now(subject)
            except StreamUnfit:
                await self.life.fit()

    async def tail_now(self, subject: str) -> Tail:
        """The same, but for a stream that is gone and cannot be made again by us: raises
        StreamUnfit."""
        while True:
            try:
                found: Tail = await aio(read_tail)(self._nc, subject, ACK_TIMEOUT)
            except NewerRecord as error:
                raise Fenced(f"{subject} holds a record {error}") from None
            except StreamUnfit:
                await self.life.hopeless()
            except Exception as error:
                log.debug("tail of %s: %r", subject, error)
                await trio.sleep(0.1)
            else:
                if self._unanswered >= UNANSWERED:
                    await self._stuck()
                return found

    async def last(self, subject: str) -> int:
        """The stream sequence of what is stored last under ``subject``; 0 when nothing is, or
        a newer runctl wrote it. Waits while NATS is away."""
        try:
            return (await self.tail_now(subject)).sequence
        except (Fenced, StreamUnfit):
            return 0

    async def _stuck(self) -> None:
        self._unanswered = 0
        if self._renew is not None:
            await self._renew()
        else:
            log.error("NATS answers, but stores nothing: see whether its disk is full; restart it")

    async def ended(self, thread: str, run: str) -> bool:
        """Whether the run's end is stored: it stands, whatever its row says yet."""
        try:
            return isinstance((await self.tail_now(out_subject(thread, run))).record, End)
        except (Fenced, StreamUnfit):  # written by a newer runctl; or nothing is there
            return False

    async def end(self, thread: str, run: str, attempt: int, outcome: Outcome) -> None:
        """Append the end of a run that has no live attempt here (aborted in the queue,
        dead, or aborted just before a crash), unless it has one, or a newer attempt.

        Raises: StreamUnfit."""
        subject = out_subject(thread, run)
        while True:
            try:
                tail = await self.tail_now(subject)
            except Fenced as error:
                log.warning("run %s gets no end: %s", run, error)
                return
            if isinstance(tail.record, End):
                return
            if tail.record is not None and tail.record.attempt > attempt:
                return
            # What is there stays: an attempt that has not begun its output does not void it.
            last = attempt if tail.record is None else tail.record.attempt
            record = End(run, last, _count(tail.record), time.time(), outcome)
            if await self.publish(subject, record, tail.sequence) is not None:
                return
            await self.refused()

    async def publish(
        self, subject: str, record: Record, expected: int, *, rollup: bool = False
    ) -> int | None:
        """One acked publish; waits while the stream is full. The sequence, or None when it
        was refused or not acked in time: the caller reads the tail back."""
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(expected),
            SUMMARY_HEADER: summary(record),
        }
        if rollup:
            headers["Nats-Rollup"] = "sub"
        data = encode_record(record)
        while True:
            if self._clear is not None:
                await self._clear()
            try:
                return await self._publish(subject, data, headers)
            except _Full:
                await self._room.wait(len(data))

    async def refused(self) -> None:
        """After a publish that was not stored: is that the stream's doing? Raises
        StreamUnfit."""
        await self.life.look()
        if self.life.unfit is not None:
            await self.life.hopeless()

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> int | None:
        self._token += 1
        token = f"{self._token:x}"
        ack = self._waiting[token] = _Ack()
        try:
            self._send(subject, data, f"{self._inbox}.{token}", headers)
            with trio.move_on_after(ACK_TIMEOUT) as limit:
                await ack.there.wait()
            if limit.cancelled_caught:
                raise TimeoutError
            if ack.error is not None:
                raise ack.error
            reply = json.loads(ack.data)
        except Exception as error:  # connection states; the read-back decides what happened
            log.debug("publish to %s: %r", subject, error)
            self._unanswered += isinstance(error, TimeoutError) and self._nc.is_connected
            return None
        finally:
            self._waiting.pop(token, None)
        self._unanswered = 0
        if "seq" in reply and "error" not in reply:
            self.life.stored(int(reply["seq"]))
        # Errors have a "seq" as well, of 0; and while a stream has no leader the answer is empty.
        if "error" in reply or "seq" not in reply:
            why = reply.get("error", {})
            log.debug("publish to %s refused: %s", subject, why or "no responders")
            if why.get("err_code") == STORE_FAILED:
                raise _Full
            return None
        return int(reply["seq"])

    def _send(self, subject: str, data: bytes, reply: str, headers: dict[str, str]) -> None:
        """nats-py's publish puts the message into its buffer, without waiting: run at once,
        here, it costs a third less than as a task of asyncio. Raises nats' errors, Unavailable."""
        publish = self._nc.publish(subject, data, reply=reply, headers=headers)
        try:
            publish.send(None)
        except StopIteration:
            return
        publish.close()
        raise Unavailable("too much waits to be sent to NATS")

    def lost(self) -> None:
        """The connection broke: acks that are still out will not come over it. Whoever
        waits for one reads the tail back at once."""
        for ack in self._waiting.values():
            ack.error = ConnectionResetError("the connection to NATS broke")
            ack.there.set()

    async def _on_ack(self, msg: Msg) -> None:
        ack = self._waiting.pop(msg.subject.rpartition(".")[2], None)
        if ack is not None:
            ack.data = msg.data or b"{}"
            ack.there.set()


def _count(record: Record | None) -> int:
    return record.seq + len(record.chunks) - 1 if isinstance(record, Chunks) else 0


class Attempt:
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
        self._kept: Kept | None = None
        self._seq = 0
        self._total = 0
        self._pending: list[Chunk] = []
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
        record = Reset(self.run, self._attempt, time.time(), self._executor, self._tty)
        self._kept = Kept(record)
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
            await self._streams.life.look()
            await self._streams.life.fit()

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

    async def pump(self) -> None:
        """Publish what was appended, one record in flight, until closed and empty. Once
        closed it returns as well when the stream takes no records: ``end`` says so."""
        try:
            with self._streams.writing(self):
                while self._pending or not self._closed.is_set():
                    await self._changed.wait()
                    self._changed = trio.Event()
                    await self._compare()
                    while self._pending:
                        await self._flush_one()
        except StreamUnfit as error:
            log.debug("run %s: %s", self.run, error)

    def look(self) -> None:
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

        Raises StreamUnfit, when the stream takes no records: ``Streams.owe`` it then."""
        if self._pending:
            raise StreamUnfit(self._streams.life.unfit or "the stream takes no records")
        if self._end is None:  # the same one each time, so that it is known when it is there
            if len((outcome.reply or "").encode()) > self._streams.max_end:
                outcome = msgspec.structs.replace(outcome, reply=None)
            self._end = End(self.run, self._attempt, self._seq, time.time(), outcome)
        await self._put(self._end)

    async def _flush_one(self) -> None:
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
        await self._put(Chunks(self._attempt, self._seq + 1, self._read_at, batch, total))
        self._total = total
        self._streams.meters.stored(count, size)
        del self._pending[:count]
        self._read_at = time.time()
        self._seq += count
        self._bytes -= size
        self._drained.set()
        self._drained = trio.Event()

    async def _put(self, record: Record) -> None:
        """Store ``record`` behind the last one of ours, whatever NATS goes through.

        A tail that is older than what was acked is either a read of before (a leader that
        has lost its quorum answers for a while), or the loss of what was acked. Writing
        again what follows it is right in both cases: where nothing was lost it is refused.
        Fenced is who finds another attempt's record, or one of ours that we did not write."""
        self._sent = record
        await self._compare()
        known = expected = self._sequence
        while self._sent is not None:
            done = await self._streams.publish(self._subject, record, expected)
            if done is not None:
                self._stored(record, done)
                return
            await self._until_fit()
            tail = await self._tail()
            if tail.record == record:
                self._stored(record, tail.sequence)
                return
            if self._life != self._streams.life.number:
                await self._compare()
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
                await self._again(tail)
                known = expected = self._sequence
            else:
                raise self._fenced("another attempt writes its stream")

    async def _until_fit(self) -> None:
        """Returns when the stream takes records, as far as one knows. Raises StreamUnfit
        when it does not and the work has ended: nobody is to wait for it on."""
        life = self._streams.life
        await life.look()
        while life.unfit is not None:
            if self._closed.is_set():
                await life.hopeless()
                continue
            async with trio.open_nursery() as nursery:

                async def either(wait: Callable[[], Awaitable[object]]) -> None:
                    await wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(either, life.fit)
                nursery.start_soon(either, self._closed.wait)

    async def _tail(self) -> Tail:
        """The subject's end. Raises StreamUnfit as ``_until_fit`` does."""
        while True:
            try:
                return await self._streams.tail_now(self._subject)
            except StreamUnfit:
                await self._until_fit()

    async def _compare(self) -> None:
        """After the stream was lost: see whether what we stored last is in the one that is
        there now, else write what is kept of it."""
        while self._life != (now := self._streams.life.number):
            await self._until_fit()
            tail, known = await self._tail(), self._sequence
            last = tail.record
            if last is not None and last.attempt > self._attempt:
                raise self._fenced("another attempt writes its stream")
            assert self._kept is not None
            if self._sent is not None and last == self._sent:
                self._stored(self._sent, tail.sequence)
                self._life = now
                continue
            there = tail.at == known and not self._kept.after(last)
            if there or await self._again(tail):
                self._life = now

    async def _again(self, tail: Tail) -> bool:
        """Write what follows ``tail``, as if it were lost; False as long as it is not all
        there, and then it is to be looked at again."""
        assert self._kept is not None
        if isinstance(tail.record, End) and tail.record not in self._kept:
            raise self._fenced("somebody else has written its end")
        at, lost = tail.sequence, self._kept.after(tail.record)
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

    def _stored(self, record: Record, sequence: int) -> None:
        self._sequence = sequence
        self._sent = None
        if self._kept is not None:
            self._kept.add(record)
