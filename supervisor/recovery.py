"""DBOS's recovery of an executor's unfinished rows, all of them in one statement.

DBOS puts one row back a transaction: of the 5 s until 1,000 runs run again, that was one.
Which rows, and what is written, is what DBOS 3.4 has (``get_pending_workflows``,
``reenqueue_for_recovery``); a test compares the rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import dbos._dbos
import dbos._sys_db
import dbos._utils
import sqlalchemy as sa

log = logging.getLogger("runctld.recovery")

_launch: Any = dbos._dbos
_system: Any = dbos._sys_db
_utils: Any = dbos._utils


def reenqueue(system: Any, executor: str | None, version: str) -> dict[str, str | None]:
    """Put what ``executor`` had not finished back in its queues, None for every executor:
    workflow id -> the executor that had it. It is claimed from there like anything else, by
    one. ``system``: DBOS's database. What passes is waited out. Raises SQLAlchemy's errors."""
    table = system.tables.workflow_status
    c = table.c
    back = (
        table.update()
        .where(c.status == "PENDING", sa.true() if executor is None else c.executor_id == executor)
        .where(c.application_version == version)
        .where(system._name_filter(c.application_name, system.app_name))
        .values(
            status="ENQUEUED",
            owner_xid=None,
            started_at_epoch_ms=None,
            updated_at=system._now_ms_sql(),
            queue_name=sa.func.coalesce(c.queue_name, _utils.INTERNAL_QUEUE_NAME),
        )
        .returning(c.workflow_uuid, c.executor_id)
    )

    def write() -> dict[str, str | None]:
        with system.engine.begin() as connection:
            return {workflow: owner for workflow, owner in connection.execute(back)}

    written: Callable[[], dict[str, str | None]] = _system.db_retry(sys_db=system)(write)
    return written()


def at_launch(executor: str, version: str, *, alone: bool) -> None:
    """Have ``DBOS.launch`` recover so, in its start-up thread. ``alone``: the database is
    this daemon's by a lock, so that every row is ours, whatever executor ID it carries."""

    def recover(instance: Any, pending: list[Any]) -> None:
        if not alone:
            if pending:
                reenqueue(instance._sys_db, executor, version)
            return
        found = reenqueue(instance._sys_db, None, version)
        others = Counter(
            (owner, "run" if "." not in workflow else "hook")
            for workflow, owner in found.items()
            if owner != executor
        )
        for (owner, kind), count in sorted(others.items(), key=str):
            log.warning(
                "%d unfinished %s%s of executor %r taken over: the ID has changed",
                *(count, kind, "" if count == 1 else "s", owner),
            )

    _launch.startup_recovery_thread = recover
