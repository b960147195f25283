"""DBOS's recovery of an executor's unfinished rows, all of them in one statement.

DBOS puts one row back a transaction: of the 5 s until 1,000 runs run again, that was one.
Which rows, and what is written, is what DBOS 3.4 has (``get_pending_workflows``,
``reenqueue_for_recovery``); a test compares the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dbos._dbos
import dbos._sys_db
import dbos._utils
import sqlalchemy as sa

_launch: Any = dbos._dbos
_system: Any = dbos._sys_db
_utils: Any = dbos._utils


def reenqueue(system: Any, executor: str, version: str) -> list[str]:
    """Put what ``executor`` had not finished back in its queues; the ids. It is claimed from
    there like anything else, by one. ``system``: DBOS's database. What passes is waited
    out. Raises SQLAlchemy's errors."""
    table = system.tables.workflow_status
    c = table.c
    back = (
        table.update()
        .where(c.status == "PENDING", c.executor_id == executor)
        .where(c.application_version == version)
        .where(system._name_filter(c.application_name, system.app_name))
        .values(
            status="ENQUEUED",
            owner_xid=None,
            started_at_epoch_ms=None,
            updated_at=system._now_ms_sql(),
            queue_name=sa.func.coalesce(c.queue_name, _utils.INTERNAL_QUEUE_NAME),
        )
        .returning(c.workflow_uuid)
    )

    def write() -> list[str]:
        with system.engine.begin() as connection:
            return list(connection.scalars(back))

    written: Callable[[], list[str]] = _system.db_retry(sys_db=system)(write)
    return written()


def at_launch(executor: str, version: str) -> None:
    """Have ``DBOS.launch`` recover so, in its start-up thread."""

    def recover(instance: Any, pending: list[Any]) -> None:
        if pending:
            reenqueue(instance._sys_db, executor, version)

    _launch.startup_recovery_thread = recover
