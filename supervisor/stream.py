"""The writer's side of JetStream: ``Attempt`` (reset, append, end), and purge.

The protocol (docs: DESIGN section 6): a reset is one publish that rolls the subject up;
each further publish names the subject's last sequence, one in flight, and what
arrives meanwhile goes into the next record. Whoever loses that comparison to another
attempt is fenced and must stop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING

import trio
import trio_asyncio

from ..config.connection import where
from .errors import ConfigError, Fenced, Unavailable
from .model import Outcome
from .streamcheck import differences, refusal
from .wire import (
    MAX_RECORD_BYTES,
    STREAM,
    SUBJECT_PREFIX,
    SUMMARY_HEADER,
    Chunk,
    Chunks,
    End,
    Record,
    Reset,
    StreamName,
    decode_record,
    encode_record,
    out_subject,
    summary,
    thread_subjects,
)

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from ..config.schema import Config

log = logging.getLogger("runctld.stream")
aio = trio_asyncio.aio_as_trio

ACK_TIMEOUT = 2.0
#: Output that waits for its publish, per run, before the writer is held back.
MAX_BUFFERED = 1024 * 1024


class Tail:
    """A subject's last record; sequence 0 and None when it has none."""

    def __init__(self, sequence: int, record: Record | None) -> None:
        self.sequence = sequence
        self.record = record


class Streams:
    """All output streams of this daemon, over one NATS connection."""

    def __init__(self, client: Client) -> None:
        self._nc = client
        self._js = client.jetstream(timeout=ACK_TIMEOUT)
        self._inbox = client.new_inbox()
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._token = 0
        #: What an external stream has other than configured, a line each.
        self.differences: list[str] = []

    async def open(self, config: Config) -> None:
        """Subscribe for acks and see that the stream exists.

        Raises Unavailable; ConfigError, when it cannot serve us."""
        await aio(self._nc.subscribe)(self._inbox + ".*", cb=self._on_ack)
        from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
        from nats.js.errors import NotFoundError

        wanted = StreamConfig(
            name=STREAM,
            subjects=[SUBJECT_PREFIX + ".*.*"],
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            max_age=config.stream.max_age,
            max_bytes=config.stream.max_bytes,
            max_consumers=100_000,
            num_replicas=config.nats.replicas,
            duplicate_window=1,
            allow_rollup_hdrs=True,
            allow_direct=True,
        )
        last: Exception | None = None
        with trio.move_on_after(config.start_timeout):
            while True:
                try:
                    try:
                        found = await aio(self._js.stream_info)(STREAM)
                        if config.nats.embedded:
                            await aio(self._js.update_stream)(wanted)
                        else:
                            self._note(differences(found.config, wanted))
                    except NotFoundError:
                        await aio(self._js.add_stream)(wanted)
                    return
                except ConfigError:
                    raise
                except Exception as error:  # JetStream is not ready at once after a start
                    log.debug("stream not ready: %r", error)
                    if (refused := refusal(error, config)) is not None:
                        raise refused from None
                    last = error
                    await trio.sleep(0.02)
        reason = getattr(last, "description", None) or last or "no answer"
        raise Unavailable(
            f"JetStream at {where(config.nats)} did not accept the stream {STREAM} within"
            f" {config.start_timeout:g} s ({reason})"
        )

    def _note(self, lines: list[str]) -> None:
        self.differences = lines
        for line in lines:
            log.warning("%s", line)

    async def info(self) -> tuple[int, int]:
        """(bytes, messages) stored over all threads."""
        state = (await aio(self._js.stream_info)(STREAM)).state
        return state.bytes, state.messages

    async def tail(self, subject: str) -> Tail:
        """The last record of ``subject``, by a leader read; waits while NATS is away."""
        from nats.js.errors import NotFoundError

        while True:
            try:
                raw = await aio(self._js.get_last_msg)(STREAM, subject)
            except NotFoundError:
                return Tail(0, None)
            except Exception as error:
                log.debug("tail of %s: %r", subject, error)
                await trio.sleep(0.1)
                continue
            try:
                return Tail(raw.seq or 0, decode_record(raw.data or b""))
            except ValueError as error:
                raise Fenced(f"{subject} holds a record that is not ours: {error}") from None

    async def purge(self, thread: str, run: str | None = None) -> None:
        """Delete the stored output of a run, or of the whole thread."""
        subject = thread_subjects(thread) if run is None else out_subject(thread, run)
        await aio(self._js.purge_stream)(STREAM, subject=subject)

    async def end(self, thread: str, run: str, attempt: int, outcome: Outcome) -> None:
        """Append the end of a run that has no live attempt here (aborted in the queue,
        dead, or aborted just before a crash), unless it has one."""
        subject = out_subject(thread, run)
        while True:
            tail = await self.tail(subject)
            if isinstance(tail.record, End):
                return
            record = End(run, attempt, _count(tail.record), time.time(), outcome)
            if await self.publish(subject, record, tail.sequence) is not None:
                return

    async def publish(
        self, subject: str, record: Record, expected: int, *, rollup: bool = False
    ) -> int | None:
        """One acked publish. The sequence, or None when it was refused or not acked in
        time: the caller reads the tail back."""
        headers = {
            "Nats-Expected-Last-Subject-Sequence": str(expected),
            SUMMARY_HEADER: summary(record),
        }
        if rollup:
            headers["Nats-Rollup"] = "sub"
        done: int | None = await aio(self._publish)(subject, encode_record(record), headers)
        return done

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> int | None:
        self._token += 1
        token = f"{self._token:x}"
        ack = asyncio.get_running_loop().create_future()
        self._waiting[token] = ack
        try:
            await self._nc.publish(subject, data, reply=f"{self._inbox}.{token}", headers=headers)
            reply = json.loads(await asyncio.wait_for(ack, ACK_TIMEOUT))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # connection states; the read-back decides what happened
            log.debug("publish to %s: %r", subject, error)
            return None
        finally:
            self._waiting.pop(token, None)
        # Errors have a "seq" as well, of 0; and while a cluster has no leader the answer is empty.
        if "error" in reply or "seq" not in reply:
            log.debug("publish to %s refused: %s", subject, reply.get("error"))
            return None
        return int(reply["seq"])

    async def _on_ack(self, msg: Msg) -> None:
        future = self._waiting.pop(msg.subject.rpartition(".")[2], None)
        if future is not None and not future.done():
            future.set_result(msg.data or b"{}")


