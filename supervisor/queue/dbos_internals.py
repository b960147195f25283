"""The only file that touches names of DBOS that are private to it: it lists, reads and replaces
them.

The rest of this folder uses DBOS's public names, and ``System`` and the functions below.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from dbos import DBOS, DBOSPortableJSONSerializer

from ...config.private_names import PrivateNames

T = TypeVar("T")

#: Columns of a workflow's row that we read or write.
_COLUMNS = (
    *("workflow_uuid", "status", "name", "serialization", "inputs", "output", "executor_id"),
    *("application_version", "application_name", "queue_name", "queue_partition_key"),
    *("priority", "owner_xid", "recovery_attempts", "rate_limited", "deduplication_id"),
    *("workflow_timeout_ms", "created_at", "started_at_epoch_ms", "updated_at", "completed_at"),
    *("class_name", "config_name", "authenticated_user", "authenticated_roles"),
)
#: All that is private and in use. Behind what we replace stand all arguments.
PRIVATE = PrivateNames(
    "DBOS",
    "dbos",
    "3.4.0",
    {
        "dbos._context": ("current_owner_xid(workflow_id, ...)",),
        "dbos._core": (
            "ActiveWorkflowById.add(key, queue_name, queue_partition_key)",
            "ActiveWorkflowById._remove(key, bucket)",
            "ActiveWorkflowById.activeList",
            "ActiveWorkflowById.count_for_queue(queue_name, ...)",
            "execute_dequeued_workflow(dbos, status, owner_xid)",
        ),
        "dbos._dbos": (
            "DBOS._active_workflows_set",
            "DBOS._registry",
            "DBOS._sys_db",
            "DBOSRegistry.get_internal_queue",
            "dynamic_scheduler_loop(stop_event, polling_interval_sec)",
            "startup_recovery_thread(dbos, pending_workflows)",
        ),
        "dbos._queue": ("Queue._polling_interval_sec",),
        "dbos._schemas.system_database": (
            *(f"SystemSchema.workflow_status.c.{name}" for name in _COLUMNS),
            "SystemSchema.workflow_input.c.workflow_uuid",
            "SystemSchema.workflow_input.c.inputs",
            "SystemSchema.workflow_output.c.workflow_uuid",
            "SystemSchema.workflow_output.c.output",
        ),
        "dbos._serialization": (
            "pickle.dumps",
            "pickle.loads",
            "deserialize_args(serialized_value, serialization, serializer)",
            "deserialize_exception(serialized_value, serialization, serializer)",
            "deserialize_value(serialized_value, serialization, serializer)",
        ),
        "dbos._sys_db": (
            "SystemDatabase._in_flight_status_prover",
            "SystemDatabase._name_filter(col, value)",
            "SystemDatabase._now_ms_sql",
            "SystemDatabase.app_name",
            "SystemDatabase.engine",
            "SystemDatabase.get_workflow_statuses(workflow_ids, ...)",
            "SystemDatabase.start_queued_partitioned_workflows(queue, executor_id, app_version,"
            " max_tasks, owner_xid, is_latest_version, ...)",
            "SystemDatabase.start_queued_workflows(queue, executor_id, app_version,"
            " queue_partition_key, local_running_count, owner_xid, is_latest_version, ...)",
            "SystemDatabase.tables",
            "SystemDatabase.update_workflow_outcome.__wrapped__(workflow_id, status, output, error,"
            " owner_xid)",
            "db_retry(sys_db, ...)",
            "retriable_postgres_exception(e)",
            "retriable_sqlite_exception(e)",
        ),
        "dbos._utils": ("INTERNAL_QUEUE_NAME",),
        "dbos._workflow_commands": ("_BACKGROUND_JOBS_INTERVAL_SEC",),
    },
)
check = PRIVATE.check
replace = PRIVATE.replace

try:
    import dbos._context
    import dbos._core
    import dbos._dbos
    import dbos._serialization
    import dbos._sys_db
    import dbos._utils
    import dbos._workflow_commands
except ImportError as error:
    raise PRIVATE.lacking(str(error.name)) from None

_context: Any = dbos._context
_core: Any = dbos._core
_launch: Any = dbos._dbos
_formats: Any = dbos._serialization
_system: Any = dbos._sys_db
_utils: Any = dbos._utils
_commands: Any = dbos._workflow_commands

#: How often DBOS looks after what we do not use (delays, a queue of its own), in seconds: its
#: every second is half of what an idle daemon costs.
SELDOM = 60.0
#: Its own queue: what its tools put there is taken to ours (``adopt_resumed``).
NEVER = 10 * 365 * 86400.0


# ---- before the launch ----------------------------------------------------------------------


def stop_scheduler() -> None:
    """No workflow of ours has a schedule: whoever may write rows gives us none, either."""

    def wait(stop_event: threading.Event, _: float) -> None:
        stop_event.wait()

    replace(_launch, "dynamic_scheduler_loop", wait)


def stop_recovery() -> None:
    """DBOS's own recovery would put a row back that we have recovered and claimed again since:
    ``recovery`` does it, all rows in one transaction, before anything is claimed."""
    replace(_launch, "startup_recovery_thread", lambda dbos, pending_workflows: None)


def poll_seldom(instance: DBOS) -> None:
    """What has no setting."""
    registry: Any = instance._registry
    replace(registry.get_internal_queue(), "_polling_interval_sec", NEVER)
    replace(_commands, "_BACKGROUND_JOBS_INTERVAL_SEC", SELDOM)


def store_milliseconds() -> None:
    """Have DBOS store milliseconds on SQLite, as with PostgreSQL: by itself it stores whole
    seconds where Python is older than 3.12, and asks for a function of SQLite 3.42 where it is
    not."""
    own: Callable[[Any], Any] = _system.SystemDatabase._now_ms_sql

    def now_ms(system: Any) -> Any:
        if system.engine.dialect.name != "sqlite":
            return own(system)
        days = sa.func.julianday("now") - sa.literal_column("2440587.5")  # since 1970
        return sa.cast(sa.func.round(days * 86_400_000), sa.BigInteger)

    replace(_system.SystemDatabase, "_now_ms_sql", now_ms)


def decide_retries(decide: Callable[[Exception, bool], bool]) -> None:
    """``decide`` says of each error, and of what DBOS would do, whether it tries again."""
    postgres, sqlite = _system.retriable_postgres_exception, _system.retriable_sqlite_exception

    def again(e: Exception) -> bool:
        return decide(e, postgres(e) or sqlite(e))

    replace(_system, "retriable_postgres_exception", again)
    # The one above is asked for both.
    replace(_system, "retriable_sqlite_exception", lambda e: False)


def replace_pickle(stand_in: object) -> None:
    """``stand_in`` is what DBOS's module of formats has as ``pickle`` from here on."""
    replace(_formats, "pickle", stand_in)


