"""Which runs are over and may be forgotten."""

from __future__ import annotations

import math
import time
from typing import Any

import sqlalchemy as sa

from .attempt_rows import RECENT
from .row_access import RowAccess
from .row_status import HOOK, LIVE, hook_id


class HistoryRows:
    """Methods raise SQLAlchemyError when the database cannot be used for PATIENCE.
    Times are Unix seconds."""

    def __init__(self, database: RowAccess) -> None:
        self._db = database

    async def count_finished(self) -> int:
        query = sa.select(sa.func.count()).where(*self._is_finished())
        return int(await self._db.read_scalar(query))

    async def list_oldest(self, count: int) -> list[str]:
        """The ``count`` finished runs that ended first."""
        t = self._db.table
        query = (
            sa.select(t.c.workflow_uuid).where(*self._is_finished()).order_by(self._select_end())
        )
        return [row.workflow_uuid for row in await self._db.read(query.limit(count))]

    async def list_before(self, when: float, context: int) -> list[str]:
        """Those that ended before Unix time ``when``, without the ``context`` newest runs of
        threads that were used since, or have a run to do."""
        t = self._db.table
        thread = t.c.queue_partition_key
        newest = (t.c.created_at.desc(), t.c.workflow_uuid.desc())
        rank = sa.func.row_number().over(partition_by=thread, order_by=newest)
        live = sa.func.sum(sa.case((t.c.status.in_(list(LIVE)), 1), else_=0))
        used = sa.func.max(self._select_end())
        inner = (
            sa.select(
                t.c.workflow_uuid,
                t.c.status,
                t.c.updated_at,
                self._select_end().label("ended"),
                rank.label("rank"),
                live.over(partition_by=thread).label("live"),
                used.over(partition_by=thread).label("used"),
            )
            .where(self._db.is_run(t.c))
            .subquery()
        )
        c = inner.c
        query = sa.select(c.workflow_uuid).where(
            c.status.not_in(list(LIVE)),
            self._is_unneeded(c),
            self._is_hook_delivered(c),
            c.ended < when * 1000,
            sa.or_(
                c.rank - c.live > context,
                sa.and_(c.live == 0, c.used < when * 1000),
            ),
        )
        return [row.workflow_uuid for row in await self._db.read(query.order_by(c.ended))]

    async def find_oldest_end(self, since: float) -> float:
        """When the first of the runs that ended after Unix time ``since`` did; infinite
        when none has."""
        query = sa.select(sa.func.min(self._select_end())).where(
            *self._is_finished(), self._select_end() >= since * 1000
        )
        found = await self._db.read_scalar(query)
        return math.inf if found is None else found / 1000

    def _is_finished(self) -> tuple[sa.ColumnElement[bool], ...]:
        c = self._db.table.c
        over = c.status.not_in(list(LIVE))
        return (self._db.is_run(c), over, self._is_unneeded(c), self._is_hook_delivered(c))

    def _is_unneeded(self, c: Any) -> sa.ColumnElement[bool]:
        """Of ``RECENT`` aborts other executors may still want to know (``find_aborts``)."""
        if self._db.alone:
            return sa.true()
        recent = (time.time() - RECENT) * 1000
        return sa.or_(c.status != "CANCELLED", c.updated_at < recent)

    def _is_hook_delivered(self, c: Any) -> sa.ColumnElement[bool]:
        """No hook of the run waits for its next try: it would be forgotten with the run."""
        hook = self._db.table.alias()
        length = sa.func.length(hook.c.workflow_uuid) - len(hook_id(""))
        run = sa.func.substr(hook.c.workflow_uuid, 1, length)
        waiting = sa.select(run).where(hook.c.name == HOOK, hook.c.status.in_(list(LIVE)))
        told: sa.ColumnElement[bool] = c.workflow_uuid.not_in(waiting)
        return told

    def _select_end(self) -> sa.ColumnElement[int]:
        return sa.func.coalesce(self._db.table.c.completed_at, self._db.table.c.updated_at)
