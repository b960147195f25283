"""The index by which a thread's runs are found once they are over."""

from __future__ import annotations

import logging

import sqlalchemy as sa
import trio

from .retries import Complaint, reason, until_done
from .row_access import RowAccess

log = logging.getLogger("runctld.rows")

#: A try for the lock that the making of an index takes: whoever writes waits behind it.
INDEX_LOCK = "1s"


class ThreadIndex:
    def __init__(self, database: RowAccess) -> None:
        self._db = database
        c = database.table.c
        options = database.engine.get_execution_options()
        schemas = options.get("schema_translate_map", {})
        self._schema: str | None = schemas.get(database.table.schema)
        self._index = sa.Index("runctl_thread", c.queue_partition_key, c.created_at)

    def make(self) -> None:
        """DBOS finds a thread's runs by an index while they are live only; lists, and the
        turns of a conversation, need those that are over. Blocking; on PostgreSQL a try waits
        for INDEX_LOCK, in which no executor can write.

        Raises: sqlalchemy's DBAPIError."""
        with self._db.engine.begin() as connection:
            if self._schema is not None:
                # Looked for first: to make what exists takes the lock as well.
                there = sa.select(sa.func.to_regclass(f"{self._schema}.{self._index.name}"))
                if connection.scalar(there) is not None:
                    return
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{INDEX_LOCK}'")
            connection.execute(sa.schema.CreateIndex(self._index, if_not_exists=True))

    async def make_patiently(self, patience: float) -> None:
        """``make``, tried for ``patience`` seconds. What it cannot do then is said: without
        the index all is as slow as there are many runs, and nothing worse."""
        why = "no answer"

        def note(words: str) -> None:
            nonlocal why
            why = words

        async def try_once() -> None:
            try:
                await self._db.in_thread(self.make)
            except (sa.exc.ProgrammingError, sa.exc.IntegrityError):
                # Another executor has made it just now, or we may not.
                await self._db.in_thread(self.make)

        complaint = Complaint("an index", "made", level=logging.INFO, heard=note)
        with trio.move_on_after(patience):
            try:
                await until_done(
                    try_once, complaint, self._db.stopping, refusals=sa.exc.OperationalError
                )
                return
            except sa.exc.SQLAlchemyError as error:
                why = reason(error)
        kind, schema = (
            ("INDEX", "") if self._schema is None else ("INDEX CONCURRENTLY", f"{self._schema}.")
        )
        log.warning(
            "the index %s cannot be made (%s): lists and chats are slow where there are many runs."
            " End what holds the table and restart, or have its owner run once:"
            " CREATE %s %s ON %s%s (%s)",
            self._index.name,
            why,
            kind,
            self._index.name,
            schema,
            self._db.table.name,
            ", ".join(column.name for column in self._index.columns),
        )
