"""Over executors: no run starts while processes of an aborted one of its thread live.

An aborted run's row frees its thread at once, so that a crash does not replay it, while
its processes still get their grace. Its owner writes the end of the stream only once
they are gone: that record is what others wait for.
"""

from __future__ import annotations

import logging
import time

import trio

from ...protocol.errors import Unavailable
from ...protocol.model import Run, unix_time
from ...protocol.records import End
from ...protocol.subjects import out_subject
from ..cluster.absence import Absence
from ..cluster.members import TREES_GONE
from ..output.publisher import Streams
from ..queue.attempt_rows import RECENT
from ..queue.engine import Durable
from .aborted_ends import Endings
from .registry import Live
from .settings import Settings

log = logging.getLogger("runctld.order")

POLL = 0.1
#: A stream without any record was purged, or its attempt had not begun: seconds after
#: the abort, on top of the grace, from which on nothing more is expected in it.
SILENCE = 5.0


class Order:
    def __init__(
        self,
        durable: Durable,
        streams: Streams,
        endings: Endings,
        absence: Absence,
        settings: Settings,
    ) -> None:
        self._durable = durable
        self._streams = streams
        self._endings = endings
        self._absence = absence
        self._settings = settings

    async def clear(self, live: Live) -> bool:
        """Wait until nothing is in the way of an attempt; False when it is not to start,
        since the run was aborted after it was claimed."""
        aborted, others = await self._durable.find_aborts(live.spec)
        for run in others:
            live.wait_behind(run.run)
            await self._processes_gone(run)
        return not aborted

    async def _processes_gone(self, run: Run) -> None:
        assert run.executor is not None
        dead = 0.0
        while True:
            tail = await self._streams.tail(out_subject(run.thread, run.run))
            age = time.time() - (unix_time(run.ended_at) if run.ended_at else 0.0)
            if isinstance(tail.record, End) or age > RECENT:
                return
            if tail.record is None and age > self._settings.longest_grace + SILENCE:
                return
            try:
                ended = await self._absence.surely_ended(run.executor)
            except Unavailable:  # the lease decides whether we go on
                ended = False
            if not ended:
                dead = 0.0
            elif dead >= TREES_GONE:
                await self._endings.write(run.thread, run.run, run.attempt)
                return
            await trio.sleep(POLL)
            dead += POLL
