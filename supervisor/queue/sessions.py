"""The sessions with the database, DBOS's and ours: how they are opened, how they wait for locks,
and what they see of others.

DBOS is given this engine. What is said of its sessions here is said of no other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from ...config.schema import Config
from ..host.database_files import database_path, look_for_saved
from ..host.postgres import engine_arguments
from . import sqlite

#: How long a statement of PostgreSQL waits for a lock, seconds: as SQLite's, ``sqlite.LOCK_MS``.
LOCK = 4
#: As DBOS has it: so long a session of PostgreSQL may do nothing in a transaction, seconds, unless
#: the URL says otherwise.
IDLE = 60
#: As DBOS has it. One connection each of those that wait for the lease at their commit.
POOL = {"pool_size": 20, "max_overflow": 0, "pool_timeout": 30, "pool_pre_ping": True}

#: What a role or a database may have set otherwise. ``default_transaction_read_only`` is left
#: as it is: some set it when the disk fills.
_SETTINGS = {
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "lock_timeout": f"{LOCK}s",
    "statement_timeout": "0",
    "transaction_timeout": "0",
}
_IDLE_SETTING = "idle_in_transaction_session_timeout"


class Sessions:
    """``engine`` opens them as they are needed, until ``close``."""

    def __init__(self, config: Config, before_commit: Callable[[], None]) -> None:
        """``before_commit`` is called before each commit, in its thread.

        Raises Unavailable, when the embedded database cannot be opened; ConfigError, when it is
        gone, and saved."""
        self._closed = False
        if config.database.embedded:
            path = database_path(config)
            look_for_saved(path)
            sqlite.prepare(path)
            url = sa.URL.create("sqlite", database=str(path))
            self.engine = sa.create_engine(url, **{**POOL, **sqlite.POOL})
        else:
            url = sa.make_url(config.database.url).set(drivername="postgresql+psycopg")
            self.engine = sa.create_engine(url, **POOL, **engine_arguments(config))
            settle = _make_settle(url)
            # Before SQLAlchemy asks a first session what its default is, to return to it later.
            sa.event.listen(self.engine, "connect", settle, insert=True)
            sa.event.listen(self.engine, "do_connect", _connect)
            sa.event.listen(self.engine, "handle_error", _leave_read_only)
        sa.event.listen(self.engine, "commit", lambda _: before_commit())
        sa.event.listen(self.engine, "checkin", self._close_late)

    def close(self) -> None:
        """Blocking. What is in use now is closed when it is given back."""
        self._closed = True
        self.engine.dispose()

    def _close_late(self, _: object, record: Any) -> None:
        if self._closed:
            record.invalidate()


def _make_settle(url: sa.URL) -> Callable[[Any, object], None]:
    settings = dict(_SETTINGS)
    if _IDLE_SETTING not in str(url.query.get("options")):
        settings[_IDLE_SETTING] = f"{IDLE}s"
    statement = "SELECT " + ", ".join(
        # A server that does not know the name is asked nothing.
        f"CASE WHEN current_setting('{name}', true) IS NOT NULL"
        f" THEN set_config('{name}', '{value}', false) END"
        for name, value in settings.items()
    )

    def settle(connection: Any, _: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)
        connection.commit()  # the pool rolls back what is left open

    return settle


def _connect(dialect: Any, _: object, args: Any, options: Any) -> Any:
    """What the machine refuses, such as one more descriptor, psycopg raises as it is: an error that
    nobody would take for the database's, and tries again after."""
    try:
        return dialect.connect(*args, **options)
    except OSError as error:
        raise dialect.loaded_dbapi.OperationalError(str(error)) from error


def _leave_read_only(context: sa.engine.ExceptionContext) -> None:
    """A session keeps the default that it began with, and one with a former primary stays
    there: a new one is tried."""
    if getattr(context.original_exception, "sqlstate", None) == "25006":
        context.is_disconnect = True
