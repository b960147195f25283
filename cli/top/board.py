"""What ``top`` knows: the listing of threads, brought up to date by what streams say.

The listing gives threads, runs and queues; the last record of a run's stream says how
many chunks it has and whether it ended. No input or output here.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass

from ...protocol.model import Run, Status, ThreadRow, unix_time
from ...protocol.records import Summary

#: Rates are over the last so many seconds.
WINDOW = 5.0
#: Samples nearer than this are one.
GRAIN = 0.2


class Meter:
    """The pace of one run's chunks. Times are seconds of any clock that does not jump."""

    def __init__(self) -> None:
        self._attempt = 0
        self._samples: collections.deque[tuple[float, int]] = collections.deque()

    def count(self, attempt: int, chunks: int, now: float) -> None:
        if attempt != self._attempt:
            self._attempt = attempt
            self._samples.clear()
        samples = self._samples
        if len(samples) > 1 and now - samples[-2][0] < GRAIN:
            samples.pop()
        samples.append((now, chunks))
        while len(samples) > 1 and samples[1][0] <= now - WINDOW:
            samples.popleft()

    def rate(self, now: float) -> float:
        """Chunks per second."""
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= now - WINDOW:
            samples.popleft()
        if not samples:
            return 0.0
        began, base = samples[0]
        return (samples[-1][1] - base) / min(WINDOW, max(1.0, now - began))


@dataclass(frozen=True)
class Line:
    """One thread as shown. ``age``: seconds in this status. ``chunks`` and ``rate`` None:
    there are none. ``live``: a run is running or queued. ``work``: the run's command or
    prompt."""

    thread: str
    status: str
    run: str
    attempt: int
    age: float
    chunks: int | None
    rate: float | None
    executor: str
    queued: int
    live: bool
    error: str
    work: str = ""


class Board:
    def __init__(self) -> None:
        self._live: list[ThreadRow] = []
        self._idle: list[ThreadRow] = []
        self._summaries: dict[str, Summary] = {}
        self._meters: dict[str, Meter] = {}
        #: When a thread was first seen live: it keeps its place while it is.
        self._places: dict[str, int] = {}
        self._place = 0

    def summarise(self, run: str, summary: Summary, now: float) -> None:
        """``run``'s last record says ``summary``."""
        self._summaries[run] = summary
        if summary.kind == "end":
            self._meters.pop(run, None)
            return
        meter = self._meters.get(run)
        if meter is None:
            meter = self._meters[run] = Meter()
        meter.count(summary.attempt, summary.chunks, now)

    def forget(self, thread: str) -> None:
        """What the streams said of the thread's run: they were purged."""
        for row in (*self._live, *self._idle):
            if row.thread == thread:
                self._summaries.pop(row.run.run, None)
                self._meters.pop(row.run.run, None)

    def replace(self, live: Iterable[ThreadRow], idle: Iterable[ThreadRow]) -> None:
        """The daemon's listing: live threads, and others, most recent first."""
        found = {row.thread: row for row in live}  # pages may overlap
        for thread in reversed(found):
            if thread not in self._places:
                self._place += 1
                self._places[thread] = self._place
        self._places = {t: place for t, place in self._places.items() if t in found}
        self._live = sorted(
            found.values(), key=lambda row: (row.status != "running", -self._places[row.thread])
        )
        self._idle = [row for row in idle if row.thread not in found and row.status == "idle"]
        shown = {row.run.run for row in self._live}
        self._meters = {run: meter for run, meter in self._meters.items() if run in shown}

    def unsettled(self) -> bool:
        """Whether a run ended in its stream that the listing has as live: the daemon
        records it a moment later, and does not say when."""
        return any(self._ended(row.run) is not None for row in self._live)

    def counts(self) -> tuple[int, int]:
        """Runs (running, queued)."""
        running = sum(row.status == "running" and not self._ended(row.run) for row in self._live)
        return running, sum(row.queued for row in self._live)

    def lines(self, text: str, now: float, wall: float) -> list[Line]:
        """Those whose thread, run, status, executor or work holds ``text``. ``wall``: Unix
        time."""
        made = [self._line(row, True, now, wall) for row in self._live]
        made += [self._line(row, False, now, wall) for row in self._idle]
        wanted = text.casefold()
        return [
            line
            for line in made
            if wanted
            in f"{line.thread} {line.run} {line.status} {line.executor} {line.work}".casefold()
        ]

    def _ended(self, run: Run) -> str | None:
        """How the run ended by its stream, while its row does not say so."""
        said = self._summaries.get(run.run)
        if said is None or said.kind != "end" or run.status.terminal or said.attempt < run.attempt:
            return None
        return said.status

    def _line(self, row: ThreadRow, live: bool, now: float, wall: float) -> Line:
        run = row.run
        said = self._summaries.get(run.run)
        status = self._ended(run) or run.status.value
        attempt, chunks, rate = run.attempt, None, None
        if said is not None and said.attempt >= attempt:
            if said.attempt > attempt and status == "queued":
                status = "running"  # its reset is in the stream, its listing on the way
            attempt, chunks = said.attempt, said.chunks
        if status == "running":
            meter = self._meters.get(run.run)
            chunks = chunks or 0
            rate = 0.0 if meter is None else meter.rate(now)
        return Line(
            thread=row.thread,
            status=status,
            run=run.run,
            attempt=attempt,
            age=wall - unix_time(_began(run)),
            chunks=chunks,
            rate=rate,
            executor=run.executor or "",
            queued=row.queued,
            live=live,
            error=run.error or "",
            work=run.work,
        )


def _began(run: Run) -> str:
    """When the run came to be in its status."""
    if run.status.terminal:
        return run.ended_at or run.created_at
    if run.status is Status.RUNNING:
        return run.started_at or run.created_at
    return run.created_at
