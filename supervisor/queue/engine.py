"""The durable core: DBOS is known here and in what this alone imports.

A run is one DBOS workflow (its id is the run's) on the queue "threads", partitioned by
thread with one run at a time; an outcome that we decided is the workflow's result.

The hook of a run is a workflow of its own, "RUN.hook" on the queue "hooks": the run's row
turns terminal at once. It is stored before that, and itself waits for the run's end, so no
kill comes in between. (No run's id has a dot.)
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

import msgspec
import sqlalchemy as sa
import trio
import trio_asyncio
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, SetEnqueueOptions, SetWorkflowID

from ...config.schema import Config, Queue
from ...protocol.errors import Unavailable
from ...protocol.model import Outcome, Run, RunSpec, Status, is_run_id, made_at
from ..host.metrics import Meters
from . import dbos_internals, dbos_log, pickle_refusal, recovery, retries, sqlite
from .attempt_rows import RECENT, AttemptRows
from .claims import Claims
from .conversation_rows import ConversationRows
from .dbos_internals import System
from .history_rows import HistoryRows
from .hook_workflow import Hook, HookWorkflow
from .keyed_lock import KeyedLock
from .outcomes import Outcomes, Waiting
from .retries import reason
from .row_access import APP_VERSION, QUEUE, Held, RowAccess
from .row_status import WORKFLOW, hook_id, read_claimed
from .rows import Rows
from .session_rows import SessionRows
from .sessions import Sessions
from .stray_rows import Strays
from .thread_index import ThreadIndex

log = logging.getLogger("runctld.durable")
aio = trio_asyncio.aio_as_trio

#: Commits that wait for the lease have one each, as many as the pool has connections.
THREADS = 100
#: What is said to whoever asks for something.
STOPPING = "runctld is stopping; ask again when it has started"
#: Nobody sends messages to workflows, and nothing is asked of SQLite for them: so often, in
#: seconds, DBOS sees that. Its end waits for it.
LISTEN = 0.1
#: Between two steps in which space is given back, seconds: others write meanwhile.
GIVE_WAY = 0.05

#: (what to do, which attempt it is, why it cannot be done if it cannot)
Dispatch = Callable[[RunSpec, int, str | None], Awaitable[Outcome]]
T = TypeVar("T")


class Survivors(Protocol):
    """Runs whose processes outlived an earlier daemon."""

    def list_attempts(self) -> dict[str, int]:
        """Which attempt of each run there is."""

    async def settle(self, going_on: Collection[str]) -> None:
        """End all but those."""

    async def wait_taken(self, seconds: float) -> None:
        """Until somebody goes on with each of them; those of whom nobody does are ended."""


class Durable:
    """``launch`` inside the trio-asyncio loop."""

    def __init__(
        self,
        config: Config,
        executor: str,
        wait_lease_valid: Callable[[], None],
        meters: Meters,
        *,
        lease_held: Callable[[], bool] = lambda: True,
    ) -> None:
        """``wait_lease_valid`` is called before each commit, in its thread: what it does not return
        from is not committed. ``lease_held``: whether something may be claimed.

        Raises ConfigError, when the DBOS that is installed lacks what is used of it here."""
        dbos_internals.check()
        self._lease_held = lease_held
        self._config = config
        self._executor = executor
        self._max_queued_per_thread = config.queue.max_queued_per_thread
        self._wait_lease_valid = wait_lease_valid
        self._fenced = False
        #: From ``launch`` on.
        self.rows: Rows
        self.attempts: AttemptRows
        self.history: HistoryRows
        self.conversations: ConversationRows
        self.thread_index: ThreadIndex
        self.sessions: SessionRows
        self.strays: Strays
        self._sessions: Sessions
        self._system: System
        self._database: RowAccess
        self._outcomes: Outcomes
        self._threads: trio.CapacityLimiter
        self._run_thread: Any
        self._claims: Claims | None = None
        self._submits = KeyedLock()
        self._meters = meters
        self._hook_workflow: HookWorkflow | None = None
        self._stopping = threading.Event()
        #: Aborted by us, and when: a run that was claimed just before begins within RECENT.
        self._cancelled: dict[str, float] = {}
        self.recovered = 0
        self._closing = False
        #: Told of each run that is over by now, in the database too.
        self.on_recorded: Callable[[], object] = lambda: None

    async def launch(
        self,
        loop: asyncio.AbstractEventLoop,
        dispatch: Dispatch,
        hook: Hook | None = None,
        found: Survivors | None = None,
    ) -> None:
        """Open the database, re-enqueue what was unfinished, start the queue worker. Runs that
        are ``found`` alive go on. ``dispatch`` is called on trio for every attempt, and must not
        return or raise when the daemon stops (the row stays). ``hook`` is told of ends.

        Raises: Unavailable, when the database cannot be opened, or DBOS is none that this knows;
        ConfigError, when it is gone, and saved."""
        pickle_refusal.refuse()
        traces = self._config.traces.endpoint
        config = DBOSConfig(
            name="runctl",
            system_database_engine=self._open_sessions(),
            application_version=APP_VERSION,
            executor_id=self._executor,
            serializer=DBOSPortableJSONSerializer(),
            enable_otlp=traces is not None,
            otlp_traces_endpoints=[traces] if traces is not None else [],
            otel_attribute_format="semconv",
            log_level="WARNING",
        )
        if self._config.database.embedded:
            config["notification_listener_polling_interval_sec"] = LISTEN
        if traces is not None:
            from ..host import traces as spans

            spans.watch(traces)
        # What hangs in the database takes threads from nothing else: DBOS's have these as well.
        threads = self._threads = trio.CapacityLimiter(THREADS)
        loop.set_default_executor(trio_asyncio.TrioExecutor(limiter=threads))
        dbos = DBOS(config=config)
        dbos_log.redirect(self._lease_held)
        dbos_internals.poll_seldom(dbos)
        dbos_internals.stop_scheduler()
        dbos_internals.stop_recovery()
        dbos_internals.store_milliseconds()
        retries.teach_dbos(self._stopping)
        trio_loop: Any = loop

        async def run_attempt(run: RunSpec, attempt: int, why: str | None) -> Outcome:
            # DBOS schedules from threads of its own, whose context knows no loop.
            trio_asyncio.current_loop.set(loop)
            return await dispatch(run, attempt, why)

        # No step of DBOS within: the only outcome is the workflow's own, and what a crash
        # leaves between the end of the stream and that is adopted from the stream.
        async def run_thread(spec: dict[str, Any]) -> dict[str, Any]:
            run, why = read_claimed(spec)
            attempt, created = await self._read_claimed(run.run)
            if attempt == 1:
                # Older rows of SQLite have whole seconds; an id that we made is more exact.
                self._meters.waited(time.time() - (made_at(run.run) or created), run.runner)
            if traces is not None:
                spans.describe(run, attempt)
            if why is not None and not is_run_id(run.run):
                outcome = Outcome(Status.FAILED, error=why)  # it has no stream
            else:
                outcome = await trio_loop.trio_as_future(run_attempt, run, attempt, why)
            if self._hook_workflow is not None:
                # In a context of its own: within a workflow it would be recorded as a step.
                hook = self._hook_workflow.store_until_done(run.run, outcome.status)
                await asyncio.create_task(hook, context=contextvars.Context())
            built: dict[str, Any] = msgspec.to_builtins(outcome)
            await self._outcomes.store(run.run, run.thread, outcome, built)
            self.on_recorded()
            return built

        self._run_thread = DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)(run_thread)
        if hook is not None:
            self._hook_workflow = HookWorkflow(hook, loop, self._stopping, self._kick_hooks)
        DBOS.listen_queues([])  # the workers are ours: they can be kicked
        try:
            DBOS.launch()
        except Exception as error:
            words = str(error).strip().partition("\n")[0]
            raise Unavailable(f"the database cannot be opened: {words}") from error
        system = self._system = System(dbos)
        self._outcomes = Outcomes(system, self._stopping)
        database = self._database = RowAccess(
            *(system, self._executor, self._stopping),
            threads=threads,
            alone=self._config.database.embedded,
        )
        self.rows, self.attempts = Rows(database), AttemptRows(database)
        self.history, self.conversations = HistoryRows(database), ConversationRows(database)
        self.thread_index, self.sessions = ThreadIndex(database), SessionRows(database)
        log_table, sessions_table = self.attempts.log.own, self.sessions.own
        for make in (self.thread_index.make, log_table.prepare, sessions_table.prepare):
            with contextlib.suppress(sa.exc.DBAPIError):  # it is tried again when it is needed
                await trio.to_thread.run_sync(make)
        try:
            if self._config.database.embedded:
                await trio.to_thread.run_sync(sqlite.time_new_rows, system.engine)
            self._fenced = True
            claims = self._claims = await trio.to_thread.run_sync(self._prepare_claims)
            spare = None
            if found is not None:
                attempts = found.list_attempts()
                going_on, spare = await trio.to_thread.run_sync(claims.take_over, attempts)
                await found.settle(going_on)
            await trio.to_thread.run_sync(self._recover, spare)
            claims.start()
            self.strays = Strays(self.attempts, claims.knows, claims.kick_all, self._lease_held)
            if found is not None:
                await found.wait_taken(self._config.start_timeout)
        except sa.exc.SQLAlchemyError as error:
            raise Unavailable(f"the database cannot be used: {reason(error)}") from error

    def _open_sessions(self) -> sa.Engine:
        def before_commit() -> None:
            if self._fenced:
                self._wait_lease_valid()

        self._sessions = Sessions(self._config, before_commit)
        return self._sessions.engine

    def _recover(self, spare: str | None) -> None:
        def recover() -> None:
            retries.until.set(0.0)
            alone = self._config.database.embedded
            recovery.recover(self._system, self._executor, APP_VERSION, alone=alone, spare=spare)

        self._database.patiently(recover, self._config.start_timeout)
        self.recovered = self.attempts.count_replayed()

    def _prepare_claims(self) -> Claims:
        hooks = self._hook_workflow is not None
        return Claims(self._config, self._system, self._database, self._lease_held, hooks=hooks)

    def apply_limits(self, queue: Queue) -> None:
        """How many runs there may be from now on, at once and queued on a thread; what is there
        already stays."""
        self._max_queued_per_thread = queue.max_queued_per_thread
        if self._claims is not None:
            self._claims.set_most(queue.max_running)

    def explain(self, error: Exception) -> str | None:
        """What to tell whoever asked for something that ended in ``error``, when it is the
        database's doing; one line."""
        of_database = isinstance(error, sa.exc.DBAPIError | sa.exc.TimeoutError)
        if self._closing or (of_database and self.stopping):
            return STOPPING
        if of_database:
            return f"the database cannot be used now ({reason(error)}); fix it and retry"
        return None

    @property
    def stopping(self) -> bool:
        """Whether the daemon stops: nothing is tried again any more."""
        return self._stopping.is_set()

    async def close(self) -> None:
        """Stop claiming and close the database; unfinished rows stay as they are."""
        self._closing = True
        await self.stop_claiming()
        if self._claims is not None:
            await trio.to_thread.run_sync(self._outcomes.wait_settled)
        await trio.to_thread.run_sync(self._close_database)
        if self._config.traces.endpoint is not None:
            from ..host import traces

            await trio.to_thread.run_sync(traces.flush, abandon_on_cancel=True)

    def _close_database(self) -> None:
        DBOS.destroy(workflow_completion_timeout_sec=0)
        self._sessions.close()

    async def stop_claiming(self) -> None:
        self._stopping.set()
        if self._claims is not None:
            await self._claims.stop()

    # ---- verbs ------------------------------------------------------------------

    async def enqueue(self, spec: RunSpec) -> None:
        """Store the run; durable when this returns. A run id that exists is left alone.

        Raises: QueueFull, when as many wait on its thread as may."""
        async with self._submits.hold(spec.thread):
            place = await self.rows.next_place(spec.thread, self._max_queued_per_thread)
            await aio(self._enqueue)(spec, place)
        self.kick()

    def kick(self) -> None:
        """Look for work now."""
        if self._claims is not None:
            self._claims.kick()

    def list_unfinished(self) -> list[Waiting]:
        """The runs that have ended, or that nothing executes, while their rows say that they
        are running here."""
        return [*self._outcomes.waiting.values(), *self.strays.list_waiting()]

    def _kick_hooks(self) -> None:
        if self._claims is not None:
            self._claims.kick_hooks()

    async def _enqueue(self, spec: RunSpec, place: int) -> None:
        retries.until.set(time.monotonic() + retries.PATIENCE)
        options = SetEnqueueOptions(queue_partition_key=spec.thread, priority=place)
        with options, SetWorkflowID(spec.run):
            await DBOS.enqueue_workflow_async(QUEUE, self._run_thread, msgspec.to_builtins(spec))

    async def cancel(self, run: str, held: Held | None = None) -> bool:
        """Make the run terminal as aborted: it is not replayed from here on. ``held``: only if
        it is still claimed so. Whether that was done, now."""
        if self._hook_workflow is not None:
            await aio(self._store_hook_of_abort)(self._hook_workflow, run)
        done = await self.attempts.cancel(run, held)
        now = time.monotonic()
        while self._cancelled and next(iter(self._cancelled.values())) < now - RECENT:
            del self._cancelled[next(iter(self._cancelled))]
        self._cancelled[run] = now
        return done

    async def _store_hook_of_abort(self, workflow: HookWorkflow, run: str) -> None:
        retries.until.set(time.monotonic() + retries.PATIENCE)
        await workflow.store(run, Status.ABORTED)

    async def find_aborts(self, spec: RunSpec) -> tuple[bool, list[Run]]:
        """Before an attempt: whether the run was aborted after it was claimed, and the
        aborted runs of its thread whose processes other executors may still be ending."""
        if self._config.database.embedded:  # there are no others
            return spec.run in self._cancelled, []
        return await self.attempts.find_aborts(spec)

    async def forget(self, runs: list[str]) -> None:
        """Delete finished runs' rows: their ids count as new from here on."""
        await self.attempts.log.forget(runs)
        await aio(DBOS.delete_workflows_async)([*runs, *map(hook_id, runs)])
        for run in runs:
            self._cancelled.pop(run, None)

    async def give_back_space(self) -> None:
        """What was forgotten takes no space in the embedded database any more. PostgreSQL sees to
        that by itself."""
        more = self._config.database.embedded
        while more and not self._stopping.is_set():
            more = await trio.to_thread.run_sync(sqlite.give_back_pages, self._system.engine)
            await trio.sleep(GIVE_WAY)

    async def read_tokens_of(self, executor: str) -> recovery.Tokens:
        """By which tokens a dead executor has its unfinished runs. Tried once: the caller
        holds ``executor``'s lease, and has to look whether it still did afterwards."""
        return await self._try_once(recovery.read_tokens, executor)

    async def reenqueue(self, executor: str, tokens: recovery.Tokens) -> int:
        """Put what a dead executor has by ``tokens`` back at the head of its threads, for any
        executor; how many runs. Tried once.

        DBOS's recovery, and not ``resume_workflows``: that would forget the attempts,
        revive what was aborted meanwhile, and take runs from whoever claimed them."""
        found = await self._try_once(recovery.put_back, executor, tokens)
        if self._claims is not None:
            self._claims.kick_all()
        return sum("." not in workflow for workflow in found)

    async def _try_once(self, call: Callable[..., T], executor: str, *more: object) -> T:
        def once() -> T:
            retries.until.set(0.0)
            return call(self._system, executor, APP_VERSION, *more)

        return await trio.to_thread.run_sync(once, limiter=self._threads, abandon_on_cancel=True)

    async def _read_claimed(self, run: str) -> tuple[int, float]:
        """In asyncio: (which attempt this is, Unix seconds of the submit)"""
        found = self._claims.take_claimed(run) if self._claims is not None else None
        if found is None:
            loop: Any = asyncio.get_running_loop()
            found = await loop.trio_as_future(self.attempts.read_attempt, run)
        return found
