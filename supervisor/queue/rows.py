"""What is asked of the rows that DBOS keeps: by the verbs, and by what runs beside them.

Statuses are DBOS's here; ``status`` reads ours from a row."""

from __future__ import annotations

import itertools
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
import trio

from ...protocol.errors import QueueFull
from ...protocol.model import Run, RunSpec, Status, ThreadRow
from .retries import FIRST, Complaint, passes, reason, until_done
from .row_status import FORMATS, HOOK, LIVE, NO_THREAD, WORKFLOW, hook_id, read, read_thread

log = logging.getLogger("runctld.rows")

QUEUE = "threads"
HOOKS_QUEUE = "hooks"
#: Changes only when the workflow's shape does: recovery finds rows of this version only.
APP_VERSION = "runctl-1"
#: The end of an aborted run's processes is looked for this long, seconds.
RECENT = 600.0
#: A verb's read is tried again this long, seconds. What an attempt must know is read until
#: it is there: no run fails by a database that is away.
PATIENCE = 10.0
#: A try for the lock that the making of an index takes: whoever writes waits behind it.
INDEX_LOCK = "1s"
#: Of a run's input and outcome, where many are listed: so many characters of their JSON. A
#: character of a thread's name or an error may be six there.
MOST_INPUT = 4 * 1024
MOST_OUTPUT = 16 * 1024
#: Of a conversation's turns, rows that are looked at in one query.
PAGE = 100
#: So many characters may JSON have made of one byte of a text, and so many may a row hold
#: beside prompt and reply.
ESCAPED, SPEC_BYTES = 6, 16 * 1024

T = TypeVar("T")


class Held(msgspec.Struct, frozen=True):
    """A workflow that is running by its row. ``token``: of its claim."""

    workflow: str
    thread: str | None
    token: str | None


