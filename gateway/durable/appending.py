"""What an append, a read or a deletion makes of the last record of a push run's stream."""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec

from ...protocol import records
from ...protocol.errors import BadRequest
from ...protocol.model import Outcome, Status
from ...protocol.push import PushState
from ..problems import HttpProblem
from ..tail import Tail, find_place
from .offsets import Position
from .push_content import Pushed
from .push_log import Record
from .push_requests import Append, Producer, is_same_type, split_messages

#: Producers that are remembered of a stream, and for how long since their last append, seconds.
MOST_PRODUCERS, PRODUCER_AGE = 64, 7 * 86400.0
#: A read puts a stream's end off once so much of its time to live has passed.
TOUCH = 0.25
STREAM_NAME: records.StreamName = "stdout"


class Known(NamedTuple):
    """Of the last record: its number of chunks, and of bytes."""

    chunks: int
    total: int


def _know(record: records.Record | None) -> Known:
    total = record.total if isinstance(record, records.Chunks) else 0
    place = find_place(record)
    return Known(place.expected - (2 if isinstance(record, records.End) else 1), total)


def find_position(tail: Tail) -> Position:
    return Pushed("", 0).find_end(tail)


def is_closed(tail: Tail) -> bool:
    return Pushed("", 0).is_closed(tail.record)


class Appending:
    """One append: called with the last record until its own is stored. Raises BadRequest,
    HttpProblem."""

    def __init__(self, run: str, append: Append) -> None:
        self._run = run
        self._append = append

    def __call__(self, tail: Tail, state: PushState, nonce: str) -> Record | None:
        append, now = self._append, time.time()
        check_there(state, now)
        if is_closed(tail):
            if self._closed_it(state):
                return None
            raise refuse_closed(tail)
        wanted = state.opening.content_type or ""
        if append.content_type is not None and not is_same_type(append.content_type, wanted):
            raise HttpProblem(409, "refused", f"the stream is {wanted}: append that")
        if append.producer is not None and _is_repeated(append.producer, state):
            return None
        if append.order is not None and state.order is not None and append.order <= state.order:
            raise HttpProblem(
                409, "refused", f"Stream-Seq must be behind {state.order!r}, as text is ordered"
            )
        messages = split_messages(wanted, append.data)
        if not messages and append.outcome is None:
            raise BadRequest("the body is an empty list: append something")
        return self._make(tail, state, nonce, now, messages)

    def _closed_it(self, state: PushState) -> bool:
        """Whether the same request came before, or one to the same effect."""
        producer = self._append.producer
        if producer is None:
            return self._append.outcome is not None and not self._append.data
        return state.closed_by == (producer.id, producer.epoch, producer.number)

    def _make(
        self, tail: Tail, state: PushState, nonce: str, now: float, messages: list[bytes]
    ) -> Record:
        append, last = self._append, tail.record
        assert last is not None
        closed_by = None
        if append.outcome is not None and append.producer is not None:
            closed_by = (append.producer.id, append.producer.epoch, append.producer.number)
        after = msgspec.structs.replace(
            state,
            appended=now,
            nonce=nonce,
            order=append.order or state.order,
            producers=_note_producer(state, append.producer, now),
            closed_by=closed_by,
            last=0,
        )
        known = _know(last)
        if not messages:
            assert append.outcome is not None
            push = msgspec.structs.replace(after, last=state.last or tail.sequence)
            return records.End(
                self._run, last.attempt, known.chunks, now, append.outcome, push=push
            )
        total = known.total + sum(map(len, messages))
        chunks = [records.Chunk(STREAM_NAME, message) for message in messages]
        push = msgspec.structs.replace(after, closing=append.outcome)
        return records.Chunks(
            *(last.attempt, known.chunks + 1, now, chunks, total, {STREAM_NAME: total}), push=push
        )


def _is_repeated(producer: Producer, state: PushState) -> bool:
    """Whether the producer's request was served before. Raises BadRequest, HttpProblem."""
    known = state.producers.get(producer.id)
    if known is None:
        if producer.number == 0:
            return False
        raise _refuse_gap(0, producer.number)
    epoch, number, _ = known
    if producer.epoch < epoch:
        raise HttpProblem(
            403,
            "denied",
            f"the producer is in epoch {epoch} by now",
            {"producer-epoch": str(epoch)},
        )
    if producer.epoch > epoch:
        if producer.number == 0:
            return False
        raise BadRequest("a new epoch begins with Producer-Seq: 0")
    if producer.number > number + 1:
        raise _refuse_gap(number + 1, producer.number)
    return producer.number <= number


def _refuse_gap(expected: int, given: int) -> HttpProblem:
    headers = {"producer-expected-seq": str(expected), "producer-received-seq": str(given)}
    return HttpProblem(409, "refused", f"Producer-Seq must be {expected}, and is {given}", headers)


def _note_producer(
    state: PushState, producer: Producer | None, now: float
) -> dict[str, tuple[int, int, float]]:
    if producer is None:
        return state.producers
    young = {k: v for k, v in state.producers.items() if v[2] > now - PRODUCER_AGE}
    young[producer.id] = producer.epoch, producer.number, now
    newest = sorted(young.items(), key=lambda item: item[1][2])[-MOST_PRODUCERS:]
    return dict(newest)


def make_end(run: str, tail: Tail, state: PushState, nonce: str) -> Record | None:
    """Behind a record that closes the stream."""
    last = tail.record
    if isinstance(last, records.End) or state.closing is None or last is None:
        return None
    push = msgspec.structs.replace(state.behind(tail.sequence), nonce=nonce)
    return records.End(run, last.attempt, _know(last).chunks, time.time(), state.closing, push=push)


def make_touch(tail: Tail, state: PushState, nonce: str) -> Record | None:
    """It was read: a stream with a time to live lives on."""
    last, now = tail.record, time.time()
    if not isinstance(last, records.Chunks) or not is_touch_due(state, now) or is_closed(tail):
        return None
    known = _know(last)
    push = msgspec.structs.replace(state.behind(tail.sequence), nonce=nonce, read=now)
    return records.Chunks(
        *(last.attempt, known.chunks + 1, now, [], known.total, last.of), push=push
    )


def is_touch_due(state: PushState, now: float) -> bool:
    ttl = state.opening.ttl
    if ttl is None or state.is_gone(now):
        return False
    return now - max(state.appended, state.read) > TOUCH * ttl


def make_deletion(run: str, tail: Tail, state: PushState, nonce: str) -> Record | None:
    """In place of all that is stored. How the run ended stays, if it had; one that was deleted is
    no stream."""
    if state.deleted:
        return None
    last, now = tail.record, time.time()
    assert last is not None
    outcome = state.closing
    if isinstance(last, records.End):
        outcome = last.outcome
    elif outcome is None and state.is_gone(now):
        outcome = Outcome(Status.FAILED, error="its stream has expired")
    outcome = outcome or Outcome(Status.ABORTED, error="its stream was deleted")
    push = msgspec.structs.replace(state.behind(tail.sequence), nonce=nonce, deleted=True)
    return records.End(run, last.attempt, _know(last).chunks, now, outcome, push=push)


def check_there(state: PushState, now: float) -> None:
    """Raises HttpProblem."""
    if state.is_gone(now):
        raise no_stream()


def no_stream() -> HttpProblem:
    return HttpProblem(404, "not-found", "there is no such stream: it was never made, or is gone")


def refuse_closed(tail: Tail) -> HttpProblem:
    headers = {"stream-closed": "true", "stream-next-offset": find_position(tail).offset}
    return HttpProblem(409, "closed", "the stream is closed: nothing can be appended", headers)
