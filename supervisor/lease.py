"""One live daemon per executor ID: flock on the state directory, and on PostgreSQL a
session advisory lock on a connection of its own."""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import trio
import trio_asyncio

from ..config.schema import MAX_ID_BYTES, Config, ConfigError
from .errors import LeaseHeld, LeaseLost, Unavailable
from .postgres import application_name, connection
from .private import write_private

log = logging.getLogger("runctld.lease")
aio = trio_asyncio.aio_as_trio


def executor_id(config: Config) -> str:
    """The configured ID, or one generated once and kept in the state directory. A new one is
    made where none can be read: the directory's lock, not the ID, says whose runs are in it."""
    if config.executor_id:
        return config.executor_id
    path = config.state_dir / "executor-id"
    try:
        kept = path.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        kept = ""
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; let runctld's user read it, or remove it"
        ) from None
    if kept and kept.isprintable() and "\ufffd" not in kept and len(kept.encode()) <= MAX_ID_BYTES:
        return kept
    if kept:
        log.warning("%s does not hold an executor ID; a new one is made", path)
    made = f"{socket.gethostname().split('.')[0][:40] or 'local'}-{uuid.uuid4().hex[:8]}"
    write_private(path, f"{made}\n".encode())
    return made


class FileLease:
    """The lock of a state directory, held through ``fd``."""

    def __init__(self, fd: int, path: Path, executor: str) -> None:
        self._fd = fd
        self._path = path
        self._executor = executor

    def check(self) -> None:
        """See that the lock is still ours, and the file still where others look for it.
        Costs microseconds; may be called from any thread.

        Raises LeaseLost. What cannot be looked at for the moment is not lost."""
        try:
            there = os.stat(self._path)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # changes nothing if it is ours
            if os.path.samestat(there, os.fstat(self._fd)):
                return
            how = f"{self._path} is another file now{self._holder()}"
        except BlockingIOError:
            how = f"{self._path} was unlocked, and is locked by another process{self._holder()}"
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return
            how = f"{self._path} was removed"
        raise LeaseLost(
            f"the lease of executor ID {self._executor!r} is lost: {how}. All runs were stopped,"
            " and are replayed by whoever holds it; restart runctld if nobody does"
        )

    def _holder(self) -> str:
        try:
            holder = _first_line(self._path.read_bytes())
        except OSError:
            holder = ""
        return f" ({holder})" if holder else ""


@contextmanager
def hold_file_lease(state_dir: Path, executor: str) -> Iterator[FileLease]:
    """Hold the state directory's lock. Raises LeaseHeld, naming the holder."""
    path = state_dir / "lock"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lease = FileLease(fd, path, executor)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _first_line(os.read(fd, 4096)) or "another runctld"
                raise LeaseHeld(
                    f"executor ID {executor!r} is held by {holder} (state_dir {state_dir});"
                    " stop that one, or give this one its own state_dir and executor_id"
                ) from None
            try:
                lease.check()
            except LeaseLost:  # the file was replaced between the two calls
                continue
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"executor {executor!r}, pid {os.getpid()}\n".encode(), 0)
            yield lease
            return
        finally:
            os.close(fd)


def _first_line(text: bytes) -> str:
    return text[:4096].decode(errors="replace").strip().partition("\n")[0]


# ---- PostgreSQL ------------------------------------------------------------------


def lock_key(executor: str) -> str:
    """SQL for the key of an executor's advisory lock; ``executor`` is SQL as well."""
    return f"hashtextextended('runctl:' || {executor}, 0)"


def held_by(executor: str) -> str:
    """SQL condition on a row ``l`` of pg_locks: this session holds ``executor``'s lock."""
    return f"""
        l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
        AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (l.classid::bigint << 32 | l.objid::bigint) = {lock_key(executor)}"""


LOCK_KEY = lock_key("$1")
LEASE_ROLE, PEER_ROLE = "runctld", "runctl-peer"
#: A predecessor that was just killed is let go by the server within milliseconds.
HELD_PATIENCE = 2.0
PROBE = 1.0
#: Probes unanswered for this long: the lease counts as lost. Below what the server takes
#: to let it go (``postgres.SESSION``), so that we have stopped before a peer may start.
PROBE_LIMIT = 5.0
_TICK = 0.25

_HOLDER = f"""
    SELECT a.application_name AS name, a.client_addr::text AS address
    FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE {held_by("$1")}
"""


