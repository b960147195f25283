"""The sessions of threads: by which name an agent's command line knows a thread's conversation.

A table of our own beside DBOS's, made when the first session is asked for.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import sqlalchemy as sa

from .own_table import OwnTable
from .retries import Complaint
from .row_access import PATIENCE, RowAccess


class Session(NamedTuple):
    """``made``: Unix seconds."""

    runner: str
    name: str
    made: float


class SessionRows:
    """Methods raise SQLAlchemyError when the database cannot be used for PATIENCE, and Unavailable
    where there may be no such table. What an attempt must know, or store, is tried for as long
    as it takes."""

    def __init__(self, database: RowAccess) -> None:
        self._db = database
        self.own = OwnTable(
            *(database, "runctl_sessions", "sessions"),
            sa.Column("thread", sa.Text, primary_key=True),
            sa.Column("runner", sa.Text, primary_key=True),
            sa.Column("session", sa.Text, nullable=False),
            sa.Column("made", sa.BigInteger, nullable=False),
        )
        self._table = self.own.table

    async def find(self, thread: str, runner: str) -> str | None:
        """The session of ``thread`` with ``runner``; for as long as it takes."""
        await self.own.make()
        c = self._table.c
        query = sa.select(c.session).where(c.thread == thread, c.runner == runner)
        rows = await self._db.read(query, math.inf)
        return str(rows[0][0]) if rows else None

    async def look(self, thread: str, runner: str) -> str | None:
        """The same, where it may be that no session was ever stored: then no table is made."""
        return await self.find(thread, runner) if await self.own.find() else None

    async def store(self, thread: str, runner: str, session: str) -> None:
        """Durable when this returns; for as long as it takes."""
        await self.own.make()
        values = {"session": session, "made": time.time_ns() // 1_000_000}
        key = {"thread": thread, "runner": runner}
        c = self._table.c

        def write() -> None:
            with self._db.engine.begin() as connection:
                connection.execute(
                    sa.delete(self._table).where(c.thread == thread, c.runner == runner)
                )
                connection.execute(sa.insert(self._table).values(key | values))

        await self._db.insist(write, Complaint("a thread's session"))

    async def list_of(self, thread: str) -> list[Session]:
        await self.own.make()
        c = self._table.c
        query = sa.select(c.runner, c.session, c.made).where(c.thread == thread).order_by(c.runner)
        return [Session(r, s, made / 1000) for r, s, made in await self._db.read(query)]

    async def forget(self, thread: str, runner: str | None = None) -> int:
        """How many sessions the thread had; with ``runner``, of that one."""
        await self.own.make()
        c = self._table.c
        which = [c.thread == thread] + ([c.runner == runner] if runner is not None else [])
        return await self._db.change(sa.delete(self._table).where(*which), PATIENCE)
