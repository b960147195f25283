"""runctl's own tables in a shared database, beside DBOS's.

``runctl.executors`` has a row for each executor:

* ``generation`` rises whenever somebody takes the executor's lease: its own daemon at the
  start, or a peer that acts for it. It follows the clock, in microseconds, so that a row which
  was removed and made again does not count anew.
* ``grace`` is how many seconds the daemon that took it last goes on without the lease; 0 once
  nothing of it runs any more, null of a daemon that does not know this.
* ``home`` names that daemon's state directory. It is null from the first start of an ID until
  that is ready to begin runs: such a row counts as none.
* ``takeover_group`` is null where takeover is off.
"""

from __future__ import annotations

from typing import Any

import trio_asyncio

from ...protocol.errors import ConfigError
from ..host.postgres import transaction
from ..host.state_format import FORMAT, refuse_newer

aio = trio_asyncio.aio_as_trio

#: SQL for a generation above all that there were.
NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
#: Looked for first: to create what exists takes the right to create as well.
_THERE = """
    SELECT count(*) = 2 FROM pg_attribute WHERE attrelid = to_regclass('runctl.executors')
        AND attname IN ('takeover_group', 'generation') AND NOT attisdropped
"""
_TABLE = f"""
    CREATE SCHEMA IF NOT EXISTS runctl;
    CREATE TABLE IF NOT EXISTS runctl.executors (
        id text PRIMARY KEY,
        takeover_group text,
        started timestamptz NOT NULL DEFAULT now()
    );
    ALTER TABLE runctl.executors
        ADD COLUMN IF NOT EXISTS generation bigint NOT NULL DEFAULT 0,
        ADD COLUMN IF NOT EXISTS grace double precision,
        ADD COLUMN IF NOT EXISTS home text;
    UPDATE runctl.executors SET home = '' WHERE home IS NULL;
    CREATE TABLE IF NOT EXISTS runctl.format (version integer PRIMARY KEY);
    INSERT INTO runctl.format SELECT {FORMAT} WHERE NOT EXISTS (SELECT 1 FROM runctl.format);
"""
#: A database without this table is of format 1.
_FORMAT_THERE = "SELECT to_regclass('runctl.format') IS NOT NULL"


async def prepare_tables(conn: Any, key: str) -> None:
    """See that they are there. ``key``: of the URL that led there.

    Raises ConfigError, OSError and asyncpg's errors."""
    import asyncpg

    try:
        async with transaction(conn):
            await aio(conn.execute)(
                "SELECT pg_advisory_xact_lock(hashtextextended('runctl executors', 0))"
            )
            if await aio(conn.fetchval)(_FORMAT_THERE):
                found = await aio(conn.fetchval)("SELECT max(version) FROM runctl.format")
                refuse_newer(found or FORMAT, f"the database of {key}")
            if not await aio(conn.fetchval)(_THERE):
                await aio(conn.execute)(_TABLE)
    except asyncpg.InsufficientPrivilegeError as error:
        raise ConfigError(
            f"PostgreSQL refuses to set up the schema runctl: {error}; let the role of"
            f" {key} do it once: GRANT CREATE ON DATABASE ... TO ..."
        ) from None
