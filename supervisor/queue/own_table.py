"""A table of our own beside DBOS's, made when it is first needed."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import sqlalchemy as sa

from ...protocol.errors import Unavailable
from .retries import Complaint, reason, until_done
from .row_access import RowAccess

log = logging.getLogger("runctld.rows")

#: Where there is none, another executor may have made it since: it is looked for every so often,
#: in seconds.
AGAIN = 60.0


class OwnTable:
    """``table``, once ``make`` has returned, or ``find`` says so. ``what`` it holds, in words."""

    def __init__(self, database: RowAccess, name: str, what: str, *columns: sa.Column[Any]) -> None:
        self._db = database
        self._what = what
        self._there = False
        self._look_at = 0.0
        self.table = sa.Table(name, sa.MetaData(), *columns, schema=database.table.schema)

    def prepare(self) -> None:
        """At the start. Where other executors may make it, and roles are given rights to what there
        is, it is made now. Blocking; raises SQLAlchemyError."""
        if self._db.alone:
            self._note(self._look())
        else:
            self._create()
            self._note(True)

    async def find(self) -> bool:
        """Whether it is there, as far as is known; for as long as it takes."""
        if not self._there and time.monotonic() >= self._look_at:
            complaint = Complaint(f"the table of {self._what}", "looked for")
            self._note(await self._db.insist(self._look, complaint))
        return self._there

    def _note(self, there: bool) -> None:
        """Alone, nobody but us makes it: then it need not be looked for again."""
        self._there = there
        self._look_at = math.inf if self._db.alone else time.monotonic() + AGAIN

    async def make(self) -> None:
        """Tried for as long as it takes. Raises Unavailable, when we may not make it."""
        if self._there:
            return

        async def try_once() -> None:
            try:
                await self._db.in_thread(self._create)
            except sa.exc.IntegrityError:  # another executor has made it just now
                await self._db.in_thread(self._create)

        complaint = Complaint(f"the table of {self._what}", "made")
        refusals = sa.exc.OperationalError
        try:
            await until_done(try_once, complaint, self._db.stopping, refusals=refusals)
        except sa.exc.SQLAlchemyError as error:
            raise Unavailable(
                f"{self._what} cannot be stored ({reason(error)}); let the role of database.url"
                f" create the table {self.table.name} beside DBOS's"
            ) from None
        self._there = True

    def _create(self) -> None:
        if not self._look():
            with self._db.engine.begin() as connection:
                connection.execute(sa.schema.CreateTable(self.table, if_not_exists=True))

    def _look(self) -> bool:
        options = self._db.engine.get_execution_options()
        schema: str | None = options.get("schema_translate_map", {}).get(self.table.schema)
        with self._db.engine.connect() as connection:
            return sa.inspect(connection).has_table(self.table.name, schema=schema)
