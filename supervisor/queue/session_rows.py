"""The sessions of threads: by which name an agent's command line knows a thread's conversation.

A table of our own beside DBOS's, made when the first session is asked for.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import sqlalchemy as sa

from ...protocol.errors import Unavailable
from .retries import Complaint, reason, until_done
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
        self._there = False
        self._table = sa.Table(
            "runctl_sessions",
            sa.MetaData(),
            sa.Column("thread", sa.Text, primary_key=True),
            sa.Column("runner", sa.Text, primary_key=True),
            sa.Column("session", sa.Text, nullable=False),
            sa.Column("made", sa.BigInteger, nullable=False),
            schema=database.table.schema,
        )

    async def find(self, thread: str, runner: str) -> str | None:
        """The session of ``thread`` with ``runner``; for as long as it takes."""
        await self._make()
        c = self._table.c
        query = sa.select(c.session).where(c.thread == thread, c.runner == runner)
        rows = await self._db.read(query, math.inf)
        return str(rows[0][0]) if rows else None

    async def look(self, thread: str, runner: str) -> str | None:
        """The same, where it may be that no session was ever stored: then no table is made."""
        if not self._there:
            self._there = await self._db.insist(
                self._is_there, Complaint("the table of sessions", "looked for")
            )
        return await self.find(thread, runner) if self._there else None

    async def store(self, thread: str, runner: str, session: str) -> None:
        """Durable when this returns; for as long as it takes."""
        await self._make()
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
        await self._make()
        c = self._table.c
        query = sa.select(c.runner, c.session, c.made).where(c.thread == thread).order_by(c.runner)
        return [Session(r, s, made / 1000) for r, s, made in await self._db.read(query)]

    async def forget(self, thread: str, runner: str | None = None) -> int:
        """How many sessions the thread had; with ``runner``, of that one."""
        await self._make()
        c = self._table.c
        which = [c.thread == thread] + ([c.runner == runner] if runner is not None else [])
        return await self._db.change(sa.delete(self._table).where(*which), PATIENCE)

    async def _make(self) -> None:
        """Raises Unavailable, when we may not make it."""
        if self._there:
            return

        def make() -> None:
            if not self._is_there():
                with self._db.engine.begin() as connection:
                    connection.execute(sa.schema.CreateTable(self._table, if_not_exists=True))

        async def try_once() -> None:
            try:
                await self._db.in_thread(make)
            except sa.exc.IntegrityError:  # another executor has made it just now
                await self._db.in_thread(make)

        complaint = Complaint("the table of sessions", "made")
        refusals = sa.exc.OperationalError
        try:
            await until_done(try_once, complaint, self._db.stopping, refusals=refusals)
        except sa.exc.SQLAlchemyError as error:
            raise Unavailable(
                f"sessions cannot be stored ({reason(error)}); let the role of database.url create"
                f" the table {self._table.name} beside DBOS's"
            ) from None
        self._there = True

    def _is_there(self) -> bool:
        with self._db.engine.connect() as connection:
            found = sa.inspect(connection)
            return found.has_table(self._table.name, schema=self._translated())

    def _translated(self) -> str | None:
        options = self._db.engine.get_execution_options()
        found: str | None = options.get("schema_translate_map", {}).get(self._table.schema)
        return found
