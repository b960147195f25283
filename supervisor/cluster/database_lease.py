"""One live daemon per executor ID: a session advisory lock in PostgreSQL, on a connection of
its own.

When that connection breaks, the daemon goes on without its lease for ``queue.lease_grace``
seconds, and tries to take it again. Whoever takes it raises its generation; so if the
generation is the old one when the lock is held again, nobody has had it in between, or has
acted in our place. docs/design.md has why nobody acts before we have ended.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn, Protocol

import trio
import trio_asyncio

from ...config.schema import Config, ConfigError
from ...protocol.errors import LeaseLost, Unavailable
from ..host import asyncpg_internals
from ..host.postgres import (
    RETRY,
    application_name,
    connect,
    keep_alive,
)
from . import lease_sql

log = logging.getLogger("runctld.lease")
aio = trio_asyncio.aio_as_trio

LEASE_ROLE, PEER_ROLE = "runctld", "runctl-peer"
PROBE = 1.0
#: Probes unanswered for this long: the connection counts as broken. Below what the server
#: takes to let the lock go (``postgres.SESSION``), so that without a grace we have stopped
#: before a peer may start. Without the lease, and without an answer of NATS for this long,
#: we end as well: then nobody can ask whether we live.
PROBE_LIMIT = 5.0
_TICK = 0.25
#: A turn of ``_TICK`` that took this long: the process, or its machine, was stopped.
_PAUSE = 2.0

Contact = Callable[[], Awaitable[None]]


class Deputy(Protocol):
    """Has the lease in our place while there is no daemon."""

    async def hold_lease(self, fd: int) -> None:
        """``fd``: the socket of the connection that has the lock; in place of the one before."""

    async def release_lease(self) -> bool:
        """Let go of what it holds; whether there was anything. Returns when it has."""


class Predecessor(NamedTuple):
    """Who had the lease before us, from another state directory: whether it has ended is not
    known. It goes on for ``grace`` seconds without the lease."""

    grace: float


class Lease:
    """An executor ID held as a session lock on ``conn``, which serves nothing else."""

    def __init__(
        self,
        config: Config,
        executor: str,
        conn: Any,
        session: Any,
        generation: int,
        predecessor: Predecessor | None,
        deputy: Deputy | None = None,
    ) -> None:
        self._config = config
        self._executor = executor
        self._generation = generation
        self._grace = config.queue.lease_grace
        self.predecessor = predecessor
        #: Returns when NATS has answered. Unset before there is a connection to it.
        self.contact: Contact | None = None
        self._asked_for = trio.Event()
        self._answered = trio.Event()
        self._doubted_at = self._paused_at = -math.inf
        self._ticked_at = _now()
        self._away = self._not_ours = False
        self.abandoned = False
        self._deputy = deputy
        self._adopt(conn, session, _now())

    def _adopt(self, conn: Any, session: Any, sent: float) -> None:
        """``conn`` has the lock since ``sent``, or before."""
        self._conn, self._session = conn, session
        self._ended = ended = trio.Event()
        conn.add_termination_listener(lambda _: ended.set())
        if conn.is_closed():
            ended.set()
        self._away = False
        self._note_proof(sent)

    def _note_proof(self, sent: float) -> None:
        self._proved_at = self._sure_at = sent
        self._answered.set()
        self._answered = trio.Event()

    @property
    def away(self) -> bool:
        """Whether the connection is broken: the lease is ours only if nobody else wants it."""
        return self._away

    @property
    def doubtful(self) -> bool:
        """Whether nothing proves that it is ours. Right after this process, or its
        machine, has slept, a peer may have it; ``watch`` finds out within milliseconds."""
        return self._away or _now() - self._sure_at > PROBE_LIMIT

    def doubt(self) -> None:
        """Take nothing for proved that was known before now; ``request_probe`` for a new one."""
        self._doubted_at = self._paused_at = _now()
        self._sure_at = -math.inf

    def request_probe(self) -> None:
        """Do not wait for the next turn of ``watch``."""
        self._asked_for.set()

    async def wait_sure(self) -> None:
        """Until nobody acts in our place: the lease is proved, or has been for less than the
        grace ago."""
        while _now() - self._sure_at > max(PROBE_LIMIT, self._grace):
            await self._answered.wait()

    async def watch(self) -> NoReturn:
        """Raises LeaseLost when it is another's, or the connection is broken, or silent, for
        too long."""
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._probe)
                await self._ended.wait()
                nursery.cancel_scope.cancel()
            self._away = True
            self._conn.terminate()
            if self._not_ours:
                raise self._lease_lost("its session does not have its lock; is there a pooler?", "")
            if self._grace <= 0:
                raise self._lease_lost("the connection to PostgreSQL broke", "")
            await self._retake()

    async def _probe(self) -> None:
        silent = 0.0

        async def ask() -> None:
            nonlocal silent
            while True:
                sent = _now()
                try:
                    if not await aio(self._conn.fetchval)(lease_sql.HELD, self._executor):
                        self._not_ours = True
                        self._ended.set()
                        return
                except Exception as error:
                    log.debug("lease: %r", error)
                    self._ended.set()
                    return
                silent = 0.0
                if sent >= self._doubted_at:
                    self._note_proof(sent)
                with trio.move_on_after(PROBE):
                    await self._asked_for.wait()
                self._asked_for = trio.Event()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while silent < PROBE_LIMIT + PROBE:
                # Time in which this process did not run at all is not the server's silence.
                await trio.sleep(_TICK)
                self._notice_pause()
                silent += _TICK
            self._ended.set()

    def _notice_pause(self) -> None:
        now = _now()
        if now - self._ticked_at > _PAUSE:
            self._paused_at = now
        self._ticked_at = now

    # ---- without the connection ---------------------------------------------------

    async def _retake(self) -> None:
        """Hold it again. Raises LeaseLost."""
        self._notice_pause()
        noticed = _now()
        log.warning(
            "the connection to PostgreSQL broke: runs go on, their outcomes wait and nothing is"
            " begun, for %g s at most (queue.lease_grace)",
            self._grace,
        )
        why = ["it did not come back in time"]
        found = lost = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up, nursery.cancel_scope, why)
            try:
                found = await self._regain(why)
            except LeaseLost as error:  # as itself, not in a group
                lost = error
            nursery.cancel_scope.cancel()
        if lost is not None:
            raise lost
        if found is None:
            raise self._lease_lost(f"the connection to PostgreSQL broke, and {why[-1]}", "")
        conn, session, sent = found
        self._adopt(conn, session, sent)
        if self._deputy is not None:
            await self._deputy.hold_lease(keep_alive(conn))
        log.info(
            "PostgreSQL was away for %.1f s: the lease is held again, no run was touched",
            sent - noticed,
        )

    async def _give_up(self, scope: trio.CancelScope, why: list[str]) -> None:
        """Cancel ``scope`` when we must not go on without the lease."""
        # Nothing is known of NATS since PostgreSQL answered last: it is asked first of all.
        heard_at = max(self._proved_at, self._paused_at)
        asked = trio.Event()

        async def hear() -> None:
            nonlocal heard_at
            limit = 2 * PROBE
            while self.contact is not None:
                began = _now()
                try:
                    with trio.move_on_after(limit):
                        await self.contact()
                        heard_at = began
                except Exception as error:
                    log.debug("NATS: %r", error)
                asked.set()
                limit = PROBE_LIMIT
                await trio.sleep(PROBE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            while True:
                end = self._proved_at + self._grace
                if self._paused_at > self._proved_at:
                    # We were stopped, and not waiting: there is time to ask once. Nothing is
                    # published or committed meanwhile.
                    end = max(end, self._paused_at + PROBE_LIMIT)
                if _now() >= end:
                    break
                if asked.is_set() and _now() - heard_at > PROBE_LIMIT + PROBE:
                    why.append("NATS does not answer either")
                    break
                await trio.sleep(min(_TICK, max(0.0, end - _now())))
                self._notice_pause()
            scope.cancel()

    async def _regain(self, why: list[str]) -> tuple[Any, Any, float]:
        """(a connection with the lock, its session, since when). Raises LeaseLost, when somebody
        else has, or had, the lease."""
        name = application_name(LEASE_ROLE, self._executor)
        while True:
            conn = None
            try:
                conn = await connect(self._config, name, patience=PROBE_LIMIT)
                with trio.fail_after(PROBE_LIMIT):
                    session = await aio(conn.fetchrow)(lease_sql.SESSION)
                    while not await aio(conn.fetchval)(lease_sql.TAKE, self._executor):
                        await self._check_holder(conn)
                        await trio.sleep(RETRY)
                    # In a statement of its own, which sees all that was stored before the
                    # lock was ours.
                    sent = _now()
                    if await self._is_unchanged(conn, write=True):
                        return conn, session, sent
                raise self._lease_lost(
                    "another has taken it meanwhile", await self._holder_words(conn)
                )
            except LeaseLost:
                assert conn is not None
                conn.terminate()
                raise
            except Exception as error:  # also a refused login: the server may be half awake
                log.debug("lease: %r", error)
                if isinstance(error, ConfigError | Unavailable) and len(why) == 1:
                    why[0] = f"it did not come back in time ({error})"
                if conn is not None:
                    conn.terminate()
                await trio.sleep(RETRY)
            except BaseException:
                if conn is not None:
                    conn.terminate()
                raise

    async def _check_holder(self, conn: Any) -> None:
        """Someone holds the lock. Raises LeaseLost, if that is not a session of our own whose
        end the server has not noticed."""
        if not await self._is_unchanged(conn, write=False):
            raise self._lease_lost("another has taken it meanwhile", await self._holder_words(conn))
        pid, began = self._session
        await aio(conn.execute)(lease_sql.END_OLD_SESSION, self._executor, pid, began)

    async def _is_unchanged(self, conn: Any, *, write: bool) -> bool:
        if write:
            kept = await aio(conn.fetchval)(lease_sql.UNCHANGED, self._executor, self._generation)
            return bool(kept)
        row = await aio(conn.fetchrow)(lease_sql.ROW, self._executor)
        return row is not None and row["generation"] == self._generation

    async def _holder_words(self, conn: Any) -> str:
        holder = await aio(conn.fetchrow)(lease_sql.HOLDER, self._executor)
        return f" ({name_holder(holder)})" if holder is not None else ""

    def _lease_lost(self, how: str, who: str) -> LeaseLost:
        return LeaseLost(
            f"the lease of executor ID {self._executor!r} is lost: {how}{who}. All runs were"
            " stopped and will be replayed; restart runctld"
        )

    def abandon(self) -> None:
        """Leave the session as it is, to whoever has a copy of its socket."""
        self.abandoned = True
        asyncpg_internals.leave_session(self._conn)

    async def close(self) -> None:
        """Takes at most a second."""
        with trio.move_on_after(1, shield=True) as scope:
            try:
                await aio(self._conn.close)()
            except Exception as error:
                log.debug("close: %r", error)
        if scope.cancelled_caught:
            self._conn.terminate()


def _now() -> float:
    """Seconds, those included in which the machine was asleep, where that can be told."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def name_holder(row: Any) -> str:
    """In words; ``row``: of ``lease_sql.HOLDER``, or None."""
    if row is None or not row["name"]:
        return "another session of this database"
    where = f" ({row['address']})" if row["address"] else ""
    return f"{row['name']}{where}"