def _count(record: Record | None) -> int:
    return record.seq + len(record.chunks) - 1 if isinstance(record, Chunks) else 0


class Attempt:
    """One attempt of one run. ``open``, then ``pump`` in a nursery, ``append`` any number
    of times, ``close``, ``end`` once. Any of them raises Fenced when a newer attempt took over."""

    def __init__(self, streams: Streams, thread: str, run: str, attempt: int, executor: str):
        self._streams = streams
        self._subject = out_subject(thread, run)
        self._run = run
        self._attempt = attempt
        self._executor = executor
        self._sequence = 0
        self._seq = 0
        self._pending: list[Chunk] = []
        self._bytes = 0
        self._read_at = 0.0
        self._closed = False
        self._changed = trio.Event()
        self._drained = trio.Event()

    async def open(self) -> Outcome | None:
        """Reset the subject for this attempt; or the outcome to adopt, when an earlier
        attempt had already written its end."""
        record = Reset(self._run, self._attempt, time.time(), self._executor)
        while True:
            tail = await self._streams.tail(self._subject)
            last = tail.record
            if isinstance(last, End):
                return last.outcome
            if isinstance(last, Reset) and last == record:
                self._sequence = tail.sequence
                return None
            if last is not None and last.attempt >= self._attempt:
                raise Fenced(f"run {self._run}: attempt {last.attempt} is already in the stream")
            done = await self._streams.publish(self._subject, record, tail.sequence, rollup=True)
            if done is not None:
                self._sequence = done
                return None

    async def append(self, stream: StreamName, data: bytes) -> None:
        """Add one chunk; waits while more than ``MAX_BUFFERED`` bytes are unacked."""
        while self._bytes > MAX_BUFFERED:
            await self._drained.wait()
        for start in range(0, len(data), MAX_RECORD_BYTES):
            piece = data[start : start + MAX_RECORD_BYTES]
            if not self._pending:
                self._read_at = time.time()
            self._pending.append(Chunk(stream, piece))
            self._bytes += len(piece)
        self._changed.set()

    async def pump(self) -> None:
        """Publish what was appended, one record in flight, until closed and empty."""
        while self._pending or not self._closed:
            await self._changed.wait()
            self._changed = trio.Event()
            while self._pending:
                await self._flush_one()

    def close(self) -> None:
        """No more appends: ``pump`` returns when all is stored. It must not be cancelled
        instead: a publish in flight would be taken for somebody else's."""
        self._closed = True
        self._changed.set()

    async def end(self, outcome: Outcome) -> None:
        """Append the end record, after ``close`` and ``pump``."""
        await self._put(End(self._run, self._attempt, self._seq, time.time(), outcome))

    async def _flush_one(self) -> None:
        size = count = 0
        for chunk in self._pending:
            if (count and size + len(chunk.data) > MAX_RECORD_BYTES) or count >= 4096:
                break
            size += len(chunk.data)
            count += 1
        batch = self._pending[:count]
        await self._put(Chunks(self._attempt, self._seq + 1, self._read_at, batch))
        del self._pending[:count]
        self._read_at = time.time()
        self._seq += count
        self._bytes -= size
        self._drained.set()
        self._drained = trio.Event()

    async def _put(self, record: Record) -> None:
        while True:
            done = await self._streams.publish(self._subject, record, self._sequence)
            if done is not None:
                self._sequence = done
                return
            tail = await self._streams.tail(self._subject)
            if tail.record == record:
                self._sequence = tail.sequence
                return
            if tail.record is None:  # purged, or expired while the run was silent
                self._sequence = 0
            elif tail.record.attempt == self._attempt and tail.sequence == self._sequence:
                await trio.sleep(0.05)  # not stored; NATS is away, or full
            else:
                raise Fenced(f"run {self._run}: another attempt writes its stream")
