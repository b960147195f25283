"""How the rows that DBOS keeps are reached: which of them are runs, what is read of one, and how
often it is tried. Statuses are DBOS's here; ``row_status`` reads ours from a row."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import sqlalchemy as sa
import trio

from .retries import FIRST, Complaint, may_pass, until_done
from .row_status import NO_THREAD, WORKFLOW

QUEUE = "threads"
HOOKS_QUEUE = "hooks"
#: Changes only when the workflow's shape does: recovery finds rows of this version only.
APP_VERSION = "runctl-1"
#: A verb's read is tried again this long, seconds. What an attempt must know is read until
#: it is there: no run fails by a database that is away.
PATIENCE = 10.0
#: Of a run's input and outcome, where many are listed: so many characters of their JSON. A
#: character of a thread's name or an error may be six there.
MOST_INPUT = 4 * 1024
MOST_OUTPUT = 16 * 1024

T = TypeVar("T")


class Held(msgspec.Struct, frozen=True):
    """A workflow that is running by its row. ``token``: of its claim."""

    workflow: str
    thread: str | None
    token: str | None


class Database(Protocol):
    """What ``RowAccess`` needs of DBOS's."""

    engine: sa.Engine
    tables: Any

    def now(self) -> Any:
        """SQL for its time, in Unix milliseconds."""


class RowAccess:
    """``list_`` and ``is_`` give SQL, of the columns ``c`` of a table or an alias; ``select_`` a
    subquery of the table's row. Methods that ask the database raise SQLAlchemyError."""

    def __init__(
        self,
        database: Database,
        executor: str,
        stopping: threading.Event,
        *,
        threads: trio.CapacityLimiter,
        alone: bool,
    ) -> None:
        """``threads``: those that may wait for the database. ``alone``: there are no other
        executors."""
        self.engine = database.engine
        self.tables = database.tables
        self.table: sa.Table = database.tables.workflow_status
        self.now = database.now
        self.executor = executor
        self.stopping = stopping
        self.alone = alone
        self._threads = threads

    def is_run(self, c: Any) -> sa.ColumnElement[bool]:
        """Whether a row is a run's: one of ours, or whatever else is on our queue."""
        return sa.or_(c.name == WORKFLOW, c.queue_name == QUEUE)

    def is_on(self, c: Any, thread: str) -> sa.ColumnElement[bool]:
        here: sa.ColumnElement[bool] = c.queue_partition_key == thread
        return sa.or_(here, c.queue_partition_key.is_(None)) if thread == NO_THREAD else here

    def is_ours(self, c: Any) -> sa.ColumnElement[bool]:
        """Whether this executor is the one to care for a row that was begun. The embedded
        database is ours by its lock: all of them, whatever ID an earlier daemon had."""
        if self.alone:
            return sa.true()
        ours: sa.ColumnElement[bool] = c.executor_id == self.executor
        return ours

    def list_age(self, t: Any) -> tuple[sa.ColumnElement[Any], ...]:
        """What rises with each submit on a thread. created_at is in milliseconds,
        and ids that users choose do not rise."""
        if self.engine.dialect.name == "sqlite":
            return t.c.created_at, sa.literal_column(f"{t.name}.rowid")
        return t.c.created_at, t.c.priority, t.c.workflow_uuid

    def list_columns(self, *, brief: bool = False) -> list[sa.ColumnElement[Any]]:
        """What ``read_run`` needs. ``brief``: of what may be long, prompts and replies, only the
        beginning."""
        # dbos keeps inputs and outputs in tables of their own, beside older columns.
        c = self.table.c
        inputs: sa.ColumnElement[Any] = self.select_input()
        output: sa.ColumnElement[Any] = self.select_output()
        if brief:
            inputs = sa.func.substr(inputs, 1, MOST_INPUT)
            output = sa.func.substr(output, 1, MOST_OUTPUT)
        return [
            c.workflow_uuid,
            c.status,
            c.name,
            c.serialization,
            c.queue_partition_key,
            c.recovery_attempts,
            c.executor_id,
            c.created_at,
            c.started_at_epoch_ms,
            c.completed_at,
            c.updated_at,
            inputs.label("inputs"),
            output.label("output"),
        ]

    def select_input(self) -> sa.ScalarSelect[Any]:
        given, c = self.tables.workflow_input, self.table.c
        return (
            sa.select(sa.func.coalesce(given.c.inputs, c.inputs))
            .where(given.c.workflow_uuid == c.workflow_uuid)
            .scalar_subquery()
        )

    def select_output(self) -> sa.ScalarSelect[Any]:
        made, c = self.tables.workflow_output, self.table.c
        return (
            sa.select(sa.func.coalesce(made.c.output, c.output))
            .where(made.c.workflow_uuid == c.workflow_uuid)
            .scalar_subquery()
        )

    async def read_scalar(self, query: sa.Select[Any], patience: float = PATIENCE) -> Any:
        """The first column of the first row; None when there is none."""
        return await self.in_thread(self.scalar, query, patience)

    def scalar(self, query: sa.Select[Any], patience: float = PATIENCE) -> Any:
        row = self.fetch(query, patience)
        return row[0][0] if row else None

    async def read(self, query: sa.Select[Any], patience: float = PATIENCE) -> Sequence[Any]:
        """What is read for as long as it takes has no thread while it waits: others need them."""
        if patience < math.inf:
            return await self.in_thread(self.fetch, query, patience)
        complaint = Complaint("what a run must know", "read")
        return await self.insist(lambda: self.fetch(query, 0), complaint)

    def fetch(self, query: sa.Select[Any], patience: float = PATIENCE) -> Sequence[Any]:
        def fetch() -> Sequence[Any]:
            with self.engine.connect() as c:
                return c.execute(query).fetchall()

        return self.patiently(fetch, patience)

    async def change(
        self, query: sa.Insert | sa.Update | sa.Delete, patience: float = math.inf
    ) -> int:
        """How many rows it changed. Tried for ``patience`` seconds until the database takes it;
        by default for as long as it takes, whatever it says."""

        def write() -> int:
            with self.engine.begin() as connection:
                return connection.execute(query).rowcount

        if patience < math.inf:
            return await self.in_thread(self.patiently, write, patience)
        return await self.insist(write, Complaint("a change of a run's row"))

    async def insist(self, work: Callable[[], T], complaint: Complaint) -> T:
        return await until_done(
            lambda: self.in_thread(work),
            complaint,
            self.stopping,
            refusals=sa.exc.SQLAlchemyError,
        )

    async def in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._threads)

    def patiently(self, work: Callable[[], T], patience: float) -> T:
        """``work``, tried again for ``patience`` seconds when the database cannot serve it: its
        connection broke, no file could be opened. Blocking."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return work()
            except sa.exc.SQLAlchemyError as error:
                over = time.monotonic() >= deadline or self.stopping.is_set()
                if over or not may_pass(error):
                    raise
                self.stopping.wait(FIRST)
