"""A table of our own beside DBOS's, made when it is first needed."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from ...protocol.errors import Unavailable
from .retries import Complaint, reason, until_done
from .row_access import RowAccess


class OwnTable:
    """``table``, once ``make`` has returned, or ``find`` says so. ``what`` it holds, in words."""

    def __init__(self, database: RowAccess, name: str, what: str, *columns: sa.Column[Any]) -> None:
        self._db = database
        self._what = what
        self._there = False
        #: Alone, nobody but us makes it.
        self._looked = False
        self.table = sa.Table(name, sa.MetaData(), *columns, schema=database.table.schema)

    async def find(self) -> bool:
        """Whether somebody has made it; for as long as it takes."""
        if not self._there and not (self._looked and self._db.alone):
            complaint = Complaint(f"the table of {self._what}", "looked for")
            self._there = await self._db.insist(self._look, complaint)
            self._looked = True
        return self._there

    async def make(self) -> None:
        """Tried for as long as it takes. Raises Unavailable, when we may not make it."""
        if self._there:
            return

        def make() -> None:
            if not self._look():
                with self._db.engine.begin() as connection:
                    connection.execute(sa.schema.CreateTable(self.table, if_not_exists=True))

        async def try_once() -> None:
            try:
                await self._db.in_thread(make)
            except sa.exc.IntegrityError:  # another executor has made it just now
                await self._db.in_thread(make)

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

    def _look(self) -> bool:
        options = self._db.engine.get_execution_options()
        schema: str | None = options.get("schema_translate_map", {}).get(self.table.schema)
        with self._db.engine.connect() as connection:
            return sa.inspect(connection).has_table(self.table.name, schema=schema)