class Rows:
    """Methods raise SQLAlchemyError when the database cannot be used for PATIENCE.
    Times are Unix seconds."""

    def __init__(
        self,
        engine: sa.Engine,
        tables: Any,
        executor: str,
        stopping: threading.Event,
        *,
        threads: trio.CapacityLimiter,
        alone: bool,
        now: Callable[[], Any],
    ) -> None:
        """``tables``: DBOS's. ``threads``: those that may wait for the database. ``alone``: there
        are no other executors. ``now``: SQL for the time of the database, in Unix milliseconds."""
        self._threads = threads
        self._now = now
        self._engine = engine
        self._tables = tables
        self._table: sa.Table = tables.workflow_status
        c = self._table.c
        schemas = engine.get_execution_options().get("schema_translate_map", {})
        self._schema: str | None = schemas.get(self._table.schema)
        self._index = sa.Index("runctl_thread", c.queue_partition_key, c.created_at)
        self._executor = executor
        self._stopping = stopping
        self._alone = alone

    async def get(self, run: str) -> tuple[RunSpec, Run] | None:
        t = self._table
        query = sa.select(*self._columns()).where(self._run(t.c), t.c.workflow_uuid == run)
        rows = await self._rows(query)
        return read(rows[0]) if rows else None

    async def beginning_with(self, beginning: str, limit: int) -> list[str]:
        """Runs whose ids begin so. ``beginning`` is a run's id, as far as it goes."""
        c = self._table.c
        begins: sa.ColumnElement[bool]
        if self._engine.dialect.name == "sqlite":  # its LIKE knows no case, and no index then
            begins = c.workflow_uuid.op("GLOB")(beginning + "*")
        else:
            begins = c.workflow_uuid.startswith(beginning, autoescape=True)
        query = sa.select(c.workflow_uuid).where(self._run(c), begins)
        rows = await self._rows(query.order_by(c.workflow_uuid).limit(limit))
        return [row.workflow_uuid for row in rows]

    async def runs(self, thread: str, *, limit: int = 100, offset: int = 0) -> list[Run]:
        """A page of the thread's runs, newest first."""
        t = self._table
        query = (
            sa.select(*self._columns(brief=True))
            .where(self._run(t.c), self._on(t.c, thread))
            .order_by(*(column.desc() for column in self._age(t)))
            .limit(limit)
            .offset(offset)
        )
        return [read(row)[1] for row in await self._rows(query)]

    async def live_runs(self, thread: str) -> list[Run]:
        """Running first, then queued in their order."""
        t = self._table
        query = (
            sa.select(*self._columns(brief=True))
            .where(self._run(t.c), self._on(t.c, thread))
            .where(t.c.status.in_(list(LIVE)))
            .order_by(t.c.priority, t.c.created_at, t.c.workflow_uuid)
        )
        runs = [read(row)[1] for row in await self._rows(query)]
        return sorted(runs, key=lambda run: run.status is not Status.RUNNING)

    async def next_place(self, thread: str, most: int) -> int:
        """The priority that puts a run behind all others of its thread. DBOS orders by
        priority, created_at, id; created_at is in milliseconds, ids that users
        choose do not rise, and clocks of executors differ.

        Two submits at once, through two executors, may get the same place: then the rest
        decides, alike for all. Whatever was answered before a submit began is before it,
        since it has a lower place, or is not live any more.

        Raises: QueueFull, when ``most`` wait there already."""
        t = self._table
        query = (
            sa.select(
                sa.func.max(t.c.priority).label("place"),
                sa.func.sum(sa.case((t.c.status == "PENDING", 0), else_=1)).label("queued"),
            )
            .where(self._run(t.c), t.c.queue_partition_key == thread)
            .where(t.c.status.in_(list(LIVE)))
        )
        ((last, queued),) = await self._rows(query)
        if (queued or 0) >= most:
            raise QueueFull(
                f"{queued} runs are queued on thread {thread!r} and queue.max_queued_per_thread"
                f" is {most}; submit again when some have run, or raise it"
            )
        return int(last or 0) + 1

    async def turns(self, thread: str, before: str, limit: int, most: int) -> list[tuple[str, str]]:
        """(prompt, reply) of the thread's succeeded chat runs before ``before``, in order: the
        newest ``limit`` that have text, and at most ``most`` bytes of it. Empty replies are no
        turns. What is longer is not read: a thread may hold far more than memory should."""
        if limit < 1:
            return []
        complaint = Complaint("what was said before on a run's thread", "read")
        return await self._surely(lambda: self._turns(thread, before, limit, most), complaint)

    def _turns(self, thread: str, before: str, limit: int, most: int) -> list[tuple[str, str]]:
        t = self._table
        made = sa.select(t.c.created_at).where(t.c.workflow_uuid == before).scalar_subquery()
        given, output = self._input(), self._output()
        length = sa.func.coalesce(sa.func.length(given), 0) + sa.func.length(output)
        query = (
            sa.select(t.c.workflow_uuid, length.label("length"))
            .where(self._run(t.c), t.c.queue_partition_key == thread)
            .where(t.c.status == "SUCCESS", t.c.created_at <= made, t.c.workflow_uuid != before)
            .where(output.like('%"reply"%'), output.not_like('%"reply": ""%'))
            .order_by(*(column.desc() for column in self._age(t)))
        )
        found: list[tuple[str, str]] = []
        for start in itertools.count(0, PAGE):
            page = self._fetch(query.limit(PAGE).offset(start), 0)
            for row in page:
                if row.length > ESCAPED * most + SPEC_BYTES:
                    return found[::-1]
                if (turn := self._turn(row.workflow_uuid)) is None:
                    continue
                most -= sum(len(text.encode(errors="replace")) for text in turn)
                if most < 0 or len(found) == limit:
                    return found[::-1]
                found.append(turn)
            if len(page) < PAGE or len(found) == limit:
                break
        return found[::-1]

    def _turn(self, run: str) -> tuple[str, str] | None:
        """(prompt, reply) of a chat run; None when one of them is blank, which endpoints may
        refuse for ever. Blocking."""
        query = sa.select(*self._columns()).where(self._table.c.workflow_uuid == run)
        for row in self._fetch(query, 0):
            if row.serialization not in FORMATS:
                continue
            try:
                spec, outcome = json.loads(row.inputs)["positionalArgs"][0], json.loads(row.output)
                prompt, reply = spec.get("prompt") or "", outcome.get("reply") or ""
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                continue  # none of ours
            if outcome.get("status") == "succeeded" and prompt.strip() and reply.strip():
                return prompt, reply
        return None

    # ---- threads ----------------------------------------------------------------

    async def threads(self, *, limit: int, offset: int, busy: bool = False) -> list[ThreadRow]:
        """A page of threads, the one with the latest submit first, each with its current run:
        the running one, else the next, else the last; costs what is shown, not what is
        stored. ``busy``: only those on which a run is running or queued."""
        t, newer = self._table, self._table.alias("newer")
        thread = t.c.queue_partition_key
        kept = [self._run(t.c)]
        if busy:  # what is live is found by the status, however many threads there are
            live = sa.select(thread).where(self._run(t.c), t.c.status.in_(list(LIVE)))
            kept.append(thread.in_(live))
        later = sa.select(newer.c.workflow_uuid).where(
            newer.c.queue_partition_key == thread,
            newer.c.created_at >= t.c.created_at,
            sa.tuple_(*self._age(newer)) > sa.tuple_(*self._age(t)),
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
            self._head("PENDING", page.c.queue_partition_key),
            self._head("ENQUEUED", page.c.queue_partition_key),
            page.c.workflow_uuid,
        )
        query = (
            sa.select(
                *self._columns(brief=True),
                self._there("ENQUEUED", "DELAYED"),
                self._there("PENDING"),
            )
            .join(page, t.c.workflow_uuid == current)
            .order_by(page.c.created_at.desc(), page.c.workflow_uuid.desc())
        )
        return [read_thread(row, *row[-2:]) for row in await self._rows(query)]

    def _head(self, status: str, thread: sa.ColumnElement[str]) -> sa.ScalarSelect[str]:
        """The run of ``thread`` that is first among those with this status."""
        other = self._table.alias()
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

    def _there(self, *statuses: str) -> sa.ScalarSelect[int]:
        """How many runs of the row's thread have these statuses."""
        other = self._table.alias()
        return (
            sa.select(sa.func.count())
            .where(
                other.c.queue_name == QUEUE,
                # Written out, so that SQLite sees that DBOS's index of what is live serves.
                other.c.status.in_([sa.literal_column(f"'{status}'") for status in statuses]),
                other.c.queue_partition_key == self._table.c.queue_partition_key,
            )
            .scalar_subquery()
        )

    async def live_threads(self, *, limit: int, offset: int) -> list[ThreadRow]:
        """A page of the threads on which a run is running or queued, each with the running
        run, else the next one. Running ones first, then the most recent first. Costs what
        is live, not what is stored."""
        t = self._table
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
            .where(self._run(t.c), t.c.status.in_(list(LIVE)))
            .subquery()
        )
        query = (
            sa.select(*self._columns(brief=True), inner.c.queued, inner.c.busy)
            .join(inner, inner.c.id == t.c.workflow_uuid)
            .where(inner.c.rank == 1)
            .order_by(running_first, t.c.created_at.desc(), t.c.workflow_uuid.desc())
            .limit(limit)
            .offset(offset)
        )
        return [read_thread(row, row.queued, row.busy) for row in await self._rows(query)]

    # ---- of all runs ------------------------------------------------------------

    async def in_flight(self) -> set[str]:
        """The runs that may have output and are not over: running, or to be replayed."""
        t = self._table
        query = sa.select(t.c.workflow_uuid).where(
            self._run(t.c),
            sa.or_(
                t.c.status == "PENDING",
                sa.and_(t.c.status.in_(list(LIVE)), t.c.recovery_attempts > 0),
            ),
        )
        return {row.workflow_uuid for row in await self._rows(query)}

    async def ends(self, runs: Sequence[str]) -> dict[str, float]:
        """When those of ``runs`` that are over ended, in Unix seconds."""
        t = self._table
        found: dict[str, float] = {}
        for start in range(0, len(runs), 500):
            query = sa.select(t.c.workflow_uuid, t.c.completed_at, t.c.updated_at).where(
                t.c.workflow_uuid.in_(runs[start : start + 500]),
                t.c.status.not_in(list(LIVE)),
            )
            for row in await self._rows(query):
                found[row.workflow_uuid] = (row.completed_at or row.updated_at) / 1000
        return found

    async def count(self, status: str, patience: float = PATIENCE) -> int:
        t = self._table
        query = sa.select(sa.func.count()).where(self._run(t.c), t.c.status == status)
        return int(await self._in_thread(self._scalar, query, patience))

    async def weigh_queued(self) -> int:
        """How many bytes the inputs of the runs have that wait."""
        text = self._input()
        size = sa.func.octet_length(text)
        if self._engine.dialect.name == "sqlite":  # older ones have no octet_length
            size = sa.func.length(sa.cast(text, sa.LargeBinary))
        query = sa.select(sa.func.coalesce(sa.func.sum(size), 0))
        query = query.where(self._run(self._table.c), self._table.c.status == "ENQUEUED")
        return int(await self._in_thread(self._scalar, query))

    async def hooks_waiting(self, patience: float = PATIENCE) -> int:
        """How many are not told yet, of all executors."""
        t = self._table
        query = sa.select(sa.func.count()).where(t.c.name == HOOK, t.c.status.in_(list(LIVE)))
        return int(await self._in_thread(self._scalar, query, patience))

    async def owners(self, *, hooks: bool = False) -> set[str]:
        """The executors that runs are in flight on, as far as the database knows; with
        ``hooks`` those that have only a hook in flight as well."""
        t = self._table
        query = (
            sa.select(t.c.executor_id)
            .where(t.c.name.in_([WORKFLOW, HOOK] if hooks else [WORKFLOW]))
            .where(t.c.status == "PENDING")
            .distinct()
        )
        return {row.executor_id for row in await self._rows(query)}

    # ---- at the start -----------------------------------------------------------

    def make_index(self) -> None:
        """DBOS finds a thread's runs by an index while they are live only; lists, and the
        turns of a conversation, need those that are over. Blocking; on PostgreSQL a try waits
        for INDEX_LOCK, in which no executor can write.

        Raises: sqlalchemy's DBAPIError."""
        with self._engine.begin() as connection:
            if self._schema is not None:
                # Looked for first: to make what exists takes the lock as well.
                there = sa.select(sa.func.to_regclass(f"{self._schema}.{self._index.name}"))
                if connection.scalar(there) is not None:
                    return
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{INDEX_LOCK}'")
            connection.execute(sa.schema.CreateIndex(self._index, if_not_exists=True))

    async def index(self, patience: float) -> None:
        """``make_index``, tried for ``patience`` seconds. What it cannot do then is said: without
        the index all is as slow as there are many runs, and nothing worse."""
        why = "no answer"

        def note(words: str) -> None:
            nonlocal why
            why = words

        async def make() -> None:
            try:
                await self._in_thread(self.make_index)
            except (sa.exc.ProgrammingError, sa.exc.IntegrityError):
                # Another executor has made it just now, or we may not.
                await self._in_thread(self.make_index)

        complaint = Complaint("an index", "made", level=logging.INFO, heard=note)
        with trio.move_on_after(patience):
            try:
                await until_done(make, complaint, self._stopping, refusals=sa.exc.OperationalError)
                return
            except sa.exc.SQLAlchemyError as error:
                why = reason(error)
        kind, schema = (
            ("INDEX", "") if self._schema is None else ("INDEX CONCURRENTLY", f"{self._schema}.")
        )
        log.warning(
            "the index %s cannot be made (%s): lists and chats are slow where there are many runs."
            " End what holds the table and restart, or have its owner run once:"
            " CREATE %s %s ON %s%s (%s)",
            self._index.name,
            why,
            kind,
            self._index.name,
            schema,
            self._table.name,
            ", ".join(column.name for column in self._index.columns),
        )

    def replayed(self) -> int:
        """How many runs wait for another attempt. Blocking."""
        c = self._table.c
        query = sa.select(sa.func.count()).where(
            self._run(c), c.status == "ENQUEUED", c.recovery_attempts > 0
        )
        return int(self._scalar(query))

    # ---- what is begun here -----------------------------------------------------

    async def held(self) -> list[Held]:
        """What is running here, by its row."""
        c = self._table.c
        query = sa.select(c.workflow_uuid, c.queue_partition_key, c.owner_xid).where(
            c.status == "PENDING", self._ours(c), sa.or_(self._run(c), c.name == HOOK)
        )
        return [Held(*row) for row in await self._rows(query)]

    async def put_back(self, held: Collection[Held]) -> list[Held]:
        """Those of ``held`` whose claim is still the same are first in their queues again, as
        after a restart."""
        c = self._table.c
        same = (
            sa.and_(c.workflow_uuid == x.workflow, c.owner_xid.is_not_distinct_from(x.token))
            for x in held
        )
        query = (
            sa.update(self._table)
            .where(c.status == "PENDING", self._ours(c), sa.or_(*same))
            .values(status="ENQUEUED", owner_xid=None, started_at_epoch_ms=None)
            .returning(c.workflow_uuid)
        )

        def write() -> set[str]:
            with self._engine.begin() as connection:
                return set(connection.scalars(query))

        back = await self._in_thread(write)
        return [x for x in held if x.workflow in back]

    async def adopt(self) -> int:
        """What is queued where nobody claims it goes to where it is claimed: DBOS's own tools put
        what they resume or copy in its queue, without a thread or a version. How many rows."""
        c = self._table.c
        hook = c.name == HOOK
        queue = sa.case((hook, HOOKS_QUEUE), else_=QUEUE)
        ours = sa.or_(c.name.in_([WORKFLOW, HOOK]), c.queue_name == QUEUE)
        lost = sa.or_(
            c.queue_name.is_distinct_from(queue),
            c.application_version.is_(None),
            sa.and_(~hook, c.queue_partition_key.is_(None)),
        )
        which = c.status == sa.literal_column("'ENQUEUED'"), ours, lost
        if not await self._rows(sa.select(c.workflow_uuid).where(*which).limit(1)):
            return 0  # as nearly always: nothing is written
        thread = sa.case((hook, None), else_=sa.func.coalesce(c.queue_partition_key, NO_THREAD))
        query = (
            sa.update(self._table)
            .where(*which)
            .values(
                queue_name=queue,
                queue_partition_key=thread,
                application_version=sa.func.coalesce(c.application_version, APP_VERSION),
            )
        )
        return await self._change(query, 0.0)

    # ---- attempts and ends ------------------------------------------------------

    async def attempts(self, run: str) -> tuple[int, float]:
        """(which attempt this is, Unix seconds of the submit)"""
        t = self._table
        query = sa.select(t.c.recovery_attempts, t.c.created_at).where(t.c.workflow_uuid == run)
        (row,) = await self._rows(query, math.inf)
        return int(row.recovery_attempts or 1), row.created_at / 1000

    async def count_on(self, run: str, attempt: int, found: int) -> int | None:
        """What ``attempt`` is to be called, since attempt ``found`` is in the stream already:
        the database was put back from a backup that is older than the output. None when
        ``attempt`` is not the one that the run's row is about, so that ``found`` is newer."""
        c = self._table.c
        known = sa.func.coalesce(sa.func.nullif(c.recovery_attempts, 0), 1)
        query = (
            sa.update(self._table)
            .where(c.workflow_uuid == run, c.status == "PENDING")
            .where(c.executor_id == self._executor)
            .where(known.in_([attempt, found + 1]))  # the latter: an answer was lost
            .values(recovery_attempts=found + 1)
        )
        return found + 1 if await self._change(query) else None

    async def in_the_way(self, spec: RunSpec) -> tuple[bool, list[Run]]:
        """Before an attempt: whether the run was aborted after it was claimed, and the
        aborted runs of its thread whose processes other executors may still be ending."""
        t = self._table
        recent = (time.time() - RECENT) * 1000
        query = sa.select(*self._columns(brief=True)).where(
            self._run(t.c),
            t.c.status == "CANCELLED",
            t.c.queue_partition_key == spec.thread,
            sa.or_(
                t.c.workflow_uuid == spec.run,
                sa.and_(
                    t.c.executor_id != self._executor,
                    t.c.recovery_attempts > 0,
                    t.c.updated_at >= recent,
                ),
            ),
        )
        found = [read(row)[1] for row in await self._rows(query, math.inf)]
        others = [run for run in found if run.run != spec.run]
        return len(others) < len(found), others

    async def claim(self, run: str, executor: str) -> Held | None:
        """By which claim ``executor`` has the run; None when it does not."""
        c = self._table.c
        query = sa.select(c.workflow_uuid, c.queue_partition_key, c.owner_xid).where(
            c.workflow_uuid == run, c.status == "PENDING", c.executor_id == executor
        )
        rows = await self._rows(query)
        return Held(*rows[0]) if rows else None

    async def cancel(self, run: str, held: Held | None = None) -> bool:
        """The run is aborted, unless it has ended, or is not ``held`` any more; whether that was
        done. What DBOS writes, but for when it was started, which DBOS forgets."""
        c = self._table.c
        over = ["SUCCESS", "ERROR", "CANCELLED"]
        same = sa.true() if held is None else c.owner_xid.is_not_distinct_from(held.token)
        now = self._now()
        query = (
            sa.update(self._table)
            .where(c.workflow_uuid == run, c.status.not_in(over), same)
            .values(
                status="CANCELLED",
                owner_xid=None,
                # What is on our queue but of another program is known as ours by that alone.
                queue_name=sa.case((sa.and_(c.queue_name == QUEUE, c.name != WORKFLOW), QUEUE)),
                deduplication_id=None,
                updated_at=now,
                completed_at=now,
            )
        )
        return bool(await self._change(query, PATIENCE))

    async def note_ends(self, runs: Mapping[str, int | None]) -> None:
        """The ends of these aborted runs are stored: an empty output says so, which nothing
        else has of a run that is cancelled. With when their processes were gone, in Unix
        milliseconds: until then the row has when it was aborted."""
        made, c = self._tables.workflow_output, self._table.c
        new = ~sa.exists().where(made.c.workflow_uuid == c.workflow_uuid)
        ended = sa.select(c.workflow_uuid).where(
            c.workflow_uuid.in_(runs), c.status == "CANCELLED", new
        )
        query = sa.insert(made).from_select(["workflow_uuid"], ended, include_defaults=False)
        gone = {run: at for run, at in runs.items() if at is not None}
        try:
            await self._change(query)
            if gone:
                at = sa.case(gone, value=c.workflow_uuid)
                ours = c.workflow_uuid.in_(gone), c.status == "CANCELLED", c.completed_at < at
                await self._change(sa.update(self._table).where(*ours).values(completed_at=at))
        except sa.exc.SQLAlchemyError as error:  # the next start looks at their streams
            log.debug("ends: %s", error)

    async def without_end(self, since: float) -> list[Run]:
        """Runs aborted since Unix time ``since`` that ran here or nowhere, and whose end is
        not known to be stored: a crash may have cut the abort."""
        t, made = self._table, self._tables.workflow_output
        query = sa.select(*self._columns(brief=True)).where(
            self._run(t.c),
            t.c.status == "CANCELLED",
            t.c.updated_at >= since * 1000,
            sa.or_(self._ours(t.c), t.c.recovery_attempts == 0),
            ~sa.exists().where(made.c.workflow_uuid == t.c.workflow_uuid),
        )
        return [read(row)[1] for row in await self._rows(query)]

    # ---- what may be forgotten --------------------------------------------------

    async def count_finished(self) -> int:
        query = sa.select(sa.func.count()).where(*self._finished())
        return int(await self._in_thread(self._scalar, query))

    async def oldest_finished(self, count: int) -> list[str]:
        """The ``count`` finished runs that ended first."""
        t = self._table
        query = sa.select(t.c.workflow_uuid).where(*self._finished()).order_by(self._end())
        return [row.workflow_uuid for row in await self._rows(query.limit(count))]

    async def finished_before(self, when: float, context: int) -> list[str]:
        """Those that ended before Unix time ``when``, without the ``context`` newest runs of
        threads that were used since, or have a run to do."""
        t = self._table
        thread = t.c.queue_partition_key
        newest = (t.c.created_at.desc(), t.c.workflow_uuid.desc())
        rank = sa.func.row_number().over(partition_by=thread, order_by=newest)
        live = sa.func.sum(sa.case((t.c.status.in_(list(LIVE)), 1), else_=0))
        used = sa.func.max(self._end())
        inner = (
            sa.select(
                t.c.workflow_uuid,
                t.c.status,
                t.c.updated_at,
                self._end().label("ended"),
                rank.label("rank"),
                live.over(partition_by=thread).label("live"),
                used.over(partition_by=thread).label("used"),
            )
            .where(self._run(t.c))
            .subquery()
        )
        c = inner.c
        query = sa.select(c.workflow_uuid).where(
            c.status.not_in(list(LIVE)),
            self._nobody_asks(c),
            self._told(c),
            c.ended < when * 1000,
            sa.or_(
                c.rank - c.live > context,
                sa.and_(c.live == 0, c.used < when * 1000),
            ),
        )
        return [row.workflow_uuid for row in await self._rows(query.order_by(c.ended))]

    async def oldest_end(self, since: float) -> float:
        """When the first of the runs that ended after Unix time ``since`` did; infinite
        when none has."""
        query = sa.select(sa.func.min(self._end())).where(
            *self._finished(), self._end() >= since * 1000
        )
        found = await self._in_thread(self._scalar, query)
        return math.inf if found is None else found / 1000

    def _finished(self) -> tuple[sa.ColumnElement[bool], ...]:
        c = self._table.c
        over = c.status.not_in(list(LIVE))
        return (self._run(c), over, self._nobody_asks(c), self._told(c))

    def _nobody_asks(self, c: Any) -> sa.ColumnElement[bool]:
        """Of ``RECENT`` aborts other executors may still want to know (``in_the_way``)."""
        if self._alone:
            return sa.true()
        recent = (time.time() - RECENT) * 1000
        return sa.or_(c.status != "CANCELLED", c.updated_at < recent)

    def _told(self, c: Any) -> sa.ColumnElement[bool]:
        """No hook of the run waits for its next try: it would be forgotten with the run."""
        hook = self._table.alias()
        length = sa.func.length(hook.c.workflow_uuid) - len(hook_id(""))
        run = sa.func.substr(hook.c.workflow_uuid, 1, length)
        waiting = sa.select(run).where(hook.c.name == HOOK, hook.c.status.in_(list(LIVE)))
        told: sa.ColumnElement[bool] = c.workflow_uuid.not_in(waiting)
        return told

    def _end(self) -> sa.ColumnElement[int]:
        return sa.func.coalesce(self._table.c.completed_at, self._table.c.updated_at)

    # ---- how --------------------------------------------------------------------

    def _run(self, c: Any) -> sa.ColumnElement[bool]:
        """Whether a row is a run's: one of ours, or whatever else is on our queue."""
        return sa.or_(c.name == WORKFLOW, c.queue_name == QUEUE)

    def _on(self, c: Any, thread: str) -> sa.ColumnElement[bool]:
        here: sa.ColumnElement[bool] = c.queue_partition_key == thread
        return sa.or_(here, c.queue_partition_key.is_(None)) if thread == NO_THREAD else here

    def _ours(self, c: Any) -> sa.ColumnElement[bool]:
        """Whether this executor is the one to care for a row that was begun. The embedded
        database is ours by its lock: all of them, whatever ID an earlier daemon had."""
        if self._alone:
            return sa.true()
        ours: sa.ColumnElement[bool] = c.executor_id == self._executor
        return ours

    def _age(self, t: Any) -> tuple[sa.ColumnElement[Any], ...]:
        """What rises with each submit on a thread. created_at is in milliseconds,
        and ids that users choose do not rise."""
        if self._engine.dialect.name == "sqlite":
            return t.c.created_at, sa.literal_column(f"{t.name}.rowid")
        return t.c.created_at, t.c.priority, t.c.workflow_uuid

    def _columns(self, *, brief: bool = False) -> list[sa.ColumnElement[Any]]:
        """What ``read`` needs. ``brief``: of what may be long, prompts and replies, only the
        beginning."""
        # dbos keeps inputs and outputs in tables of their own, beside older columns.
        c = self._table.c
        inputs: sa.ColumnElement[Any] = self._input()
        output: sa.ColumnElement[Any] = self._output()
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

    def _input(self) -> sa.ScalarSelect[Any]:
        given, c = self._tables.workflow_input, self._table.c
        return (
            sa.select(sa.func.coalesce(given.c.inputs, c.inputs))
            .where(given.c.workflow_uuid == c.workflow_uuid)
            .scalar_subquery()
        )

    def _output(self) -> sa.ScalarSelect[Any]:
        made, c = self._tables.workflow_output, self._table.c
        return (
            sa.select(sa.func.coalesce(made.c.output, c.output))
            .where(made.c.workflow_uuid == c.workflow_uuid)
            .scalar_subquery()
        )

    def _scalar(self, query: sa.Select[Any], patience: float = PATIENCE) -> Any:
        row = self._fetch(query, patience)
        return row[0][0] if row else None

    async def _rows(self, query: sa.Select[Any], patience: float = PATIENCE) -> Sequence[Any]:
        """What is read for as long as it takes has no thread while it waits: others need them."""
        if patience < math.inf:
            return await self._in_thread(self._fetch, query, patience)
        complaint = Complaint("what a run must know", "read")
        return await self._surely(lambda: self._fetch(query, 0), complaint)

    def _fetch(self, query: sa.Select[Any], patience: float = PATIENCE) -> Sequence[Any]:
        def fetch() -> Sequence[Any]:
            with self._engine.connect() as c:
                return c.execute(query).fetchall()

        return self.patiently(fetch, patience)

    async def _change(self, query: sa.Insert | sa.Update, patience: float = math.inf) -> int:
        """How many rows it changed. Tried for ``patience`` seconds until the database takes it;
        by default for as long as it takes, whatever it says."""

        def write() -> int:
            with self._engine.begin() as connection:
                return connection.execute(query).rowcount

        if patience < math.inf:
            return await self._in_thread(self.patiently, write, patience)
        return await self._surely(write, Complaint("a change of a run's row"))

    async def _surely(self, work: Callable[[], T], complaint: Complaint) -> T:
        return await until_done(
            lambda: self._in_thread(work),
            complaint,
            self._stopping,
            refusals=sa.exc.SQLAlchemyError,
        )

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._threads)

    def patiently(self, work: Callable[[], T], patience: float) -> T:
        """``work``, tried again for ``patience`` seconds when the database cannot serve it: its
        connection broke, no file could be opened. Blocking."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return work()
            except sa.exc.SQLAlchemyError as error:
                over = time.monotonic() >= deadline or self._stopping.is_set()
                if over or not passes(error):
                    raise
                self._stopping.wait(FIRST)