def read_pickle(way: str, text: str) -> object:
    """What DBOS makes of ``text`` that is said to be a pickle, by one of PICKLE_READERS. Raises
    whatever that does."""
    return getattr(_formats, way)(text, "py_pickle", DBOSPortableJSONSerializer())


PICKLE_READERS = ("deserialize_value", "deserialize_args", "deserialize_exception")


# ---- after it -------------------------------------------------------------------------------


class Listener(Protocol):
    """Hears of the workflows of one queue. In any thread."""

    def note_begun(self, workflow: str) -> None:
        """It is executed from now on."""

    def note_ended(self, workflow: str) -> None:
        """Its row has its outcome, and its place is free."""


class System:
    """DBOS's database, and what it executes; ``instance`` was launched."""

    def __init__(self, instance: DBOS) -> None:
        self._dbos: Any = instance
        self._database: Any = self._dbos._sys_db
        self.engine: sa.Engine = self._database.engine
        #: Its tables, such as ``tables.workflow_status``.
        self.tables: Any = self._database.tables
        self.app_name: str | None = self._database.app_name
        #: Where DBOS's tools put what they resume.
        self.internal_queue: str = _utils.INTERNAL_QUEUE_NAME

    def now(self) -> Any:
        """SQL for the time of the database, in Unix milliseconds."""
        return self._database._now_ms_sql()

    def is_ours(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        """SQL for whether ``column``, of names of applications, names this one, or none."""
        found: sa.ColumnElement[bool] = self._database._name_filter(column, self.app_name)
        return found

    def is_in_flight(self) -> sa.ColumnElement[bool]:
        """SQL with which SQLite sees that DBOS's index of what is live serves."""
        found: sa.ColumnElement[bool] = self._database._in_flight_status_prover()
        return found

    def retry(self, work: Callable[[], T]) -> T:
        """``work``, tried again as DBOS does with its own statements (``decide_retries``)."""
        retried: Callable[[], T] = _system.db_retry(sys_db=self._database)(work)
        return retried()

    # No workflow of ours is without a version: whether this one is the newest, which DBOS would
    # look up each time, decides nothing.

    def claim_heads(
        self, queue: Any, executor: str, version: str, most: int, token: str
    ) -> list[str]:
        """The ids of what ``executor`` has claimed now in all partitions of ``queue``."""
        claim = self._database.start_queued_partitioned_workflows
        found: list[str] = claim(
            *(queue, executor, version, most), owner_xid=token, is_latest_version=False
        )
        return found

    def claim_queued(
        self, queue: Any, executor: str, version: str, busy: int, token: str
    ) -> list[str]:
        """The same, of a ``queue`` without partitions, of which ``busy`` are executed."""
        found: list[str]
        claim = self._database.start_queued_workflows
        found, _ = claim(
            *(queue, executor, version, None, busy), owner_xid=token, is_latest_version=False
        )
        return found

    def read_statuses(self, workflows: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of those of ``workflows`` that there are, for ``execute``."""
        return [dict(row) for row in self._database.get_workflow_statuses(list(workflows))]

    def execute(self, row: Mapping[str, Any], token: str) -> None:
        """Begin what was claimed by ``token``. Raises when it cannot be started."""
        _core.execute_dequeued_workflow(self._dbos, row, token)

    def report_executed(self, listeners: Mapping[str, Listener]) -> None:
        """Have the ``listeners``, by queue, hear what begins and ends from now on."""
        replace(self._dbos, "_active_workflows_set", _executed_type()(listeners))

    def count_executed(self, queue: str) -> int:
        return int(self._dbos._active_workflows_set.count_for_queue(queue))

    def list_executed(self) -> list[str]:
        found: list[str] = self._dbos._active_workflows_set.activeList()
        return found

    def take_over_outcomes(
        self, answer: Callable[[Callable[..., bool], str, dict[str, Any]], bool]
    ) -> Callable[..., bool]:
        """Have ``answer`` called with DBOS's own way, a workflow's id and the other arguments
        whenever DBOS stores an outcome: whether it was stored. Returned is the same way, but
        tried once: DBOS's keeps its thread while it tries again."""
        own = self._database.update_workflow_outcome

        def store(workflow_id: str, status: str, **values: Any) -> bool:
            return answer(own, workflow_id, {"status": status, **values})

        replace(self._database, "update_workflow_outcome", store)
        once = type(self._database).update_workflow_outcome.__wrapped__
        return functools.partial(once, self._database)


def read_token(workflow: str) -> str | None:
    """By which token the row of ``workflow``, within which this is called, is owned."""
    found: str | None = _context.current_owner_xid(workflow)
    return found


@functools.cache
def _executed_type() -> type[Any]:
    class Executed(_core.ActiveWorkflowById):  # type: ignore[misc]
        """What is executed, as DBOS counts it. Its end is the event to look for more."""

        def __init__(self, listeners: Mapping[str, Listener]) -> None:
            super().__init__()
            self._listeners = listeners

        def add(
            self, key: str, queue_name: str | None = None, queue_partition_key: str | None = None
        ) -> Any:
            entry = super().add(key, queue_name, queue_partition_key)
            if listener := self._listeners.get(queue_name or ""):
                listener.note_begun(key)
            return entry

        def _remove(self, key: str, bucket: tuple[str, str | None] | None) -> None:
            super()._remove(key, bucket)
            if listener := self._listeners.get(bucket[0] if bucket else ""):
                listener.note_ended(key)

    return Executed
