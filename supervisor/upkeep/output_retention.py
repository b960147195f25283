"""Which output is kept: by bytes, by count, by age. Whole runs go, oldest end first.

JetStream's own limits cut the oldest *records*, which are the head of the longest running
run. So the stream has no age limit and refuses what does not fit, and this decides:

* bytes: a writer was refused, or a run has ended and the stream is above ``HIGH``: output
  of finished runs goes until it is below ``LOW``; but that of the run that ended last
  goes only when a writer was refused. Only when none is left do running runs
  lose their heads, the largest first.
* count: when a run ends, only the newest ``max_runs`` of its thread keep their output.
* age: output goes ``max_age`` after the end of its run, however long that ran.

A run is finished when the database says so: one whose end is stored and whose row is not
terminal yet would run again without it. Several executors may do all this at the same
time: purges of what is gone already do nothing, and none takes more than what was seen.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence

import trio

from ...config.schema import Stream
from ...protocol.records import Chunks, Reset
from ...protocol.subjects import thread_subjects
from ..execution.registry import Registry
from ..execution.run_end import Ended
from ..output.backpressure import Backpressure
from ..output.inventory import EVERYTHING, Last, Stored
from ..queue.engine import Durable

log = logging.getLogger("runctld.retention")

HIGH = 0.9
LOW = 0.8
#: Runs that are dropped between two looks at the size, at most.
AT_ONCE = 100
#: What is left free, at least, before running output is touched.
SPARE = 0.02
#: Seconds until another try, when JetStream or the database fails, or nothing could go.
PAUSE = 0.1
#: Output may outlive ``max_age`` by this share of it: one look serves many runs.
SLACK = 0.01
#: A thread may hold this share more than ``max_runs``, for the same reason.
COUNT_SLACK = 0.1
#: Longest sleep: a machine that slept, or whose clock was set, is not late by more.
LONGEST = 3600.0


class Retention:
    """``run`` in a nursery; ``ended`` after each run."""

    def __init__(
        self,
        limits: Stream,
        stored: Stored,
        durable: Durable,
        registry: Registry,
        room: Backpressure,
    ) -> None:
        self._limits = limits
        self._stored = stored
        self._durable = durable
        self._registry = registry
        self._room = room
        self._ended: set[str] = set()
        self._changed = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_bytes)
            nursery.start_soon(self._keep_count)
            nursery.start_soon(self._keep_age)

    def hear_end(self, end: Ended) -> None:
        if not end.written:
            return
        self._ended.add(end.spec.thread)
        self._changed.set()

    # ---- bytes ------------------------------------------------------------------

    async def _keep_bytes(self) -> None:
        self._room.request_room()  # the limit may have been lowered
        while True:
            need = await self._room.wait_until_wanted()
            made = False
            try:
                made = await self.make_room(need)
            except Exception as error:  # JetStream or the database is away
                log.debug("room was not made: %r", error)
            if need and not made:
                await trio.sleep(PAUSE)
            self._room.release_writers()

    async def make_room(self, need: int) -> bool:
        """Free space for a record of ``need`` bytes that was refused; 0: if much of the
        stream is used, let finished output go. Whether anything went."""
        most = self._limits.max_bytes
        # Twice: others were refused as well.
        target = max(0, most - max(int(most * (1 - LOW)), 2 * need))
        enough = max(0, most - max(int(most * SPARE), 2 * need))
        began = time.monotonic()
        size = before = await self._stored.size()
        if size <= (target if need else most * HIGH):
            return False
        running: list[Last] = []
        unknown: list[Last] = []
        newest: list[Last] = []
        async with self._stored.lasts() as lasts:
            while size > target and (batch := await lasts.next()):
                live = await self._live(batch)
                running += [x for x in batch if x.run in live]
                rest = [x for x in batch if x.run not in live]
                finished, foreign = await self._sort(rest)
                unknown += foreign
                if not need:  # nobody waits: whoever comes to see the latest run finds it
                    finished = newest + finished
                    newest = [finished.pop()] if finished else []
                size = await self._drop(finished, size, target, enough)
        if size > target:
            size = await self._drop(unknown, size, target, enough)
        if need and size > enough:
            size = await self._cut(running, size, target, enough)
        took = time.monotonic() - began
        log.info("output of %d bytes was dropped to make room, in %.2f s", before - size, took)
        return size < before

    async def _sort(self, rest: Sequence[Last]) -> tuple[list[Last], list[Last]]:
        """Finished runs, and those of which neither their stream nor our database says
        that they are: an earlier database's, or those of executors that do not share ours."""
        unsure = [x.run for x in rest if not x.ended]
        known = await self._durable.rows.read_ends(unsure) if unsure else {}
        finished = [x for x in rest if x.ended or x.run in known]
        return finished, [x for x in rest if not x.ended and x.run not in known]

    async def _drop(self, runs: Sequence[Last], size: int, target: int, enough: int) -> int:
        """Drop in order until the stream has ``target`` bytes; how many it has. Writers
        go on as soon as it has ``enough``.

        One first, and then half of what the sizes so far make one expect: few calls for
        many small runs, and hardly one run too many."""
        done, began, count = 0, size, 1
        while done < len(runs) and size > target:
            part = runs[done : done + count]
            await self._stored.drop(x.seen for x in part)
            done += len(part)
            size = await self._stored.size()
            each = max(1.0, (began - size) / done)
            count = min(AT_ONCE, max(1, int((size - target) / each / 2)))
            if size <= enough:
                self._room.release_writers()
        return size

    async def _cut(self, running: Sequence[Last], size: int, target: int, enough: int) -> int:
        """Running runs lose their heads, whoever has most stored, until the stream has
        ``target`` bytes. Their last records stay: attempts are fenced by them."""
        counts = (await self._stored.counts(EVERYTHING)).records
        average = size / max(1, sum(counts.values()))
        running = list({x.subject: x for x in running}.values())
        heads = {x.subject: self._estimate(x, counts, average) for x in running}
        lasts = {x.subject: x for x in running}
        measured: set[str] = set()
        while size > target and heads:
            subject = max(heads, key=lambda s: heads[s])
            if counts.get(subject, 0) <= 1:
                del heads[subject]
                continue
            if subject not in measured:
                measured.add(subject)
                heads[subject] = await self._measure(lasts[subject], heads[subject])
                continue
            # Another attempt may have begun since: what it has is counted, not what was there.
            now = await self._stored.counts(subject)
            counts[subject] = count = now.records.get(subject, 0)
            if count <= 1:
                continue
            share = min(0.5, (size - target) / max(1.0, heads[subject]))
            counts[subject] = max(1, count - math.ceil(count * share))
            await self._stored.keep(subject, counts[subject])
            left = await self._stored.size()
            log.warning("run %s lost its head: the stream is full", lasts[subject].run)
            heads[subject] = max(0.0, heads[subject] - max(0, size - left))
            size = left
        # Only last records are left, and still there is no room. A writer takes its empty
        # subject for one that was purged; what it loses is the fence, for a moment.
        tails = sorted((x for x in running if not x.ended), key=lambda x: -x.size)
        return await self._drop(tails, size, target, enough) if size > enough else size

    @staticmethod
    def _estimate(last: Last, counts: dict[str, int], average: float) -> float:
        """Bytes of a run: at most what it has written, where it says so."""
        total = last.summary.total if last.summary is not None else 0
        return float(total or counts.get(last.subject, 0) * average)

    async def _measure(self, last: Last, estimate: float) -> float:
        """The estimate without what is gone already."""
        first = await self._stored.first(last.subject)
        if isinstance(first, Chunks) and first.total:
            return max(0.0, estimate - first.total + sum(len(c.data) for c in first.chunks))
        return estimate if isinstance(first, Reset | Chunks) else 0.0

    # ---- count ------------------------------------------------------------------

    async def _keep_count(self) -> None:
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            threads, self._ended = self._ended, set()
            for thread in threads:
                try:
                    await self._trim(thread)
                except Exception as error:  # the thread's next run tries again
                    log.debug("%r was not trimmed: %r", thread, error)

    async def _trim(self, thread: str) -> None:
        subjects = thread_subjects(thread)
        there = await self._stored.counts(subjects)
        if there.size > self._limits.max_bytes * HIGH:
            self._room.request_room()
        most = self._limits.max_runs
        if not most or len(there.records) <= most + int(most * COUNT_SLACK):
            return
        found: dict[str, Last] = {}
        async with self._stored.lasts(subjects) as lasts:
            while batch := await lasts.next():
                found |= {x.subject: x for x in batch if x.ended}
        live = await self._live(found.values())
        excess = list(found.values())[: max(0, len(found) - most)]
        await self._stored.drop(x.seen for x in excess if x.run not in live)

    # ---- age --------------------------------------------------------------------

    async def _keep_age(self) -> None:
        """Look when the oldest end is due. Whatever ends after a look is not due before
        ``max_age`` after it, so nothing needs to be told of it."""
        limit = self._limits.max_age
        while True:
            now = time.time()
            try:
                oldest = await self._expire(now - limit)
                due = min(oldest, now) + limit
            except Exception as error:
                log.debug("age was not looked at: %r", error)
                due = now + 1.0
            await trio.sleep(min(LONGEST, max(due - time.time(), limit * SLACK, PAUSE)))

    async def _expire(self, before: float) -> float:
        """Drop runs that ended before Unix time ``before``; when the oldest one that is
        left did. Infinite when there is none."""
        async with self._stored.lasts() as lasts:
            while batch := await lasts.next():
                live = await self._live(batch)
                finished = [x for x in batch if x.run not in live]
                await self._stored.drop(x.seen for x in finished if x.at < before)
                young = [x.at for x in finished if x.at >= before]
                if young:
                    return min(young)
        return math.inf

    async def _live(self, runs: Iterable[Last]) -> set[str]:
        """Those that may still write, or be replayed. Asked after they were listed: what
        is listed as ended and is not live now is recorded as ended."""
        rows = await self._durable.rows.list_in_flight()
        return {x.run for x in runs if x.run in rows or self._registry.get(x.run) is not None}
