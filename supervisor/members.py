"""What the executors of one PostgreSQL know of each other.

There are no heartbeats: whoever holds the lock of its executor ID (``lease.py``) is
alive. A table says which executors there are and to which takeover group they belong; a
row is written at the start, and removed by an orderly end that left nothing to replay.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio
import trio_asyncio

from ..config.schema import Config
from .errors import ConfigError, Unavailable
from .lease import LOCK_KEY, PEER_ROLE, held_by
from .postgres import RETRY, application_name, connect
from .versions import FORMAT, refuse_newer

log = logging.getLogger("runctld.members")
aio = trio_asyncio.aio_as_trio

#: Seconds in which the keeper of a dead daemon has surely ended all of its runs.
TREES_GONE = 2.5

#: Looked for first: to create what exists takes the right to create as well.
_THERE = "SELECT to_regclass('runctl.executors') IS NOT NULL"
_TABLE = f"""
    CREATE SCHEMA IF NOT EXISTS runctl;
    CREATE TABLE IF NOT EXISTS runctl.executors (
        id text PRIMARY KEY,
        takeover_group text,          -- null: takeover is off there
        started timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE IF NOT EXISTS runctl.format (version integer PRIMARY KEY);
    INSERT INTO runctl.format SELECT {FORMAT} WHERE NOT EXISTS (SELECT 1 FROM runctl.format);
"""
#: A database without this table is of format 1.
_FORMAT_THERE = "SELECT to_regclass('runctl.format') IS NOT NULL"


def _held(executor: str) -> str:
    return f"EXISTS (SELECT 1 FROM pg_locks l WHERE {held_by(executor)})"


class Member(msgspec.Struct, frozen=True):
    """``group`` None: takeover is off there. ``alive``: it holds its executor ID, or a
    peer does so for a moment."""

    id: str
    group: str | None
    alive: bool


class Members:
    """Queries over a connection of its own, made anew when it broke.

    Methods raise Unavailable, when PostgreSQL is away, and ConfigError, when it may not
    be used."""

    def __init__(self, config: Config, executor: str) -> None:
        self._config = config
        self._executor = executor
        self._conn: Any = None
        self._lock = trio.Lock()
        self._place = trio.Lock()

    async def announce(self) -> None:
        """At the start: what breaks off is tried again for start_timeout."""
        takeover = self._config.takeover
        deadline = trio.current_time() + self._config.start_timeout
        while True:
            try:
                await self._ask(
                    "INSERT INTO runctl.executors (id, takeover_group) VALUES ($1, $2)"
                    " ON CONFLICT (id) DO UPDATE"
                    " SET takeover_group = excluded.takeover_group, started = now()",
                    self._executor,
                    takeover.group if takeover.enabled else None,
                )
            except Unavailable as error:
                if trio.current_time() > deadline:
                    raise
                log.debug("announce: %s", error)
                await trio.sleep(RETRY)
            else:
                return

    async def leave(self) -> None:
        await self._ask("DELETE FROM runctl.executors WHERE id = $1", self._executor)

    async def all(self) -> list[Member]:
        rows = await self._ask(
            f"SELECT id, takeover_group, {_held('e.id')} AS alive"
            " FROM runctl.executors e ORDER BY id"
        )
        return [Member(row["id"], row["takeover_group"], row["alive"]) for row in rows]

    async def alive(self, executor: str) -> bool:
        rows = await self._ask(f"SELECT {_held('$1::text')} AS alive", executor)
        return bool(rows[0]["alive"])

    @asynccontextmanager
    async def in_place_of(self, executor: str) -> AsyncIterator[bool]:
        """Hold another's executor ID: proof that it is dead, and it does not start
        meanwhile. Yields False when it is alive. Keep it short."""
        async with self._place:
            got = (await self._ask(f"SELECT pg_try_advisory_lock({LOCK_KEY}) AS got", executor))[0]
            try:
                yield bool(got["got"])
            finally:
                if got["got"]:
                    with trio.CancelScope(shield=True):
                        await self._ask(f"SELECT pg_advisory_unlock({LOCK_KEY})", executor)

    async def _ask(self, query: str, *args: Any) -> list[Any]:
        async with self._lock:
            if self._conn is None or self._conn.is_closed():
                await self._connect()
            try:
                return list(await aio(self._conn.fetch)(query, *args))
            except BaseException as error:
                # Unknown state: a lock that it held must not stay with it.
                self._conn.terminate()
                if isinstance(error, Exception):
                    raise Unavailable(f"PostgreSQL broke off: {error}") from error
                raise

    async def _connect(self) -> None:
        import asyncpg

        name = application_name(PEER_ROLE, self._executor)
        conn = await connect(self._config, name)
        try:
            async with _transaction(conn):
                await aio(conn.execute)(
                    "SELECT pg_advisory_xact_lock(hashtextextended('runctl executors', 0))"
                )
                if await aio(conn.fetchval)(_FORMAT_THERE):
                    found = await aio(conn.fetchval)("SELECT max(version) FROM runctl.format")
                    refuse_newer(found or FORMAT, "the database of database.url")
                if not await aio(conn.fetchval)(_THERE):
                    await aio(conn.execute)(_TABLE)
        except asyncpg.InsufficientPrivilegeError as error:
            raise ConfigError(
                f"PostgreSQL refuses to set up the schema runctl: {error}; let the role of"
                " database.url do it once: GRANT CREATE ON DATABASE ... TO ..."
            ) from None
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            conn.terminate()
            raise Unavailable(f"PostgreSQL broke off: {error}") from error
        except BaseException:
            conn.terminate()
            raise
        self._conn = conn

    def close(self) -> None:
        if self._conn is not None:
            self._conn.terminate()


@asynccontextmanager
async def _transaction(conn: Any) -> AsyncIterator[None]:
    transaction = conn.transaction()
    await aio(transaction.start)()
    try:
        yield
    except BaseException:
        conn.terminate()
        raise
    await aio(transaction.commit)()
