"""Publishing to JetStream, with an acknowledgement for each record, and reading the end of a
run's output back, which decides what a publish without one has done.

A full stream refuses records (``discard=new``; what JetStream would discard by itself is
the head of the longest running run). Writers then wait in ``Backpressure`` for retention.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio
import trio_asyncio

from ...config.nats_internals import publish_now
from ...protocol.errors import Fenced, StreamUnfit, Unavailable
from ...protocol.model import Outcome
from ...protocol.records import (
    SUMMARY_HEADER,
    Chunk,
    Chunks,
    Continue,
    End,
    NewerRecord,
    Record,
    encode_record,
    find_push,
    summary,
)
from ...protocol.subjects import LEAST_RECORD, MAX_RECORD_BYTES, RECORD_SHARE, out_subject
from ..host.metrics import Meters
from .backpressure import Backpressure
from .continuation import Place, Unit, find_end, find_place, remove_void
from .inventory import Stored
from .stream_life import StreamLife
from .tail import Tail, read_first, read_tail

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from ...config.schema import Config
    from .writer import Writer

T = TypeVar("T")

log = logging.getLogger("runctld.stream")
aio = trio_asyncio.aio_as_trio

ACK_TIMEOUT = 2.0
#: Output that waits for its publish, per run, before the writer is held back.
MAX_BUFFERED = 1024 * 1024
#: The same of all runs together, as long as that leaves each ``LEAST_BUFFERED``.
ALL_BUFFERED = 32 * 1024 * 1024
LEAST_BUFFERED = 64 * 1024
#: An end that holds more than this share of the stream, or than a record may, leaves its
#: reply out.
END_SHARE = 8
#: So many publishes in a row without an answer, while reads have theirs: it stores nothing.
UNANSWERED = 2
#: A purge waits so long for what is written to say that it was purged, seconds.
MARKED = 5.0
#: Records that are read at once, each of ``MAX_RECORD_BYTES`` at most.
READ_AT_ONCE = 16
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
        room: Backpressure,
        wait_lease_valid: Callable[[], Awaitable[None]] | None = None,
        replace_server: Callable[[], Awaitable[None]] | None = None,
        meters: Meters | None = None,
    ) -> None:
        """``wait_lease_valid`` is awaited before each publish, which is not sent before it
        returns. ``replace_server`` replaces one that stores nothing, where that is up to us."""
        self._nc = client
        self._stored = Stored(client)
        self.meters = meters or Meters()
        self._room = room
        self._wait_lease_valid = wait_lease_valid
        self._replace_server = replace_server
        self._unanswered = 0
        #: When the last of them was given up.
        self._silent = 0.0
        self.max_record = MAX_RECORD_BYTES
        self.max_end = 2**62
        self.life = StreamLife(client)
        self.life.on_change = self._notice_stream_change
        self._inbox = client.new_inbox()
        self._waiting: dict[str, _Ack] = {}
        self._token = 0
        self._writers: set[Writer] = set()
        #: Attempts whose work has ended, and how; their output is not stored yet.
        self._deferred: dict[Writer, Outcome] = {}

    @contextmanager
    def writing(self, attempt: Writer) -> Iterator[None]:
        """One run more has output to store."""
        self._writers.add(attempt)
        try:
            yield
        finally:
            self._writers.discard(attempt)

    async def mark_purged(self, runs: Collection[str]) -> None:
        """The records of these were deleted on purpose, as far as there were any: what is written
        here says so to the next daemon, within ``MARKED`` seconds."""
        with trio.move_on_after(MARKED):
            async with trio.open_nursery() as nursery:
                for attempt in self._writers:
                    if attempt.run in runs:
                        nursery.start_soon(attempt.mark)

    def _notice_stream_change(self) -> None:
        for attempt in self._writers:
            attempt.notice_stream_change()

    def defer_end(self, attempt: Writer, outcome: Outcome) -> None:
        """The attempt's work has ended so, and the stream takes no records: what is left of
        its output, and the end, are stored when it does, which may be by now
        (``store_deferred_ends``)."""
        self._deferred[attempt] = outcome
        self.life.announce_change()

    def has_deferred_end(self, run: str) -> bool:
        """Whether the run's work has ended, and its end is not stored yet."""
        return any(attempt.run == run for attempt in self._deferred)

    async def store_deferred_ends(self, paid: Callable[[str, Outcome], object]) -> None:
        """Store what is owed, as far as the stream lets us; ``paid`` is called with each run
        whose end is stored, and its outcome."""
        for attempt, outcome in list(self._deferred.items()):
            try:
                await attempt.finish(outcome)
            except StreamUnfit:
                return
            except Fenced as fenced:
                log.warning("%s", fenced)
            else:
                paid(attempt.run, outcome)
            del self._deferred[attempt]

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
        found = await self.life.check()
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
                await self.life.wait_until_fit()

    async def tail_now(self, subject: str) -> Tail:
        """The same, but for a stream that is gone and cannot be made again by us: raises
        StreamUnfit."""
        while True:
            try:
                found: Tail = await aio(read_tail)(self._nc, subject, ACK_TIMEOUT)
            except NewerRecord as error:
                raise Fenced(f"{subject} holds a record {error}") from None
            except StreamUnfit:
                await self.life.wait_for_change()
            except Exception as error:
                log.debug("tail of %s: %r", subject, error)
                await trio.sleep(0.1)
            else:
                if self._unanswered >= UNANSWERED:
                    await self._stuck()
                return found

    async def find_first(self, subject: str) -> Record | None:
        """Its first record; None when that is none, or cannot be read now."""
        try:
            found: Record | None = await aio(read_first)(self._nc, subject, ACK_TIMEOUT)
        except Exception as error:
            log.debug("beginning of %s: %r", subject, error)
            return None
        return found

    async def find_place(self, subject: str, unit: Unit) -> Place | None:
        """Where the next attempt can go on. Waits while NATS is away, or the stream is."""
        place = None
        if unit != "character":
            place = await self._insist(partial(find_place, self._stored, subject))
        if place is None and unit != "checkpoint":
            place = await self._insist(partial(find_end, self._stored, subject, unit))
        return place

    async def _insist(self, read: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await read()
            except Unavailable as error:
                log.debug("%s", error)
                await self.life.check()
                await self.life.wait_until_fit()
                await trio.sleep(0.1)

    async def read_valid(self, place: Place) -> AsyncIterator[list[Chunk]]:
        """The output up to there, some at a time; waits while NATS is away."""
        for at in range(0, len(place.valid), READ_AT_ONCE):
            for record in await self._insist(
                partial(self._stored.read, place.valid[at : at + READ_AT_ONCE])
            ):
                if isinstance(record, Chunks | Continue):
                    yield record.chunks
        yield place.chunks

    async def remove_void(self, place: Place) -> None:
        """What cannot be deleted stays, and is passed over."""
        await remove_void(self._stored, place)

    async def last_sequence(self, subject: str) -> int:
        """The stream sequence of what is stored last under ``subject``; 0 when nothing is, or
        a newer runctl wrote it. Waits while NATS is away."""
        try:
            return (await self.tail_now(subject)).sequence
        except (Fenced, StreamUnfit):
            return 0

    async def _stuck(self) -> None:
        self._unanswered = 0
        if self._replace_server is not None:
            await self._replace_server()
        else:
            log.error("NATS answers, but stores nothing: see whether its disk is full; restart it")

    async def has_end(self, thread: str, run: str) -> bool:
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
            state = find_push(tail.record)
            push = msgspec.UNSET if state is None else state.behind(tail.at)
            record = End(run, last, _count(tail.record), time.time(), outcome, push=push)
            if await self.publish(subject, record, tail.sequence) is not None:
                return
            await self.check_after_refusal()

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
            if self._wait_lease_valid is not None:
                await self._wait_lease_valid()
            try:
                return await self._publish(subject, data, headers)
            except _Full:
                await self._room.wait_for_room(len(data))

    def request_room(self, size: int) -> None:
        """A record of ``size`` bytes of another writer was refused."""
        self._room.request_room_for(size)

    async def check_after_refusal(self) -> None:
        """After a publish that was not stored: is that the stream's doing? Raises
        StreamUnfit."""
        await self.life.check()
        if self.life.unfit is not None:
            await self.life.wait_for_change()

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> int | None:
        self._token += 1
        token = f"{self._token:x}"
        ack = self._waiting[token] = _Ack()
        began = trio.current_time()
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
            # Those that were under way together met one silence.
            if isinstance(error, TimeoutError) and self._nc.is_connected and began >= self._silent:
                self._unanswered += 1
                self._silent = trio.current_time()
            return None
        finally:
            self._waiting.pop(token, None)
        self._unanswered = 0
        if "seq" in reply and "error" not in reply:
            self.life.note_stored(int(reply["seq"]))
        # Errors have a "seq" as well, of 0; and while a stream has no leader the answer is empty.
        if "error" in reply or "seq" not in reply:
            why = reply.get("error", {})
            log.debug("publish to %s refused: %s", subject, why or "no responders")
            if why.get("err_code") == STORE_FAILED:
                raise _Full
            return None
        return int(reply["seq"])

    def _send(self, subject: str, data: bytes, reply: str, headers: dict[str, str]) -> None:
        """Raises nats' errors, Unavailable."""
        if not publish_now(self._nc, subject, data, reply=reply, headers=headers):
            raise Unavailable("too much waits to be sent to NATS")

    def fail_pending_acks(self) -> None:
        """The connection broke: acks that are still out will not come over it. Whoever
        waits for one reads the tail back at once."""
        for ack in self._waiting.values():
            ack.error = ConnectionResetError("the connection to NATS broke")
            ack.there.set()

    async def _on_ack(self, msg: Msg) -> None:
        self._unanswered = 0  # though it may come too late for whoever waited for it
        ack = self._waiting.pop(msg.subject.rpartition(".")[2], None)
        if ack is not None:
            ack.data = msg.data or b"{}"
            ack.there.set()


def _count(record: Record | None) -> int:
    if isinstance(record, Continue):
        return record.after + len(record.chunks)
    return record.seq + len(record.chunks) - 1 if isinstance(record, Chunks) else 0
