"""The last thing before a write: this daemon still holds its executor ID.

A daemon that was stopped (SIGSTOP, a frozen machine) may have been replaced when it wakes
up. It then ends before it writes anything, and its keeper ends its runs. Ways in:

* SIGCONT: the handler runs before any other code of the main thread;
* each publish, and each commit to the database, asks first. SQLite's own write lock is held
  by then, so no successor can have written between the question and the commit;
* once a second, for a daemon that writes nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import trio

from ...protocol.errors import LeaseLost
from ..host.database_files import DatabaseFiles
from .database_lease import Lease
from .file_lease import FileLease

log = logging.getLogger("runctld.fence")

LOOK = 1.0
_ending = threading.Lock()


class Fence:
    """``lease`` None: the database is not shared, and the lock file is all there is."""

    def __init__(self, file: FileLease, lease: Lease | None) -> None:
        self._file = file
        self.lease = lease
        self._database: DatabaseFiles | None = None

    def guard(self, database: DatabaseFiles | None) -> None:
        """From here on its files are looked at as well; None: no more."""
        self._database = database

    def holds(self) -> bool:
        """Whether something new may be begun."""
        return self.lease is None or not self.lease.away

    async def wait_clear(self) -> None:
        """Before a publish: returns when nobody acts in our place. That is so for a while
        without the lease as well; whoever does in spite of that has begun the run's stream
        anew, and our publish is refused."""
        self.look()
        if self.lease is not None:
            await self.lease.wait_sure()

    def wait_clear_in_thread(self) -> None:
        """Before a commit, in a thread that is not the event loop's: returns when the executor
        ID is surely ours."""
        self.look()
        if self.lease is not None and threading.current_thread() is not threading.main_thread():
            while self.lease.doubtful:  # it is asked already: an answer, or our end
                time.sleep(0.05 if self.lease.away else 0.005)

    async def watch(self) -> None:
        """End the process at once when the executor ID is lost: a peer may take the runs
        over, and whatever still waits for the database here would delay an orderly end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_file)
            if self.lease is not None:
                nursery.start_soon(_watch_lease, self.lease)

    async def _watch_file(self) -> None:
        while True:  # a file that is replaced gives no event wherever it is replaced from
            self.look()
            await trio.sleep(LOOK)

    def look(self) -> None:
        """End the process if the lock file, or the database, is not ours any more."""
        try:
            self._file.check()
            if (database := self._database) is not None:
                database.check()
        except LeaseLost as error:
            _end(error)

    def leave_if_away(self) -> None:
        """At the end of an orderly stop: threads that wait for a database that is away are not
        waited for. What they would have stored is made up for at the next start."""
        if not self.holds():
            log.info("stopped while the database is away; unfinished runs will be replayed")
            os._exit(0)

    @contextmanager
    def asks_on_waking(self) -> Iterator[None]:
        """While this is open a SIGCONT has everything asked anew."""
        token = trio.lowlevel.current_trio_token()

        def awake(*_: object) -> None:
            self.look()
            if self.lease is not None:
                self.lease.doubt()
                token.run_sync_soon(self.lease.request_probe, idempotent=True)

        before = signal.signal(signal.SIGCONT, awake)
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)


async def _watch_lease(lease: Lease) -> None:
    lost: Exception | None = None
    try:
        await lease.watch()
    except* LeaseLost as group:
        lost = group
    while isinstance(lost, ExceptionGroup):
        lost = lost.exceptions[0]
    if isinstance(lost, LeaseLost):
        _end(lost)


def _end(error: LeaseLost) -> NoReturn:
    """The keeper kills all runs when it sees us gone."""
    if _ending.acquire(blocking=False):  # once, whichever thread saw it
        os.write(2, f"runctld: {error}\n".encode(errors="replace"))  # also in a signal handler
        os._exit(75)
    while True:
        time.sleep(1)
