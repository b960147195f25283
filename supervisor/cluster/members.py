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

from ...config.schema import Config
from ...protocol.errors import ConfigError, Unavailable
from ..host.postgres import RETRY, application_name, broken_off, connect, lease_key
from .database_lease import PEER_ROLE
from .lease_sql import LOCK_KEY, held_by
from .tables import NOW, prepare_tables

log = logging.getLogger("runctld.members")
aio = trio_asyncio.aio_as_trio

#: Seconds in which the keeper of a dead daemon has surely ended all of its runs.
TREES_GONE = 2.5
#: Of a server that answered before, an answer is awaited for so many seconds.
AWAY = 5.0


def _held(executor: str) -> str:
    return f"EXISTS (SELECT 1 FROM pg_locks l WHERE {held_by(executor)})"


_MEMBERS = f"""
    SELECT id, takeover_group, grace, {_held("e.id")} AS alive FROM runctl.executors e
    WHERE (home IS NOT NULL OR generation = 0)
"""
_ANNOUNCE = """
    INSERT INTO runctl.executors (id, takeover_group, grace, home) VALUES ($1, $2, $3, $4)
    ON CONFLICT (id) DO UPDATE SET takeover_group = excluded.takeover_group, started = now(),
        grace = excluded.grace, home = excluded.home
"""
#: Before anything is done in its place.
_RAISE = f"""
    UPDATE runctl.executors SET generation = greatest(generation + 1, {NOW}),
        home = coalesce(home, '')
    WHERE id = $1
"""


class Member(msgspec.Struct, frozen=True):
    """``group`` None: takeover is off there. ``alive``: it holds its executor ID, or a
    peer does so for a moment. ``grace``: so many seconds it goes on without."""

    id: str
    group: str | None
    alive: bool
    grace: float


class Members:
    """Queries over a connection of its own, made anew when it broke.

    Methods raise Unavailable, when PostgreSQL is away, and ConfigError, when it may not
    be used; once there was a connection, Unavailable in either case."""

    def __init__(self, config: Config, executor: str, home: str = "") -> None:
        """``home``: what names our state directory."""
        self._config = config
        self._executor = executor
        self._home = home
        self._conn: Any = None
        self._lock = trio.Lock()
        self._place = trio.Lock()
        #: How many connections there were: what was seen over an earlier one may be the
        #: absence of the whole server.
        self.sessions = 0

    async def announce(self) -> None:
        """At the start, when nothing of an earlier daemon of our ID runs any more: what breaks
        off is tried again for start_timeout."""
        takeover = self._config.takeover
        deadline = trio.current_time() + self._config.start_timeout
        while True:
            try:
                await self._ask(
                    _ANNOUNCE,
                    self._executor,
                    takeover.group if takeover.enabled else None,
                    self._config.queue.lease_grace,
                    self._home,
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

    async def rest(self) -> None:
        """Nothing of ours runs any more; what is unfinished waits for our return."""
        await self._ask("UPDATE runctl.executors SET grace = 0 WHERE id = $1", self._executor)

    async def all(self) -> list[Member]:
        return self._read(await self._ask(f"{_MEMBERS} ORDER BY id"))

    async def get(self, executor: str) -> Member:
        """``executor``, be it announced or not."""
        found = self._read(await self._ask(f"{_MEMBERS} AND id = $1", executor))
        return found[0] if found else Member(executor, None, await self.alive(executor), 0.0)

    def _read(self, rows: list[Any]) -> list[Member]:
        return [
            Member(row["id"], row["takeover_group"], row["alive"], row["grace"] or 0.0)
            for row in rows
        ]

    async def alive(self, executor: str) -> bool:
        rows = await self._ask(f"SELECT {_held('$1::text')} AS alive", executor)
        return bool(rows[0]["alive"])

    @asynccontextmanager
    async def in_place_of(self, executor: str) -> AsyncIterator[bool]:
        """Hold another's executor ID: it does not start meanwhile, and if it lives without its
        lease, as after a restart of PostgreSQL, it ends as soon as it looks. Yields False when
        it holds the ID itself. Keep it short. That nothing of it runs is for the caller to
        know (``Absence``)."""
        async with self._place:
            before = self.sessions
            got = (await self._ask(f"SELECT pg_try_advisory_lock({LOCK_KEY}) AS got", executor))[0]
            try:
                if got["got"]:
                    await self._ask(_RAISE, executor)
                    if self.sessions > before + (before == 0):
                        raise Unavailable("PostgreSQL broke off, and the lease with it")
                yield bool(got["got"])
            finally:
                if got["got"]:
                    with trio.CancelScope(shield=True):
                        await self._ask(f"SELECT pg_advisory_unlock({LOCK_KEY})", executor)

    async def see_session(self, number: int) -> None:
        """Raises Unavailable, unless the connection is the one that was ``sessions`` then: the
        lock that it holds was held all the while."""
        await self._ask("SELECT 1")
        if self.sessions != number:
            raise Unavailable("PostgreSQL broke off, and the lease with it")

    async def _ask(self, query: str, *args: Any) -> list[Any]:
        async with self._lock:
            if self._conn is None or self._conn.is_closed():
                await self._connect()
            try:
                with trio.fail_after(AWAY):
                    return list(await aio(self._conn.fetch)(query, *args))
            except BaseException as error:
                # Unknown state: a lock that it held must not stay with it.
                self._conn.terminate()
                if isinstance(error, Exception):
                    raise Unavailable(f"PostgreSQL broke off: {error}") from error
                raise

    async def _connect(self) -> None:
        name = application_name(PEER_ROLE, self._executor)
        try:
            conn = await connect(self._config, name, patience=AWAY if self.sessions else None)
        except ConfigError as error:
            if not self.sessions:
                raise
            # It was right before: a server that is half awake, or a login that is just changed.
            raise Unavailable(str(error)) from None
        try:
            await prepare_tables(conn, lease_key(self._config))
        except broken_off() as error:
            conn.terminate()
            raise Unavailable(f"PostgreSQL broke off: {error}") from error
        except BaseException:
            conn.terminate()
            raise
        self.sessions += 1
        self._conn = conn

    def close(self) -> None:
        if self._conn is not None:
            self._conn.terminate()