class Lease:
    """An executor ID held as a session lock on ``conn``, which serves nothing else."""

    def __init__(self, conn: Any, executor: str) -> None:
        self._conn = conn
        self._executor = executor
        self._ended = trio.Event()
        self._asked_for = trio.Event()
        self._answered = trio.Event()
        self._sure_at = _now()
        self._doubted_at = -math.inf
        conn.add_termination_listener(lambda _: self._ended.set())

    @property
    def doubtful(self) -> bool:
        """Whether nothing proves that it is ours. Right after this process, or its
        machine, has slept, a peer may have it; ``watch`` finds out within milliseconds."""
        return _now() - self._sure_at > PROBE_LIMIT

    def doubt(self) -> None:
        """Take nothing for proved that was known before now; ``ask`` for a new proof."""
        self._doubted_at = _now()
        self._sure_at = -math.inf

    def ask(self) -> None:
        """Do not wait for the next turn of ``watch``."""
        self._asked_for.set()

    async def wait_sure(self) -> None:
        while self.doubtful:
            await self._answered.wait()

    async def watch(self) -> NoReturn:
        """Raises LeaseLost as soon as the session is gone, or silent for too long."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._probe)
            await self._ended.wait()
            nursery.cancel_scope.cancel()
        raise LeaseLost(
            f"the lease of executor ID {self._executor!r} is lost: the connection to"
            " PostgreSQL broke. All runs were stopped and will be replayed; restart runctld"
        )

    async def _probe(self) -> None:
        silent = 0.0

        async def ask() -> None:
            nonlocal silent
            while True:
                sent = _now()
                try:
                    await aio(self._conn.fetchval)("SELECT 1")
                except Exception as error:
                    log.debug("lease: %r", error)
                    self._ended.set()
                    return
                silent = 0.0
                if sent >= self._doubted_at:
                    self._sure_at = sent
                    self._answered.set()
                    self._answered = trio.Event()
                with trio.move_on_after(PROBE):
                    await self._asked_for.wait()
                self._asked_for = trio.Event()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while silent < PROBE_LIMIT + PROBE:
                # Time in which this process did not run at all is not the server's silence.
                await trio.sleep(_TICK)
                silent += _TICK
            self._ended.set()


def _now() -> float:
    """Seconds, those included in which the machine was asleep, where that can be told."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@asynccontextmanager
async def hold_database_lease(config: Config, executor: str) -> AsyncIterator[Lease]:
    """Hold the executor ID in the shared database.

    Raises: LeaseHeld, naming the holder; ConfigError; Unavailable."""
    async with AsyncExitStack() as stack:
        yield Lease(await _locked(stack, config, executor), executor)


async def _locked(stack: AsyncExitStack, config: Config, executor: str) -> Any:
    """A connection that has the lock, and is closed by ``stack``. One that breaks before it
    has it, as when the server restarts, is replaced: ``connection`` waits for the server."""
    import asyncpg

    name = application_name(LEASE_ROLE, executor)
    deadline = trio.current_time() + config.start_timeout
    while True:
        async with AsyncExitStack() as attempt:
            conn = await attempt.enter_async_context(connection(config, name))
            try:
                await _lock(conn, config, executor)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.debug("lease: %r", error)
                if trio.current_time() > deadline:
                    raise Unavailable(
                        f"PostgreSQL broke the connection for the lease ({error}); see its log"
                    ) from None
                continue
            stack.push_async_exit(attempt.pop_all())
            return conn


async def _lock(conn: Any, config: Config, executor: str) -> None:
    deadline = trio.current_time() + HELD_PATIENCE
    while not await aio(conn.fetchval)(f"SELECT pg_try_advisory_lock({LOCK_KEY})", executor):
        holder = await aio(conn.fetchrow)(_HOLDER, executor)
        # A peer that takes over our runs, or aborts one, is done in a moment.
        peer = holder is not None and (holder["name"] or "").startswith(PEER_ROLE)
        if trio.current_time() > deadline + (config.start_timeout if peer else 0):
            raise LeaseHeld(
                f"executor ID {executor!r} is held by {_holder(holder)};"
                " stop that one, or give this one its own executor_id"
            )
        await trio.sleep(0.05)


def _holder(row: Any) -> str:
    if row is None or not row["name"]:
        return "another session of this database"
    where = f" ({row['address']})" if row["address"] else ""
    return f"{row['name']}{where}"
