"""Taking the lease of an executor ID: at the start of a daemon, which may take it out of the hands
of whoever held it while there was none."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio_asyncio

from ...config.schema import Config
from ...protocol.errors import LeaseHeld, LeaseLost, Unavailable
from ..host import asyncpg_internals
from ..host.postgres import (
    RETRY,
    application_name,
    broken_off,
    check_sessions,
    connect,
    keep_alive,
    lease_key,
)
from . import lease_sql
from .database_lease import LEASE_ROLE, PEER_ROLE, Deputy, Lease, Predecessor, name_holder
from .tables import prepare_tables

log = logging.getLogger("runctld.lease")
aio = trio_asyncio.aio_as_trio

#: A predecessor that was just killed is let go by the server within milliseconds.
HELD_PATIENCE = 2.0


@asynccontextmanager
async def hold_database_lease(
    config: Config,
    executor: str,
    home: str = "",
    deputy: Deputy | None = None,
) -> AsyncIterator[Lease]:
    """Hold the executor ID in the shared database. ``home``: what names our state directory,
    whose lock we hold. ``deputy``: who holds it as well, and alone while there is no daemon.

    Raises: LeaseHeld, naming the holder; ConfigError; Unavailable."""
    lease = await _take(config, executor, home, deputy)
    try:
        yield lease
    finally:
        if not lease.abandoned:
            await lease.close()


async def _take(config: Config, executor: str, home: str, deputy: Deputy | None) -> Lease:
    """A connection that breaks before it has the lock, as when the server restarts, is
    replaced: ``connect`` waits for the server. Not so when somebody held the lock in our place,
    and has let go of it: what runs is without a lease then, and must not go on."""
    asyncpg_internals.check()
    name = application_name(LEASE_ROLE, executor)
    deadline = trio.current_time() + config.start_timeout
    while True:
        conn = await connect(config, name)
        released = held = False
        try:
            await check_sessions(config, conn, name)
            await prepare_tables(conn, lease_key(config))
            # In between nobody has it: who dies then takes what runs along.
            if deputy is not None:
                released = await deputy.release_lease()
            await _lock(conn, config, executor)
            if deputy is not None:
                await deputy.hold_lease(keep_alive(conn))
                held = True
            before = await aio(conn.fetchrow)(lease_sql.ROW, executor)
            generation = await aio(conn.fetchval)(lease_sql.RAISE_GENERATION, executor)
            session = await aio(conn.fetchrow)(lease_sql.SESSION)
        except broken_off() as error:
            conn.terminate()
            log.debug("lease: %r", error)
            if released:
                raise LeaseLost(
                    f"PostgreSQL broke the connection ({error}) when it was to hold the lease of"
                    f" executor ID {executor!r} again: what ran is ended, and replayed; restart"
                    " runctld"
                ) from None
            if trio.current_time() > deadline:
                raise Unavailable(
                    f"PostgreSQL broke the connection for the lease ({error}); see its log"
                ) from None
            await trio.sleep(RETRY)
        except BaseException:
            if held:
                asyncpg_internals.leave_session(conn)
            else:
                conn.terminate()
            raise
        else:
            found = _predecessor(before, home)
            return Lease(config, executor, conn, session, generation, found, deputy)


def _predecessor(row: Any, home: str) -> Predecessor | None:
    """None, when nothing of an earlier daemon runs: it ended in order, or had our state
    directory, whose lock we have."""
    if row is None or not row["grace"] or row["home"] == home:
        return None
    return Predecessor(row["grace"])


async def _lock(conn: Any, config: Config, executor: str) -> None:
    deadline = trio.current_time() + HELD_PATIENCE
    while not await aio(conn.fetchval)(lease_sql.TAKE, executor):
        holder = await aio(conn.fetchrow)(lease_sql.HOLDER, executor)
        # A peer that takes over our runs, or aborts one, is done in a moment.
        peer = holder is not None and (holder["name"] or "").startswith(PEER_ROLE)
        if trio.current_time() > deadline + (config.start_timeout if peer else 0):
            raise LeaseHeld(
                f"executor ID {executor!r} is held by {name_holder(holder)};"
                " stop that one, or give this one its own executor_id"
            )
        await trio.sleep(0.05)
