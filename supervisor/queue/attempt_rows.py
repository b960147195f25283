"""What is read and written of a run's row while it is attempted, and at its end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping

import sqlalchemy as sa

from ...protocol.model import Run, RunSpec
from .attempt_log import AttemptLog
from .row_access import APP_VERSION, HOOKS_QUEUE, PATIENCE, QUEUE, Held, RowAccess
from .row_status import HOOK, NO_THREAD, WORKFLOW, read_run

log = logging.getLogger("runctld.rows")

#: The end of an aborted run's processes is looked for this long, seconds.
RECENT = 600.0


class AttemptRows:
    """Methods raise SQLAlchemyError when the database cannot be used for PATIENCE. What an attempt
    must know, or change, is tried for as long as it takes. Times are Unix seconds."""

    def __init__(self, database: RowAccess) -> None:
        self._db = database
        self.log = AttemptLog(database)

    async def read_attempt(self, run: str) -> tuple[int, float]:
        """(which attempt this is, Unix seconds of the submit)"""
        t = self._db.table
        query = sa.select(t.c.recovery_attempts, t.c.created_at).where(t.c.workflow_uuid == run)
        (row,) = await self._db.read(query, math.inf)
        return int(row.recovery_attempts or 1), row.created_at / 1000

    async def renumber(self, run: str, attempt: int, found: int) -> int | None:
        """What ``attempt`` is to be called, since attempt ``found`` is in the stream already:
        the database was put back from a backup that is older than the output. None when
        ``attempt`` is not the one that the run's row is about, so that ``found`` is newer."""
        c = self._db.table.c
        known = sa.func.coalesce(sa.func.nullif(c.recovery_attempts, 0), 1)
        query = (
            sa.update(self._db.table)
            .where(c.workflow_uuid == run, c.status == "PENDING")
            .where(c.executor_id == self._db.executor)
            .where(known.in_([attempt, found + 1]))  # the latter: an answer was lost
            .values(recovery_attempts=found + 1)
        )
        return found + 1 if await self._db.change(query) else None

    async def count_back(self, run: str, attempt: int, earlier: int) -> None:
        """``attempt`` began nothing: it goes on with attempt ``earlier``, or found the end that
        one had stored."""
        if earlier != attempt:
            await self.renumber(run, attempt, earlier - 1)

    async def find_aborts(self, spec: RunSpec) -> tuple[bool, list[Run]]:
        """Before an attempt: whether the run was aborted after it was claimed, and the
        aborted runs of its thread whose processes other executors may still be ending."""
        t = self._db.table
        recent = (time.time() - RECENT) * 1000
        query = sa.select(*self._db.list_columns(brief=True)).where(
            self._db.is_run(t.c),
            t.c.status == "CANCELLED",
            t.c.queue_partition_key == spec.thread,
            sa.or_(
                t.c.workflow_uuid == spec.run,
                sa.and_(
                    t.c.executor_id != self._db.executor,
                    t.c.recovery_attempts > 0,
                    t.c.updated_at >= recent,
                ),
            ),
        )
        found = [read_run(row)[1] for row in await self._db.read(query, math.inf)]
        others = [run for run in found if run.run != spec.run]
        return len(others) < len(found), others

    async def find_claim(self, run: str, executor: str) -> Held | None:
        """By which claim ``executor`` has the run; None when it does not."""
        c = self._db.table.c
        query = sa.select(c.workflow_uuid, c.queue_partition_key, c.owner_xid).where(
            c.workflow_uuid == run, c.status == "PENDING", c.executor_id == executor
        )
        rows = await self._db.read(query)
        return Held(*rows[0]) if rows else None

    async def cancel(self, run: str, held: Held | None = None) -> bool:
        """The run is aborted, unless it has ended, or is not ``held`` any more; whether that was
        done. What DBOS writes, but for when it was started, which DBOS forgets."""
        c = self._db.table.c
        over = ["SUCCESS", "ERROR", "CANCELLED"]
        same = sa.true() if held is None else c.owner_xid.is_not_distinct_from(held.token)
        now = self._db.now()
        query = (
            sa.update(self._db.table)
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
        return bool(await self._db.change(query, PATIENCE))

    async def note_ends(self, runs: Mapping[str, int | None]) -> None:
        """The ends of these aborted runs are stored: an empty output says so, which nothing
        else has of a run that is cancelled. With when their processes were gone, in Unix
        milliseconds: until then the row has when it was aborted."""
        made, c = self._db.tables.workflow_output, self._db.table.c
        new = ~sa.exists().where(made.c.workflow_uuid == c.workflow_uuid)
        ended = sa.select(c.workflow_uuid).where(
            c.workflow_uuid.in_(runs), c.status == "CANCELLED", new
        )
        query = sa.insert(made).from_select(["workflow_uuid"], ended, include_defaults=False)
        gone = {run: at for run, at in runs.items() if at is not None}
        try:
            await self._db.change(query)
            if gone:
                at = sa.case(gone, value=c.workflow_uuid)
                ours = c.workflow_uuid.in_(gone), c.status == "CANCELLED", c.completed_at < at
                await self._db.change(
                    sa.update(self._db.table).where(*ours).values(completed_at=at)
                )
        except sa.exc.SQLAlchemyError as error:  # the next start looks at their streams
            log.debug("ends: %s", error)

    async def list_without_end(self, since: float) -> list[Run]:
        """Runs aborted since Unix time ``since`` that ran here or nowhere, and whose end is
        not known to be stored: a crash may have cut the abort."""
        t, made = self._db.table, self._db.tables.workflow_output
        query = sa.select(*self._db.list_columns(brief=True)).where(
            self._db.is_run(t.c),
            t.c.status == "CANCELLED",
            t.c.updated_at >= since * 1000,
            sa.or_(self._db.is_ours(t.c), t.c.recovery_attempts == 0),
            ~sa.exists().where(made.c.workflow_uuid == t.c.workflow_uuid),
        )
        return [read_run(row)[1] for row in await self._db.read(query)]

    # ---- what is running by its row ---------------------------------------------

    def count_replayed(self) -> int:
        """How many runs wait for another attempt. Blocking."""
        c = self._db.table.c
        query = sa.select(sa.func.count()).where(
            self._db.is_run(c), c.status == "ENQUEUED", c.recovery_attempts > 0
        )
        return int(self._db.scalar(query))

    async def list_held(self) -> list[Held]:
        """What is running here, by its row."""
        c = self._db.table.c
        query = sa.select(c.workflow_uuid, c.queue_partition_key, c.owner_xid).where(
            c.status == "PENDING", self._db.is_ours(c), sa.or_(self._db.is_run(c), c.name == HOOK)
        )
        return [Held(*row) for row in await self._db.read(query)]

    async def put_back(self, held: Collection[Held]) -> list[Held]:
        """Those of ``held`` whose claim is still the same are first in their queues again, as
        after a restart."""
        c = self._db.table.c
        same = (
            sa.and_(c.workflow_uuid == x.workflow, c.owner_xid.is_not_distinct_from(x.token))
            for x in held
        )
        query = (
            sa.update(self._db.table)
            .where(c.status == "PENDING", self._db.is_ours(c), sa.or_(*same))
            .values(status="ENQUEUED", owner_xid=None, started_at_epoch_ms=None)
            .returning(c.workflow_uuid)
        )

        def write() -> set[str]:
            with self._db.engine.begin() as connection:
                return set(connection.scalars(query))

        back = await self._db.in_thread(write)
        return [x for x in held if x.workflow in back]

    async def adopt_resumed(self) -> int:
        """What is queued where nobody claims it goes to where it is claimed: DBOS's own tools put
        what they resume or copy in its queue, without a thread or a version. How many rows."""
        c = self._db.table.c
        hook = c.name == HOOK
        queue = sa.case((hook, HOOKS_QUEUE), else_=QUEUE)
        ours = sa.or_(c.name.in_([WORKFLOW, HOOK]), c.queue_name == QUEUE)
        lost = sa.or_(
            c.queue_name.is_distinct_from(queue),
            c.application_version.is_(None),
            sa.and_(~hook, c.queue_partition_key.is_(None)),
        )
        which = c.status == sa.literal_column("'ENQUEUED'"), ours, lost
        if not await self._db.read(sa.select(c.workflow_uuid).where(*which).limit(1)):
            return 0  # as nearly always: nothing is written
        thread = sa.case((hook, None), else_=sa.func.coalesce(c.queue_partition_key, NO_THREAD))
        query = (
            sa.update(self._db.table)
            .where(*which)
            .values(
                queue_name=queue,
                queue_partition_key=thread,
                application_version=sa.func.coalesce(c.application_version, APP_VERSION),
            )
        )
        return await self._db.change(query, 0.0)
