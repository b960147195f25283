"""A run's outcome is stored until the database takes it, whatever it says.

DBOS stores a workflow's outcome when its function has returned, gives up what is refused, and
then stores that as the workflow's failure: the row would say failed beside a stream that says
succeeded. Here the outcome is stored before the function returns, by DBOS's own statement, and
DBOS is told what became of it.
"""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import trio
from dbos import DBOSPortableJSONSerializer

from ...protocol.model import Outcome, Status
from .dbos_internals import System, read_token
from .retries import Complaint, until_done

#: So many are stored at once, each in a thread that may wait for the database; and as many of
#: what was refused once, so that nothing which is new waits behind it.
AT_ONCE = 8
#: DBOS learns of what is stored in the next step of its loop; on a busy machine that is, seconds.
SETTLES_WITHIN = 2.0


async def sleep_in_asyncio(seconds: float = math.inf) -> None:
    """In asyncio, by trio's clock: what waits for asyncio's own is not cancelled when the loop
    is closed, and holds up the end."""
    loop: Any = asyncio.get_running_loop()
    await loop.trio_as_future(trio.sleep, seconds)


class Waiting(msgspec.Struct, frozen=True):
    """An outcome that the database refuses for the moment, and why."""

    run: str
    thread: str
    status: Status
    why: str


class Outcomes:
    """``store`` is called in asyncio, within the
    workflow whose outcome it is: DBOS knows there by which token its row is owned."""

    def __init__(self, system: System, stopping: threading.Event) -> None:
        self._write = system.take_over_outcomes(self._answer)
        self._stopping = stopping
        self._encode = DBOSPortableJSONSerializer().serialize
        self._done: dict[str, bool] = {}
        self._first, self._again = trio.CapacityLimiter(AT_ONCE), trio.CapacityLimiter(AT_ONCE)
        #: By run.
        self.waiting: dict[str, Waiting] = {}
        #: Runs whose outcome is being stored, or is stored, and DBOS does not know yet.
        self._unsettled: set[str] = set()
        self._lock, self._settled = threading.Lock(), threading.Event()
        self._settled.set()

    def wait_settled(self) -> None:
        """Until DBOS knows of all that is stored, SETTLES_WITHIN at most: closed before, it would
        take that for an error. Blocking."""
        self._settled.wait(SETTLES_WITHIN)

    def _begin(self, run: str) -> None:
        with self._lock:
            self._unsettled.add(run)
            self._settled.clear()

    def _end(self, run: str) -> None:
        with self._lock:
            self._unsettled.discard(run)
            if not self._unsettled:
                self._settled.set()

    async def store(self, run: str, thread: str, outcome: Outcome, built: dict[str, Any]) -> None:
        """``built`` is what the workflow returns. When the daemon stops before it is stored,
        this does not return: the next daemon adopts the end of the stream."""
        text, token = self._encode(built), read_token(run)
        write = functools.partial(self._write, run, "SUCCESS", output=text, owner_xid=token)
        loop: Any = asyncio.get_running_loop()
        threads = self._first

        def refused(why: str) -> None:
            nonlocal threads
            threads = self._again
            self._end(run)
            self.waiting[run] = Waiting(run, thread, outcome.status, why)

        async def store() -> None:
            self._begin(run)
            in_thread = functools.partial(trio.to_thread.run_sync, write, limiter=threads)
            self._done[run] = await loop.trio_as_future(in_thread)

        complaint = Complaint(f"the outcome of run {run} ({outcome.status})", heard=refused)
        try:
            await until_done(store, complaint, self._stopping, pause=sleep_in_asyncio)
        finally:
            self.waiting.pop(run, None)
            if run not in self._done:
                self._end(run)

    def _answer(self, theirs: Callable[..., bool], workflow: str, values: dict[str, Any]) -> bool:
        """In place of DBOS's own: whether the outcome was stored, which is none when the row
        is another's by now."""
        stored = self._done.pop(workflow, None)
        self._end(workflow)
        return bool(theirs(workflow, **values)) if stored is None else stored
