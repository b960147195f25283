"""Claims what is queued, and starts it: DBOS's queue worker, woken by events.

DBOS's own worker looks at intervals, asks each time which version is the newest, and does
not say what it claimed. The claim itself, and all that is durable about it, is DBOS's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from .dbos_internals import System
from .retries import SAY_AGAIN, reason

log = logging.getLogger("runctld.claims")

#: Without an event, seconds: what others have queued is seen at the latest then.
POLL = 1.0
#: After executors were in each other's way, seconds at most.
CONFLICT = 0.1
#: A claim whose answer was lost may be committed this long after, seconds.
LOST = 60.0
#: So many are begun at once.
AT_ONCE = 32
#: So many workflows are named in one statement.
MANY = 5000
#: PostgreSQL's codes of what it refuses to one of two that claim at once: a lock that is not
#: available, and a serialization failure.
CONFLICTS = ("55P03", "40001")


class ClaimedQueue(msgspec.Struct):
    """``handle``: DBOS's. So many of it, ``most``, may be executed here at once; of a partition
    of it, if it is ``partitioned``, one anywhere."""

    name: str
    handle: Any
    most: int
    partitioned: bool


class Worker:
    """A thread that claims and starts the workflows of ``queue``."""

    def __init__(
        self,
        system: System,
        queue: ClaimedQueue,
        executor: str,
        version: str,
        lease_held: Callable[[], bool] = lambda: True,
        prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """``lease_held``: whether something may be claimed now. ``prepare`` gives a claimed row
        as it is to be executed."""
        self._lease_held = lease_held
        self._prepare = prepare
        self._system = system
        self._queue = queue
        self._executor = executor
        self._version = version
        self._bell = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"claims {queue.name}", daemon=True)
        #: Claimed, but not yet read: workflow id -> the claim's token. Its rows are ours
        #: until the next start, so they are read until that succeeds.
        self._found: dict[str, str] = {}
        #: Claimed, but could not be started, and not back in the queue yet: as ``_found``.
        self._back: dict[str, str] = {}
        #: When it was last said of such a run that it could not be started.
        self._reported: dict[str, float] = {}
        #: Of the claim that is being made.
        self._asked: str | None = None
        #: Tokens of claims without an answer, and when it is too late for them.
        self._unanswered: dict[str, float] = {}
        #: Started, and not executed yet.
        self._started: set[str] = set()
        #: workflow id -> (which dispatch of it this is, Unix seconds of the submit), of what
        #: was claimed; until whoever executes it takes it out, or it is over.
        self.claimed: dict[str, tuple[int, float]] = {}
        self._table = table = system.tables.workflow_status
        self._any_queued = (
            sa.select(sa.literal(1))
            .where(table.c.queue_name == queue.name, table.c.status == "ENQUEUED")
            .where(system.is_in_flight())
            .limit(1)
        )

    def start(self) -> None:
        self._thread.start()
        self.kick()

    def kick(self) -> None:
        """Look for work now. From any thread."""
        self._bell.set()

    def stop(self) -> None:
        """Claim no more. From any thread; ``join`` waits for the claim that is under way."""
        self._stopping = True
        self.kick()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def take_over(self, attempts: Mapping[str, int]) -> tuple[list[str], str]:
        """Workflows whose rows say that these attempts of them are running here: their ids, and
        the token by which they are claimed anew. They begin with the first claim. Blocking; before
        ``start``."""
        c, token = self._table.c, str(uuid.uuid4())
        names = list(attempts)
        found: list[str] = []
        with self._system.engine.begin() as connection:
            for at in range(0, len(names), MANY):
                ours = (
                    c.workflow_uuid.in_(names[at : at + MANY]),
                    c.queue_name == self._queue.name,
                    c.status == "PENDING",
                    c.application_version == self._version,
                )
                query = sa.select(c.workflow_uuid, c.recovery_attempts).where(*ours)
                same = [run for run, n in connection.execute(query) if attempts[run] == n]
                connection.execute(
                    self._table.update()
                    .where(c.workflow_uuid.in_(same))
                    .values(owner_xid=token, executor_id=self._executor)
                )
                found += same
        self._found |= dict.fromkeys(found, token)
        return found, token

    def note_begun(self, workflow: str) -> None:
        """It is executed from now on."""
        self._started.discard(workflow)

    def note_ended(self, workflow: str) -> None:
        """Its row has its outcome, and its place is free. From any thread."""
        self.claimed.pop(workflow, None)
        self.kick()

    def knows(self, workflow: str, token: str | None) -> bool:
        """Whether it is on its way from its claim to its execution. From any thread."""
        if token is not None and (token == self._asked or token in self._unanswered):
            return True
        ways = (self._found, self._back, self._started, self.claimed)
        return any(workflow in way for way in ways)

    def set_most(self, most: int) -> None:
        """So many at once from now on; what is executed already goes on."""
        self._queue.most = most
        self.kick()

    def _run(self) -> None:
        wait, again = POLL, False
        while True:
            self._bell.wait(wait)
            rung = again or self._bell.is_set()
            self._bell.clear()
            if self._stopping:
                return
            wait, again = POLL, not self._lease_held()
            if again:
                continue
            try:
                if self._back:
                    self._put_back()
                if rung or self._found or self._unanswered or self._is_any_queued():
                    again = self._claim()
                    wait = random.uniform(0, CONFLICT) if again else POLL
            except Exception as error:
                if isinstance(error, sa.exc.DBAPIError) and _is_conflict(error):
                    wait, again = random.uniform(0, CONFLICT), True
                elif not self._stopping:
                    log.warning("queued runs cannot be claimed: %s", reason(error))

    def _is_any_queued(self) -> bool:
        """A claim costs twenty times as much."""
        with self._system.engine.connect() as c:
            return c.execute(self._any_queued).first() is not None

    def _claim(self) -> bool:
        """Whether to look again soon."""
        queue = self._queue
        self._find_lost()
        # Before what is executed: what comes to be executed meanwhile counts twice, not never.
        starting = len(self._started) + len(self._found)
        busy = self._system.count_executed(queue.name) + starting
        free = queue.most - busy
        if free > 0:
            self._claim_up_to(free, busy)
        again = bool(self._found) and self._give_back()
        if self._found:
            self._begin()
        return again

    def _claim_up_to(self, free: int, busy: int) -> None:
        """As many as there are and as are ``free`` beside the ``busy`` ones."""
        claimant = self._queue.handle, self._executor, self._version
        with self._open_claim() as token:
            if self._queue.partitioned:
                found = self._system.claim_heads(*claimant, free, token)
            else:
                found = self._system.claim_queued(*claimant, busy, token)
            self._found |= dict.fromkeys(found, token)

    @contextlib.contextmanager
    def _open_claim(self) -> Iterator[str]:
        """A claim's token, which is kept when its answer is lost."""
        token = self._asked = str(uuid.uuid4())
        try:
            yield token
        except sa.exc.DBAPIError as error:
            if error.connection_invalidated:
                self._unanswered[token] = time.monotonic() + LOST
            raise
        finally:
            self._asked = None

    def _find_lost(self) -> None:
        """What claims without an answer have got: the connection broke when they were
        stored, and nobody else would begin it."""
        if not self._unanswered:
            return
        c, now = self._table.c, time.monotonic()
        query = sa.select(c.workflow_uuid, c.owner_xid).where(
            c.queue_name == self._queue.name,
            c.status == "PENDING",
            c.owner_xid.in_(list(self._unanswered)),
        )
        with self._system.engine.connect() as connection:
            lost = {workflow: token for workflow, token in connection.execute(query)}
        self._found |= lost
        over = set(lost.values())
        self._unanswered = {
            t: end for t, end in self._unanswered.items() if end > now and t not in over
        }

    def _give_back(self) -> bool:
        """Two executors that claim at once may each find a head on one thread: a run that goes
        before has been stored between their looks. Each looks again after its claim is stored,
        so that one of them, or both, see the other and put their own back. (SQLite has one
        writer at a time: between a look and its claim nobody claims.)"""
        if not self._queue.partitioned or self._system.engine.dialect.name == "sqlite":
            return False
        t, other = self._table, self._table.alias()
        beside = sa.select(sa.literal(1)).where(
            other.c.queue_name == self._queue.name,
            other.c.status == "PENDING",
            other.c.queue_partition_key == t.c.queue_partition_key,
            other.c.workflow_uuid != t.c.workflow_uuid,
        )
        given = self._unclaim(t.c.owner_xid.in_(set(self._found.values())), beside.exists())
        for workflow in given:
            del self._found[workflow]
        return bool(given)

    def _put_back(self) -> None:
        """What could not be started: it is first in its queue again, for any executor. Its
        token says that it is still what was claimed; what has ended meanwhile has none."""
        c, tokens = self._table.c, list(self._back.values())
        self._unclaim(c.workflow_uuid.in_(list(self._back)), c.owner_xid.in_(tokens))
        self._back.clear()

    def _unclaim(self, *which: sa.ColumnElement[bool]) -> list[str]:
        """Back to the queue, as if it had not been claimed; the ids."""
        t = self._table
        query = (
            t.update()
            .where(t.c.queue_name == self._queue.name, t.c.status == "PENDING", *which)
            .values(
                status="ENQUEUED",
                owner_xid=None,
                started_at_epoch_ms=None,
                recovery_attempts=t.c.recovery_attempts - 1,
            )
            .returning(t.c.workflow_uuid)
        )
        with self._system.engine.begin() as connection:
            return list(connection.scalars(query))

    def _begin(self) -> None:
        tokens, rows = self._found, self._system.read_statuses(list(self._found))
        self._found = {}
        ours = []
        for status in rows:
            if status["status"] != "PENDING" or status["executor_id"] != self._executor:
                continue  # aborted since, or given back
            workflow = status["workflow_uuid"]
            self.claimed[workflow] = status["recovery_attempts"], status["created_at"] / 1000
            self._started.add(workflow)
            ours.append(status)
        for workflow, error in self._execute(ours, tokens).items():
            self._report(workflow, error)
            self._started.discard(workflow)
            self.claimed.pop(workflow, None)
            self._back[workflow] = tokens[workflow]
        if self._back:
            self._put_back()

    def _execute(
        self, rows: list[dict[str, Any]], tokens: Mapping[str, str]
    ) -> dict[str, Exception]:
        """Start them, several at once, since each waits for a turn of the loop; what could not be
        started, and why. When the loop is gone some may wait for ever: they hold up no end."""
        refused: dict[str, Exception] = {}
        left = iter(rows)

        def start() -> None:
            for status in left:
                workflow = status["workflow_uuid"]
                try:
                    self._system.execute(self._prepare(status), tokens[workflow])
                except Exception as error:
                    refused[workflow] = error

        helpers = [
            threading.Thread(target=start, name="begins", daemon=True)
            for _ in range(min(AT_ONCE, len(rows)) - 1)
        ]
        for helper in helpers:
            helper.start()
        start()
        for helper in helpers:
            helper.join()
        return refused

    def _report(self, workflow: str, error: Exception) -> None:
        """That it could not be started. It is tried again each second: said each minute."""
        now = time.monotonic()
        if now - self._reported.get(workflow, -math.inf) < SAY_AGAIN:
            return
        self._reported = {w: at for w, at in self._reported.items() if now - at < SAY_AGAIN}
        self._reported[workflow] = now
        log.error(
            "run %s cannot be started (%s); it goes back to its queue, and is tried again",
            workflow,
            reason(error),
            exc_info=error,
        )


def _is_conflict(error: sa.exc.DBAPIError) -> bool:
    """Whether another executor was claiming at the same moment."""
    return getattr(error.orig, "sqlstate", None) in CONFLICTS
