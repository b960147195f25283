"""The durable core: the only module that imports dbos.

A run is one DBOS workflow (its id is the run's) on the queue "threads", partitioned by
thread with one run at a time. Status is derived from DBOS's row in one place,
``_status``; an outcome that we decided is the workflow's result.

The hook of a run is a workflow of its own, "RUN.hook" on the queue "hooks": the run's row
turns terminal at once. It is stored before that, and itself waits for the run's end, so no
kill comes in between. (No run's id has a dot.)
"""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import json
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import sqlalchemy as sa
import trio
import trio_asyncio
from dbos import (
    DBOS,
    DBOSConfig,
    DBOSPortableJSONSerializer,
    SetEnqueueOptions,
    SetWorkflowID,
)

from ..config.schema import Config
from . import calm, recovery, sqlite
from .claims import Active, Worker, reason
from .errors import QueueFull, Unavailable
from .metrics import Meters
from .model import ABORTED, Outcome, Run, RunSpec, Status, ThreadRow, made_at

log = logging.getLogger("runctld.durable")
aio = trio_asyncio.aio_as_trio

QUEUE = "threads"
WORKFLOW = "run_thread"
HOOKS_QUEUE = "hooks"
HOOK = "tell_hook"
#: Hooks at once on this executor, those that wait for a next try among them.
MAX_HOOKS = 100
#: Changes only when the workflow's shape does: recovery finds rows of this version only.
APP_VERSION = "runctl-1"
#: The end of an aborted run's processes is looked for this long, seconds.
RECENT = 600.0

#: A verb's read is tried again this long, seconds. What an attempt must know is read until
#: it is there: no run fails by a database that is away.
PATIENCE = 10.0

Dispatch = Callable[[RunSpec, int], Awaitable[Outcome]]
T = TypeVar("T")


class Hook(Protocol):
    """What is told of runs that end as one of ``on``."""

    on: Collection[str]
    tries: int
    backoff: float

    async def tell(self, run: str, hook: str) -> None:
        """One try, in trio. Raises what went wrong; must not return when the daemon stops."""

    def given_up(self, run: str, error: BaseException) -> None: ...


def hook_id(run: str) -> str:
    return f"{run}.hook"


_LIVE = {"ENQUEUED": Status.QUEUED, "DELAYED": Status.QUEUED, "PENDING": Status.RUNNING}
_ENDED = {
    "CANCELLED": Status.ABORTED,
    "ERROR": Status.FAILED,
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": Status.DEAD,
}


