"""What is read of the runs' rows: by the verbs, and by what runs beside them."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from ...protocol.errors import QueueFull
from ...protocol.model import Run, RunSpec, Status, ThreadRow
from .row_access import PATIENCE, QUEUE, RowAccess
from .row_status import HOOK, LIVE, WORKFLOW, read_run, read_thread_row


class Rows:
    """Methods raise SQLAlchemyError when the database cannot be used for PATIENCE.
    Times are Unix seconds."""

    def __init__(self, database: RowAccess) -> None:
        self._db = database

    async def get(self, run: str) -> tuple[RunSpec, Run] | None:
        t = self._db.table
        query = sa.select(*self._db.list_columns()).where(
            self._db.is_run(t.c), t.c.workflow_uuid == run
        )
        rows = await self._db.read(query)
        return read_run(rows[0]) if rows else None

    async def find_beginning_with(self, beginning: str, limit: int) -> list[str]:
        """Runs whose ids begin so. ``beginning`` is a run's id, as far as it goes."""
        c = self._db.table.c
        begins: sa.ColumnElement[bool]
        if self._db.engine.dialect.name == "sqlite":  # its LIKE knows no case, and no index then
            begins = c.workflow_uuid.op("GLOB")(beginning + "*")
        else:
            begins = c.workflow_uuid.startswith(beginning, autoescape=True)
        query = sa.select(c.workflow_uuid).where(self._db.is_run(c), begins)
        rows = await self._db.read(query.order_by(c.workflow_uuid).limit(limit))
        return [row.workflow_uuid for row in rows]

    async def list_runs(self, thread: str, *, limit: int = 100, offset: int = 0) -> list[Run]:
        """A page of the thread's runs, newest first."""
        t = self._db.table
        query = (
            sa.select(*self._db.list_columns(brief=True))
            .where(self._db.is_run(t.c), self._db.is_on(t.c, thread))
            .order_by(*(column.desc() for column in self._db.list_age(t)))
            .limit(limit)
            .offset(offset)
        )
        return [read_run(row)[1] for row in await self._db.read(query)]

    async def list_live_runs(self, thread: str) -> list[Run]:
        """Running first, then queued in their order."""
        t = self._db.table
        query = (
            sa.select(*self._db.list_columns(brief=True))
            .where(self._db.is_run(t.c), self._db.is_on(t.c, thread))
            .where(t.c.status.in_(list(LIVE)))
            .order_by(t.c.priority, t.c.created_at, t.c.workflow_uuid)
        )
        runs = [read_run(row)[1] for row in await self._db.read(query)]
        return sorted(runs, key=lambda run: run.status is not Status.RUNNING)

    async def next_place(self, thread: str, most: int) -> int:
        """The priority that puts a run behind all others of its thread. DBOS orders by
        priority, created_at, id; created_at is in milliseconds, ids that users
        choose do not rise, and clocks of executors differ.

        Two submits at once, through two executors, may get the same place: then the rest
        decides, alike for all. Whatever was answered before a submit began is before it,
        since it has a lower place, or is not live any more.

        Raises: QueueFull, when ``most`` wait there already."""
        t = self._db.table
        query = (
            sa.select(
                sa.func.max(t.c.priority).label("place"),
                sa.func.sum(sa.case((t.c.status == "PENDING", 0), else_=1)).label("queued"),
            )
            .where(self._db.is_run(t.c), t.c.queue_partition_key == thread)
            .where(t.c.status.in_(list(LIVE)))
        )
        ((last, queued),) = await self._db.read(query)
        if (queued or 0) >= most:
            raise QueueFull(
                f"{queued} runs are queued on thread {thread!r} and queue.max_queued_per_thread"
                f" is {most}; submit again when some have run, or raise it"
            )
        return int(last or 0) + 1

    # ---- threads ----------------------------------------------------------------

    async def list_threads(self, *, limit: int, offset: int, busy: bool = False) -> list[ThreadRow]:
        """A page of threads, the one with the latest submit first, each with its current run:
        the running one, else the next, else the last; costs what is shown, not what is
        stored. ``busy``: only those on which a run is running or queued."""
        t, newer = self._db.table, self._db.table.alias("newer")
        thread = t.c.queue_partition_key
        kept = [self._db.is_run(t.c)]
        if busy:  # what is live is found by the status, however many threads there are
            live = sa.select(thread).where(self._db.is_run(t.c), t.c.status.in_(list(LIVE)))
            kept.append(thread.in_(live))
        later = sa.select(newer.c.workflow_uuid).where(
            newer.c.queue_partition_key == thread,
            newer.c.created_at >= t.c.created_at,
            sa.tuple_(*self._db.list_age(newer)) > sa.tuple_(*self._db.list_age(t)),
        )
        page = (
            sa.select(t.c.workflow_uuid, thread, t.c.created_at)
            .where(*kept, ~later.exists())
            .order_by(t.c.created_at.desc(), t.c.workflow_uuid.desc())
            .limit(limit)
            .offset(offset)
            .subquery("page")
        )
        current = sa.func.coalesce(
            self._select_head("PENDING", page.c.queue_partition_key),
            self._select_head("ENQUEUED", page.c.queue_partition_key),
            page.c.workflow_uuid,
        )
        query = (
            sa.select(
                *self._db.list_columns(brief=True),
                self._count_in_thread("ENQUEUED", "DELAYED"),
                self._count_in_thread("PENDING"),
            )
            .join(page, t.c.workflow_uuid == current)
            .order_by(page.c.created_at.desc(), page.c.workflow_uuid.desc())
        )
        return [read_thread_row(row, *row[-2:]) for row in await self._db.read(query)]

    def _select_head(self, status: str, thread: sa.ColumnElement[str]) -> sa.ScalarSelect[str]:
        """The run of ``thread`` that is first among those with this status."""
        other = self._db.table.alias()
        return (
            sa.select(other.c.workflow_uuid)
            .where(
                other.c.queue_name == QUEUE,
                # Written out, so that SQLite sees that DBOS's index of what is live serves.
                other.c.status == sa.literal_column(f"'{status}'"),
                other.c.queue_partition_key == thread,
            )
            .order_by(other.c.priority, other.c.created_at, other.c.workflow_uuid)
            .limit(1)
            .scalar_subquery()
        )

    def _count_in_thread(self, *statuses: str) -> sa.ScalarSelect[int]:
        """How many runs of the row's thread have these statuses."""
        other = self._db.table.alias()
        return (
            sa.select(sa.func.count())
            .where(
                other.c.queue_name == QUEUE,
                # Written out, so that SQLite sees that DBOS's index of what is live serves.
                other.c.status.in_([sa.literal_column(f"'{status}'") for status in statuses]),
                other.c.queue_partition_key == self._db.table.c.queue_partition_key,
            )
            .scalar_subquery()
        )

    async def list_live_threads(self, *, limit: int, offset: int) -> list[ThreadRow]:
        """A page of the threads on which a run is running or queued, each with the running
        run, else the next one. Running ones first, then the most recent first. Costs what
        is live, not what is stored."""
        t = self._db.table
        running_first = sa.case((t.c.status == "PENDING", 0), else_=1)
        part = t.c.queue_partition_key
        shown = (running_first, t.c.priority, t.c.created_at, t.c.workflow_uuid)
        rank = sa.func.row_number().over(partition_by=part, order_by=shown).label("rank")
        count = sa.func.sum(sa.case((t.c.status.in_(["ENQUEUED", "DELAYED"]), 1), else_=0))
        busy = sa.func.sum(sa.case((t.c.status == "PENDING", 1), else_=0))
        inner = (
            sa.select(
                t.c.workflow_uuid.label("id"),
                rank,
                count.over(partition_by=part).label("queued"),
                busy.over(partition_by=part).label("busy"),
            )
            .where(self._db.is_run(t.c), t.c.status.in_(list(LIVE)))
            .subquery()
        )
        query = (
            sa.select(*self._db.list_columns(brief=True), inner.c.queued, inner.c.busy)
            .join(inner, inner.c.id == t.c.workflow_uuid)
            .where(inner.c.rank == 1)
            .order_by(running_first, t.c.created_at.desc(), t.c.workflow_uuid.desc())
            .limit(limit)
            .offset(offset)
        )
        return [read_thread_row(row, row.queued, row.busy) for row in await self._db.read(query)]

    # ---- of all runs ------------------------------------------------------------

    async def list_in_flight(self) -> set[str]:
        """The runs that may have output and are not over: running, or to be replayed."""
        t = self._db.table
        query = sa.select(t.c.workflow_uuid).where(
            self._db.is_run(t.c),
            sa.or_(
                t.c.status == "PENDING",
                sa.and_(t.c.status.in_(list(LIVE)), t.c.recovery_attempts > 0),
            ),
        )
        return {row.workflow_uuid for row in await self._db.read(query)}

    async def read_ends(self, runs: Sequence[str]) -> dict[str, float]:
        """When those of ``runs`` that are over ended, in Unix seconds."""
        t = self._db.table
        found: dict[str, float] = {}
        for start in range(0, len(runs), 500):
            query = sa.select(t.c.workflow_uuid, t.c.completed_at, t.c.updated_at).where(
                t.c.workflow_uuid.in_(runs[start : start + 500]),
                t.c.status.not_in(list(LIVE)),
            )
            for row in await self._db.read(query):
                found[row.workflow_uuid] = (row.completed_at or row.updated_at) / 1000
        return found

    async def count_runs(self, status: str, patience: float = PATIENCE) -> int:
        t = self._db.table
        query = sa.select(sa.func.count()).where(self._db.is_run(t.c), t.c.status == status)
        return int(await self._db.read_scalar(query, patience))

    async def weigh_queued(self) -> int:
        """How many bytes the inputs of the runs have that wait."""
        text = self._db.select_input()
        size = sa.func.octet_length(text)
        if self._db.engine.dialect.name == "sqlite":  # older ones have no octet_length
            size = sa.func.length(sa.cast(text, sa.LargeBinary))
        query = sa.select(sa.func.coalesce(sa.func.sum(size), 0))
        query = query.where(
            self._db.is_run(self._db.table.c), self._db.table.c.status == "ENQUEUED"
        )
        return int(await self._db.read_scalar(query))

    async def count_hooks(self, patience: float = PATIENCE) -> int:
        """How many are not told yet, of all executors."""
        t = self._db.table
        query = sa.select(sa.func.count()).where(t.c.name == HOOK, t.c.status.in_(list(LIVE)))
        return int(await self._db.read_scalar(query, patience))

    async def list_owners(self, *, hooks: bool = False) -> set[str]:
        """The executors that runs are in flight on, as far as the database knows; with
        ``hooks`` those that have only a hook in flight as well."""
        t = self._db.table
        query = (
            sa.select(t.c.executor_id)
            .where(t.c.name.in_([WORKFLOW, HOOK] if hooks else [WORKFLOW]))
            .where(t.c.status == "PENDING")
            .distinct()
        )
        return {row.executor_id for row in await self._db.read(query)}
