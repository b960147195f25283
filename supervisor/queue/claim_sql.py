"""The claim of one thread's next run, in one statement.

DBOS's own claim looks at every thread with something queued, and builds three statements
anew each time. Here it is known on which thread something has changed, and SQLite has one
writer at a time, so that between the look and the claim nobody claims. What is written is
what DBOS 3.4 writes (``start_queued_partitioned_workflows``); a test compares the rows.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from .dbos_internals import System


class HeadClaim:
    """Of the queue ``name``, partitioned with one at a time."""

    def __init__(self, system: System, name: str, executor: str, version: str) -> None:
        self._engine = system.engine
        table = system.tables.workflow_status
        other = table.alias()
        key = sa.bindparam("key", type_=sa.String)
        token = sa.bindparam("token", type_=sa.String)

        def is_on_key(t: Any, status: str) -> tuple[sa.ColumnElement[bool], ...]:
            # Written out, so that SQLite sees that DBOS's index of what is live serves.
            is_live = t.c.status == sa.literal_column(f"'{status}'")
            return t.c.queue_name == name, is_live, t.c.queue_partition_key == key

        head = (
            sa.select(other.c.workflow_uuid)
            .where(*is_on_key(other, "ENQUEUED"), other.c.application_version == version)
            .order_by(other.c.priority, other.c.created_at, other.c.workflow_uuid)
            .limit(1)
            .scalar_subquery()
        )
        running = sa.select(sa.literal(1)).where(*is_on_key(other, "PENDING")).exists()
        self._claim = (
            table.update()
            .where(table.c.workflow_uuid == head, table.c.status == "ENQUEUED", ~running)
            # A run has no time-out of DBOS's: nothing else would be due.
            .where(table.c.workflow_timeout_ms.is_(None))
            .values(
                status="PENDING",
                owner_xid=token,
                application_version=version,
                executor_id=executor,
                application_name=system.app_name,
                started_at_epoch_ms=system.now(),
                rate_limited=False,
                recovery_attempts=table.c.recovery_attempts + 1,
                updated_at=system.now(),
            )
            .returning(table.c.workflow_uuid)
        )

    def claim(self, key: str, token: str) -> str | None:
        """The workflow that is ours now, if one of the partition ``key`` may begin."""
        with self._engine.begin() as c:
            found: str | None = c.execute(self._claim, {"key": key, "token": token}).scalar()
            return found