class Durable:
    """``launch`` inside the trio-asyncio loop; ``dispatch`` is called on trio for every
    attempt, and must not return or raise when the daemon stops (the row stays)."""

    def __init__(
        self,
        config: Config,
        executor: str,
        dispatch: Dispatch,
        clear: Callable[[], None],
        meters: Meters,
        hook: Hook | None = None,
    ) -> None:
        """``clear`` is called before each commit, in its thread: what it does not return
        from is not committed."""
        self._config = config
        self._executor = executor
        self._dispatch = dispatch
        self._clear = clear
        self._fenced = False
        self._worker: Worker | None = None
        self._dbos: DBOS
        self._tables: Any
        self._table: sa.Table
        self._enqueue_locks: dict[str, tuple[trio.Lock, int]] = {}
        self._run_thread: Any = None
        self._meters = meters
        self._hook = hook
        self._tell_hook: Any = None
        self._hooks_worker: Worker | None = None
        self._stopping = threading.Event()
        #: Aborted by us, and when: a run that was claimed just before begins within RECENT.
        self._cancelled: dict[str, float] = {}
        self.recovered = 0
        self._closing = False

    async def launch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the database, re-enqueue what was unfinished, start the queue worker.

        Raises: Unavailable, when the database cannot be opened."""
        traces = self._config.traces.endpoint
        config = DBOSConfig(
            name="runctl",
            system_database_url=self._url(),
            application_version=APP_VERSION,
            executor_id=self._executor,
            serializer=DBOSPortableJSONSerializer(),
            enable_otlp=traces is not None,
            otlp_traces_endpoints=[traces] if traces is not None else [],
            otel_attribute_format="semconv",
            log_level="WARNING",
            scheduler_polling_interval_sec=calm.SELDOM,
            db_engine_kwargs=sqlite.SMALL if self._config.database.embedded else None,
        )
        if traces is not None:
            from . import traces as spans

            spans.watch(traces)
        # Of all engines: this one has DBOS's threads upon it before we get to see it, and a
        # listener that comes while they commit fails their commit.
        sa.event.listen(sa.Engine, "commit", self._committing)
        self._dbos = DBOS(config=config)
        calm.quiet()
        calm.poll_seldom(self._dbos)
        sqlite.wait_out(self._stopping)
        sqlite.no_messages(self._stopping)
        recovery.at_launch(self._executor, APP_VERSION)
        dispatch = self._dispatch
        durable = self

        # No step of DBOS within: the only outcome is the workflow's own, and what a crash
        # leaves between the end of the stream and that is adopted from the stream.
        async def run_thread(spec: dict[str, Any]) -> dict[str, Any]:
            run = msgspec.convert(spec, RunSpec)
            attempt, created = await durable._claimed(run.run)
            if attempt == 1:
                # Rows of SQLite have whole seconds; an id that we made is more exact.
                durable._meters.waited(time.time() - (made_at(run.run) or created), run.runner)
            if traces is not None:
                spans.describe(run, attempt)
            outcome = await loop.trio_as_future(dispatch, run, attempt)  # type: ignore[attr-defined]
            try:
                # In a context of its own: within a workflow it would be recorded as a step.
                hook = durable._store_hook(run.run, outcome.status)
                await asyncio.create_task(hook, context=contextvars.Context())
            except Exception as error:  # never the run's own failure
                log.error("the hook of run %s is not stored: %s", run.run, error)
            built: dict[str, Any] = msgspec.to_builtins(outcome)
            return built

        self._run_thread = DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)(run_thread)
        if self._hook is not None:
            self._tell_hook = self._define_hook(self._hook, loop)
        DBOS.listen_queues([])  # the worker below is ours: it can be kicked
        try:
            DBOS.launch()
        except Exception as error:
            words = str(error).strip().partition("\n")[0]
            raise Unavailable(f"the database cannot be opened: {words}") from error
        self._tables = self._dbos._sys_db.tables
        self._table = self._tables.workflow_status
        await trio.to_thread.run_sync(self._index)
        self._fenced = True
        await trio.to_thread.run_sync(self._settle_recovery)
        await trio.to_thread.run_sync(self._start_workers)

    def _committing(self, _: sa.Connection) -> None:
        if self._fenced:
            self._clear()

    def _url(self) -> str:
        if not self._config.database.embedded:
            return self._config.database.url
        path = self._config.state_dir / "runctl.sqlite"
        sqlite.prepare(path)
        return f"sqlite:///{path}"

    def _index(self) -> None:
        """DBOS finds a thread's runs by an index while they are live only; lists, and the
        turns of a conversation, need those that are over."""
        c = self._table.c
        index = sa.Index("runctl_thread", c.queue_partition_key, c.created_at)
        try:
            with self._dbos._sys_db.engine.begin() as connection:
                connection.execute(sa.schema.CreateIndex(index, if_not_exists=True))
        except sa.exc.DBAPIError as error:  # another executor makes it just now
            log.debug("index: %s", reason(error))

    def _start_workers(self) -> None:
        most = self._config.queue.max_running
        queues = [self._register(QUEUE, partition_concurrency=1, worker_concurrency=most)]
        if self._hook is not None:
            queues.append(self._register(HOOKS_QUEUE, worker_concurrency=MAX_HOOKS))
        dbos: Any = self._dbos
        active = dbos._active_workflows_set = Active()
        for queue in queues:
            worker = Worker(dbos, queue, self._executor, APP_VERSION)
            active.workers[queue.name] = worker
            worker.start()
        self._worker = active.workers[QUEUE]
        self._hooks_worker = active.workers.get(HOOKS_QUEUE)

    def _register(self, name: str, **limits: Any) -> Any:
        # The stored settings are those of the executor that started last: these are ours.
        return DBOS.register_queue(name, on_conflict="always_update", **limits)

    def _settle_recovery(self) -> None:
        """Wait until DBOS's start-up thread has re-enqueued every row of ours. Starting
        the worker before would let it re-enqueue a row that is already claimed again."""
        t = self._table
        query = (
            sa.select(sa.func.count())
            .where(t.c.status == "PENDING")
            .where(t.c.executor_id == self._executor)
            .where(t.c.application_version == APP_VERSION)
        )
        deadline = time.monotonic() + self._config.start_timeout
        while left := self._scalar(query):  # DBOS gives no event for its end
            if time.monotonic() > deadline:
                raise Unavailable(f"{left} unfinished runs could not be recovered in time")
            time.sleep(0.003)
        waiting = sa.select(sa.func.count()).where(
            t.c.name == WORKFLOW, t.c.status == "ENQUEUED", t.c.recovery_attempts > 0
        )
        self.recovered = int(self._scalar(waiting))

    def set_max_running(self, most: int) -> None:
        """How many runs there may be at once from now on; what runs already goes on."""
        if self._worker is not None:
            self._worker.set_most(most)

    def explain(self, error: Exception) -> str | None:
        """What to tell whoever asked for something that ended in ``error``, when it is the
        database's doing; one line."""
        if self._closing:
            return "runctld is stopping; ask again when it has started"
        if isinstance(error, sa.exc.DBAPIError):
            return f"the database cannot be used now ({reason(error)}); mend that, then ask again"
        return None

    async def close(self) -> None:
        """Stop claiming and close the database; unfinished rows stay as they are."""
        self._closing = True
        await self.stop_claiming()
        await trio.to_thread.run_sync(lambda: DBOS.destroy(workflow_completion_timeout_sec=0))
        if self._config.traces.endpoint is not None:
            from . import traces

            await trio.to_thread.run_sync(traces.flush, abandon_on_cancel=True)

    async def stop_claiming(self) -> None:
        self._stopping.set()
        workers = [worker for worker in (self._worker, self._hooks_worker) if worker is not None]
        for worker in workers:
            worker.stop()
        for worker in workers:
            await trio.to_thread.run_sync(worker.join, 5.0)

    # ---- hooks ------------------------------------------------------------------

    def _define_hook(self, hook: Hook, loop: asyncio.AbstractEventLoop) -> Any:
        async def told(run: str) -> None:
            # DBOS schedules from threads of its own, whose context knows no loop.
            trio_asyncio.current_loop.set(loop)
            await hook.tell(run, hook_id(run))

        async def tell_step(run: str) -> None:
            await loop.trio_as_future(told, run)  # type: ignore[attr-defined]

        step = DBOS.step(
            name="tell",
            retries_allowed=hook.tries > 1,
            max_attempts=hook.tries,
            interval_seconds=hook.backoff,
        )(tell_step)

        async def tell_hook(run: str) -> bool:
            try:
                await step(run)
            except Exception as error:  # a row that fails would be logged as an error of ours
                hook.given_up(run, error)
                return False
            return True

        return DBOS.workflow(name=HOOK, max_recovery_attempts=None)(tell_hook)

    async def _store_hook(self, run: str, status: str) -> None:
        """In asyncio, before the run's row turns terminal as ``status``. Once per run."""
        if self._hook is None or status not in self._hook.on:
            return
        with SetWorkflowID(hook_id(run)):
            await DBOS.enqueue_workflow_async(HOOKS_QUEUE, self._tell_hook, run)
        self._kick_hooks()

    async def hooks_waiting(self, patience: float = PATIENCE) -> int:
        """How many are not told yet, of all executors."""
        t = self._table
        query = sa.select(sa.func.count()).where(t.c.name == HOOK, t.c.status.in_(list(_LIVE)))
        return int(await trio.to_thread.run_sync(self._scalar, query, patience))

    # ---- verbs ------------------------------------------------------------------

    async def enqueue(self, spec: RunSpec) -> None:
        """Store the run; durable when this returns. A run id that exists is left alone.

        Raises: QueueFull, when as many wait on its thread as may."""
        async with self._lane(spec.thread):
            await aio(self._enqueue)(spec, await self._next_place(spec.thread))
        self.kick(spec.thread)

    def kick(self, thread: str | None = None) -> None:
        """Look for work now, on ``thread`` or on all."""
        if self._worker is not None:
            self._worker.kick(thread)

    def _kick_hooks(self) -> None:
        if self._hooks_worker is not None:
            self._hooks_worker.kick()

    async def _next_place(self, thread: str) -> int:
        """The priority that puts a run behind all others of its thread. DBOS orders by
        priority, created_at, id; on SQLite created_at is in whole seconds, ids that users
        choose do not rise, and clocks of executors differ.

        Two submits at once, through two executors, may get the same place: then the rest
        decides, alike for all. Whatever was answered before a submit began is before it,
        since it has a lower place, or is not live any more."""
        t = self._table
        query = (
            sa.select(
                sa.func.max(t.c.priority).label("place"),
                sa.func.sum(sa.case((t.c.status == "PENDING", 0), else_=1)).label("queued"),
            )
            .where(t.c.name == WORKFLOW, t.c.queue_partition_key == thread)
            .where(t.c.status.in_(list(_LIVE)))
        )
        ((last, queued),) = await self._rows(query)
        most = self._config.queue.max_queued_per_thread
        if (queued or 0) >= most:
            raise QueueFull(
                f"{queued} runs are queued on thread {thread!r} and queue.max_queued_per_thread"
                f" is {most}; submit again when some have run, or raise it"
            )
        return int(last or 0) + 1

    async def _enqueue(self, spec: RunSpec, place: int) -> None:
        sqlite.asked.set(True)
        options = SetEnqueueOptions(queue_partition_key=spec.thread, priority=place)
        with options, SetWorkflowID(spec.run):
            await DBOS.enqueue_workflow_async(QUEUE, self._run_thread, msgspec.to_builtins(spec))

    def _lane(self, thread: str) -> Any:
        return _Lane(self._enqueue_locks, thread)

    async def cancel(self, run: str) -> None:
        """Make the run terminal as aborted: it is not replayed from here on."""
        await aio(self._cancel)(run)
        now = time.monotonic()
        while self._cancelled and next(iter(self._cancelled.values())) < now - RECENT:
            del self._cancelled[next(iter(self._cancelled))]
        self._cancelled[run] = now

    async def _cancel(self, run: str) -> None:
        sqlite.asked.set(True)
        await self._store_hook(run, Status.ABORTED)
        await DBOS.cancel_workflow_async(run)

    async def get(self, run: str) -> tuple[RunSpec, Run] | None:
        t = self._table
        query = sa.select(*self._columns()).where(t.c.name == WORKFLOW, t.c.workflow_uuid == run)
        rows = await self._rows(query)
        return _read(rows[0]) if rows else None

    async def runs(
        self, thread: str, *, statuses: Sequence[Status] = (), limit: int = 100, offset: int = 0
    ) -> list[Run]:
        """A page of the thread's runs, newest first."""
        t = self._table
        query = (
            sa.select(*self._columns())
            .where(t.c.name == WORKFLOW, t.c.queue_partition_key == thread)
            .order_by(t.c.created_at.desc(), t.c.workflow_uuid.desc())
            .limit(limit)
            .offset(offset)
        )
        runs = [_read(row)[1] for row in await self._rows(query)]
        return [run for run in runs if not statuses or run.status in statuses]

    async def live_runs(self, thread: str) -> list[Run]:
        """Running first, then queued in their order."""
        t = self._table
        query = (
            sa.select(*self._columns())
            .where(t.c.name == WORKFLOW, t.c.queue_partition_key == thread)
            .where(t.c.status.in_(list(_LIVE)))
            .order_by(t.c.priority, t.c.created_at, t.c.workflow_uuid)
        )
        runs = [_read(row)[1] for row in await self._rows(query)]
        return sorted(runs, key=lambda run: run.status is not Status.RUNNING)

    async def turns(self, thread: str, before: str, limit: int) -> list[tuple[str, str]]:
        """(prompt, reply) of the thread's succeeded chat runs before ``before``, in order."""
        t = self._table
        made = sa.select(t.c.created_at).where(t.c.workflow_uuid == before).scalar_subquery()
        output = self._output()
        query = (
            sa.select(*self._columns())
            .where(t.c.name == WORKFLOW, t.c.queue_partition_key == thread)
            .where(t.c.status == "SUCCESS", t.c.created_at <= made, t.c.workflow_uuid != before)
            .where(output.like('%"reply"%'))
            .order_by(t.c.created_at.desc(), t.c.workflow_uuid.desc())
            .limit(limit)
        )
        found: list[tuple[str, str]] = []
        for row in await self._rows(query, math.inf):
            spec, outcome = json.loads(row.inputs)["positionalArgs"][0], json.loads(row.output)
            if outcome.get("status") == "succeeded" and spec.get("prompt"):
                found.append((spec["prompt"], outcome.get("reply", "")))
        return found[::-1]

    async def threads(self, *, limit: int, offset: int, busy: bool = False) -> list[ThreadRow]:
        """A page of threads with their latest runs, most recent activity first; costs what
        is shown, not what is stored. ``busy``: only those on which a run is running or
        queued."""
        t, newer = self._table, self._table.alias()
        thread = t.c.queue_partition_key
        kept = [t.c.name == WORKFLOW]
        if busy:  # what is live is found by the status, however many threads there are
            live = sa.select(thread).where(t.c.name == WORKFLOW, t.c.status.in_(list(_LIVE)))
            kept.append(thread.in_(live))
        later = sa.select(newer.c.workflow_uuid).where(
            newer.c.queue_partition_key == thread,
            newer.c.created_at >= t.c.created_at,
            sa.tuple_(newer.c.created_at, newer.c.workflow_uuid)
            > sa.tuple_(t.c.created_at, t.c.workflow_uuid),
        )
        page = (
            sa.select(t.c.workflow_uuid)
            .where(*kept, ~later.exists())
            .order_by(t.c.created_at.desc(), t.c.workflow_uuid.desc())
            .limit(limit)
            .offset(offset)
        )
        query = (
            sa.select(*self._columns(), self._there("ENQUEUED", "DELAYED"), self._there("PENDING"))
            .where(t.c.workflow_uuid.in_(page))
            .order_by(t.c.created_at.desc(), t.c.workflow_uuid.desc())
        )
        return [_thread(row, *row[-2:]) for row in await self._rows(query)]

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
            .where(t.c.name == WORKFLOW, t.c.status.in_(list(_LIVE)))
            .subquery()
        )
        query = (
            sa.select(*self._columns(), inner.c.queued, inner.c.busy)
            .join(inner, inner.c.id == t.c.workflow_uuid)
            .where(inner.c.rank == 1)
            .order_by(running_first, t.c.created_at.desc(), t.c.workflow_uuid.desc())
            .limit(limit)
            .offset(offset)
        )
        return [_thread(row, row.queued, row.busy) for row in await self._rows(query)]

    async def in_flight(self) -> set[str]:
        """The runs that may have output and are not over: running, or to be replayed."""
        t = self._table
        query = sa.select(t.c.workflow_uuid).where(
            t.c.name == WORKFLOW,
            sa.or_(
                t.c.status == "PENDING",
                sa.and_(t.c.status.in_(list(_LIVE)), t.c.recovery_attempts > 0),
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
                t.c.status.not_in(list(_LIVE)),
            )
            for row in await self._rows(query):
                found[row.workflow_uuid] = (row.completed_at or row.updated_at) / 1000
        return found

    async def count(self, status: str, patience: float = PATIENCE) -> int:
        t = self._table
        query = sa.select(sa.func.count()).where(t.c.name == WORKFLOW, t.c.status == status)
        return int(await trio.to_thread.run_sync(self._scalar, query, patience))

    # ---- what is forgotten ------------------------------------------------------

    async def count_finished(self) -> int:
        query = sa.select(sa.func.count()).where(*self._finished())
        return int(await trio.to_thread.run_sync(self._scalar, query))

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
        live = sa.func.sum(sa.case((t.c.status.in_(list(_LIVE)), 1), else_=0))
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
            .where(t.c.name == WORKFLOW)
            .subquery()
        )
        c = inner.c
        query = sa.select(c.workflow_uuid).where(
            c.status.not_in(list(_LIVE)),
            self._nobody_asks(c),
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
        found = await trio.to_thread.run_sync(self._scalar, query)
        return math.inf if found is None else found / 1000

    async def forget(self, runs: list[str]) -> None:
        """Delete finished runs' rows."""
        await aio(DBOS.delete_workflows_async)([*runs, *map(hook_id, runs)])

    def _finished(self) -> tuple[sa.ColumnElement[bool], ...]:
        c = self._table.c
        return (c.name == WORKFLOW, c.status.not_in(list(_LIVE)), self._nobody_asks(c))

    def _nobody_asks(self, c: Any) -> sa.ColumnElement[bool]:
        """Of ``RECENT`` aborts other executors may still want to know (``in_the_way``)."""
        if self._config.database.embedded:
            return sa.true()
        recent = (time.time() - RECENT) * 1000
        return sa.or_(c.status != "CANCELLED", c.updated_at < recent)

    def _end(self) -> sa.ColumnElement[int]:
        return sa.func.coalesce(self._table.c.completed_at, self._table.c.updated_at)

    async def note_ends(self, runs: Sequence[str]) -> None:
        """The ends of these aborted runs are stored: an empty output says so, which nothing
        else has of a run that is cancelled."""
        made, c = self._tables.workflow_output, self._table.c
        new = ~sa.exists().where(made.c.workflow_uuid == c.workflow_uuid)
        ended = sa.select(c.workflow_uuid).where(
            c.workflow_uuid.in_(runs), c.status == "CANCELLED", new
        )
        query = sa.insert(made).from_select(["workflow_uuid"], ended, include_defaults=False)

        def write() -> None:
            with self._dbos._sys_db.engine.begin() as connection:
                connection.execute(query)

        try:
            await trio.to_thread.run_sync(self._patiently, write, math.inf)
        except sa.exc.SQLAlchemyError as error:  # the next start looks at their streams
            log.debug("ends: %s", reason(error))

    async def without_end(self, since: float) -> list[Run]:
        """Runs aborted since Unix time ``since`` that ran here or nowhere, and whose end is
        not known to be stored: a crash may have cut the abort."""
        t, made = self._table, self._tables.workflow_output
        query = sa.select(*self._columns()).where(
            t.c.name == WORKFLOW,
            t.c.status == "CANCELLED",
            t.c.updated_at >= since * 1000,
            sa.or_(t.c.executor_id == self._executor, t.c.recovery_attempts == 0),
            ~sa.exists().where(made.c.workflow_uuid == t.c.workflow_uuid),
        )
        return [_read(row)[1] for row in await self._rows(query)]

    async def in_the_way(self, spec: RunSpec) -> tuple[bool, list[Run]]:
        """Before an attempt: whether the run was aborted after it was claimed, and the
        aborted runs of its thread whose processes other executors may still be ending."""
        if self._config.database.embedded:  # there are no others
            return spec.run in self._cancelled, []
        t = self._table
        recent = (time.time() - RECENT) * 1000
        query = sa.select(*self._columns()).where(
            t.c.name == WORKFLOW,
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
        found = [_read(row)[1] for row in await self._rows(query, math.inf)]
        others = [run for run in found if run.run != spec.run]
        return len(others) < len(found), others

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

    async def reenqueue(self, executor: str) -> int:
        """Put a dead executor's unfinished runs back at the head of their threads, for
        any executor; how many. The caller holds ``executor``'s lease.

        DBOS's recovery, and not ``resume_workflows``: that would forget the attempts,
        revive what was aborted meanwhile, and take runs from whoever claimed them."""
        system = self._dbos._sys_db
        found = await trio.to_thread.run_sync(recovery.reenqueue, system, executor, APP_VERSION)
        self.kick()
        self._kick_hooks()
        return sum("." not in workflow for workflow in found)

    # ---- rows -------------------------------------------------------------------

    def _columns(self) -> list[sa.ColumnElement[Any]]:
        # dbos keeps inputs and outputs in tables of their own, beside older columns.
        given, c = self._tables.workflow_input, self._table.c
        return [
            c.workflow_uuid,
            c.status,
            c.queue_partition_key,
            c.recovery_attempts,
            c.executor_id,
            c.created_at,
            c.started_at_epoch_ms,
            c.completed_at,
            c.updated_at,
            sa.select(sa.func.coalesce(given.c.inputs, c.inputs))
            .where(given.c.workflow_uuid == c.workflow_uuid)
            .scalar_subquery()
            .label("inputs"),
            self._output().label("output"),
        ]

    def _output(self) -> sa.ScalarSelect[Any]:
        made, c = self._tables.workflow_output, self._table.c
        return (
            sa.select(sa.func.coalesce(made.c.output, c.output))
            .where(made.c.workflow_uuid == c.workflow_uuid)
            .scalar_subquery()
        )

    async def _claimed(self, run: str) -> tuple[int, float]:
        """In asyncio: (which attempt this is, Unix seconds of the submit)"""
        found = self._worker.claimed.pop(run, None) if self._worker is not None else None
        if found is None:
            found = await asyncio.to_thread(self._attempts, run)
        return found

    def _attempts(self, run: str) -> tuple[int, float]:
        """(which attempt this is, Unix seconds of the submit)"""
        t = self._table
        query = sa.select(t.c.recovery_attempts, t.c.created_at).where(t.c.workflow_uuid == run)
        row = self._fetch(query, math.inf)[0]
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

        def update() -> int:
            with self._dbos._sys_db.engine.begin() as connection:
                return connection.execute(query).rowcount

        changed = await trio.to_thread.run_sync(self._patiently, update, math.inf)
        return found + 1 if changed else None

    def _scalar(self, query: sa.Select[Any], patience: float = PATIENCE) -> Any:
        row = self._fetch(query, patience)
        return row[0][0] if row else None

    async def _rows(self, query: sa.Select[Any], patience: float = PATIENCE) -> Sequence[Any]:
        return await trio.to_thread.run_sync(self._fetch, query, patience)

    def _fetch(self, query: sa.Select[Any], patience: float = PATIENCE) -> Sequence[Any]:
        def read() -> Sequence[Any]:
            with self._dbos._sys_db.engine.connect() as c:
                return c.execute(query).fetchall()

        return self._patiently(read, patience)

    def _patiently(self, work: Callable[[], T], patience: float) -> T:
        """``work``, tried again for ``patience`` seconds when the database cannot serve it: its
        connection broke, no file could be opened."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return work()
            except sa.exc.OperationalError:
                if time.monotonic() > deadline or self._stopping.is_set():
                    raise
                time.sleep(0.2)


class _Lane:
    """A lock per thread that exists only while someone wants it."""

    def __init__(self, locks: dict[str, tuple[trio.Lock, int]], thread: str) -> None:
        self._locks, self._thread = locks, thread

    async def __aenter__(self) -> None:
        lock, users = self._locks.get(self._thread, (trio.Lock(), 0))
        self._locks[self._thread] = (lock, users + 1)
        await lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        lock, users = self._locks[self._thread]
        if users == 1:
            del self._locks[self._thread]
        else:
            self._locks[self._thread] = (lock, users - 1)
        lock.release()


def _time(ms: int | None) -> str | None:
    if ms is None:
        return None
    stamp = datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)
    return stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _status(row: str, outcome: Outcome | None) -> Status:
    if row in _LIVE:
        return _LIVE[row]
    if row == "SUCCESS" and outcome is not None:
        return outcome.status
    return _ENDED.get(row, Status.FAILED)


def _thread(row: Any, queued: int, busy: int) -> ThreadRow:
    run = _read(row)[1]
    status = "running" if busy else "queued" if queued else "idle"
    return ThreadRow(run.thread, status, run, int(queued))


def _read(row: Any) -> tuple[RunSpec, Run]:
    spec = msgspec.convert(json.loads(row.inputs)["positionalArgs"][0], RunSpec)
    outcome = None
    if row.status == "SUCCESS" and row.output:
        outcome = msgspec.convert(json.loads(row.output), Outcome)
    status = _status(row.status, outcome)
    error = outcome.error if outcome else None
    if row.status == "CANCELLED":
        error = ABORTED.error
    elif row.status == "ERROR":
        error = "internal error; see the daemon's log"
    run = Run(
        run=row.workflow_uuid,
        thread=row.queue_partition_key,
        status=status,
        attempt=row.recovery_attempts or 0,
        runner=spec.runner,
        executor=row.executor_id if row.recovery_attempts else None,
        created_at=_time(row.created_at) or "",
        started_at=_time(row.started_at_epoch_ms),
        ended_at=_time(row.completed_at or row.updated_at) if status.terminal else None,
        exit_code=outcome.exit_code if outcome else None,
        error=error,
    )
    return spec, run
