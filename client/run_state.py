"""Records of a run's output become events, each chunk once."""

from __future__ import annotations

from typing import NamedTuple

from ..protocol import records
from .events import Chunk, Continue, End, Event, Gap, Reset


class Place(NamedTuple):
    """How far a run's output was read: the attempt, and which chunk comes next. ``began``: the
    time in its first record; 0 when that was not seen. ``base``: the attempt whose reset began
    what was seen; None when that reset was not."""

    attempt: int = 0
    expected: int = 1
    began: float = 0.0
    base: int | None = None


BEGINNING = Place()


class RunState:
    """Where one run's output stands, from ``place`` on: turns its records into events, each
    chunk once. From the same place a record leads to the same events, and the same place."""

    def __init__(self, run: str, place: Place = BEGINNING) -> None:
        self.run = run
        self.attempt, self.expected, self._began, self._base = place

    @property
    def place(self) -> Place:
        return Place(self.attempt, self.expected, self._began, self._base)

    def apply(self, record: records.Record, out: list[Event]) -> None:
        if isinstance(record, records.Chunks):
            self._apply_chunks(record, out)
        elif isinstance(record, records.Reset):
            # The one that was seen already comes again when we start over in the stream, and
            # one that was not stored when we began is written again when that is lost.
            again = record.attempt == self.attempt and self.expected > 1 and self._began > 0
            if record.attempt > self.attempt or (again and record.at != self._began):
                self._begin_attempt(record.attempt, out, record.executor, record.tty)
            if record.attempt == self.attempt:
                self._began = record.at
                self._base = record.attempt
        elif isinstance(record, records.Continue):
            self._apply_continue(record, out)
        else:
            self._apply_end(record, out)

    def _begin_attempt(
        self, attempt: int, out: list[Event], executor: str = "", tty: bool = False
    ) -> None:
        self.attempt = attempt
        self.expected = 1
        self._began = 0.0
        self._base = None
        out.append(Reset(self.run, attempt, executor, tty))

    def _apply_continue(self, record: records.Continue, out: list[Event]) -> None:
        if record.attempt > self.attempt:
            self._begin_continued(record, out)
        if record.chunks:  # also when it was seen already: those that were not come out
            self._apply_chunks(
                records.Chunks(record.attempt, record.after + 1, record.at, record.chunks), out
            )

    def _begin_continued(self, record: records.Continue, out: list[Event]) -> None:
        after = record.after
        if self.attempt and self._base in (None, record.base):
            self._skip_to(after + 1, out)
            void = self.expected - 1 - after
            self.attempt, self.expected = record.attempt, after + 1
            out.append(Continue(self.run, record.attempt, after, void, record.executor, record.tty))
        else:  # what it goes on from is not stored any more, and was never seen
            self._begin_attempt(record.attempt, out, record.executor, record.tty)
            self._skip_to(after + 1, out)
        self._began, self._base = record.at, record.base

    def _apply_chunks(self, record: records.Chunks, out: list[Event]) -> None:
        if record.attempt < self.attempt:
            return
        if record.attempt > self.attempt:  # retention removed its reset
            self._begin_attempt(record.attempt, out)
        self._skip_to(record.seq, out)
        run, attempt, expected = self.run, self.attempt, self.expected
        seq = record.seq
        for chunk in record.chunks:
            if seq >= expected:
                out.append(Chunk(run, attempt, seq, chunk.stream, chunk.data, record.at))
                expected = seq + 1
            seq += 1
        self.expected = expected

    def _apply_end(self, record: records.End, out: list[Event]) -> None:
        if record.attempt > self.attempt and record.chunks:
            self._begin_attempt(record.attempt, out)
        if record.attempt == self.attempt:
            self._skip_to(record.chunks + 1, out)
        outcome = record.outcome
        out.append(
            End(
                self.run,
                record.attempt,
                outcome.status.value,
                outcome.exit_code,
                outcome.error,
                outcome.note,
            )
        )

    def _skip_to(self, seq: int, out: list[Event]) -> None:
        if seq > self.expected:
            out.append(Gap(self.run, self.expected, seq - 1))
            self.expected = seq
