"""The embedded database below DBOS: how it is opened, what it keeps, and its clock."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from ...protocol.errors import Unavailable

log = logging.getLogger("runctld.sqlite")

#: How long a statement waits for who writes, milliseconds: then it is tried again, or refused in
#: words.
LOCK_MS = 4000
#: Connections to SQLite, where one writes at a time. Each keeps prepared statements, of up to
#: 20 KiB, and pages of the database, KiB; the one used last is used next. By the defaults of
#: DBOS, sqlite3 and SQLite they took 33 MB after 15,000 runs, and more with each.
CACHE_KIB = 256
#: What is left of its log when that was larger, bytes.
LOG_BYTES = 16 * 1024**2
#: A database that was made by an earlier version is made anew at the start, so that it can give
#: space back, if it is not larger: that takes a second at most.
SMALL_BYTES = 64 * 1024**2
#: Pages that are given back in one transaction, for which other writers wait: 1 MiB.
PAGES = 256


class _Connection(sqlite3.Connection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As DBOS has it: who will write takes the lock at once, and waits for it.
        self.isolation_level = "IMMEDIATE"
        self.execute("PRAGMA foreign_keys=ON")
        self.execute(f"PRAGMA busy_timeout={LOCK_MS}")
        self.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        self.execute(f"PRAGMA journal_size_limit={LOG_BYTES}")


#: SQLAlchemy's arguments.
POOL = {
    "pool_size": 8,
    "pool_use_lifo": True,
    "connect_args": {"cached_statements": 64, "factory": _Connection},
}


def prepare(path: Path) -> None:
    """WAL from the start, so that readers never wait for the writer; 0600. Pages that are free
    can be given back."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))
        with sqlite3.connect(path, isolation_level=None) as db:
            if not db.execute("PRAGMA auto_vacuum").fetchone()[0]:
                db.execute("PRAGMA auto_vacuum=INCREMENTAL")
                if 0 < path.stat().st_size <= SMALL_BYTES:
                    _make_anew(db)
            db.execute("PRAGMA journal_mode=WAL")
        db.close()
    except (OSError, sqlite3.Error) as error:
        raise Unavailable(f"database {path} cannot be opened: {error}") from None


def _make_anew(db: sqlite3.Connection) -> None:
    try:
        db.execute("VACUUM")
    except sqlite3.Error as error:  # no room, say: the next start tries again
        log.debug("vacuum: %s", error)


def give_back_pages(engine: sa.Engine) -> bool:
    """Give some of the pages that are free to the file system; whether there are more. Blocking.

    Raises: sqlalchemy's DBAPIError."""
    with engine.begin() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute(f"PRAGMA incremental_vacuum({PAGES})").fetchall()  # a page a step
        able = connection.exec_driver_sql("PRAGMA auto_vacuum").scalar() == 2
        free = connection.exec_driver_sql("PRAGMA freelist_count").scalar() or 0
    return able and free >= PAGES


def time_new_rows(engine: sa.Engine) -> None:
    """Have new rows say to the millisecond when they came: their time is the table's default,
    which is in whole seconds where Python was older than 3.12 when it was made. Blocking.

    Raises: sqlalchemy's DBAPIError."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER IF NOT EXISTS runctl_created AFTER INSERT ON workflow_status"
            " WHEN NEW.created_at % 1000 = 0 BEGIN"
            " UPDATE workflow_status"
            " SET created_at = CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER)"
            " WHERE rowid = NEW.rowid; END"
        )
