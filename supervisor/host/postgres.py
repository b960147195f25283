"""Connections of our own to PostgreSQL, beside DBOS's pool.

The URL is libpq's, as DBOS reads it; asyncpg gets the same host, login and TLS settings.
What asyncpg would ignore although it guards the connection is refused. No message ever
holds the URL: it may carry a password.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import trio
import trio_asyncio

from ...config.outgoing import key_log_problem
from ...config.schema import Config
from ...protocol.errors import ConfigError, Unavailable
from . import asyncpg_internals

log = logging.getLogger("runctld.postgres")
aio = trio_asyncio.aio_as_trio

#: The server notices a client that vanished without a FIN after about 10 s. A client
#: notices the server's absence earlier (``lease.Lease.watch``).
SESSION = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "idle_session_timeout": "0",
    "statement_timeout": "0",
    "lock_timeout": "0",
    # A session with another sees what was stored when it asked for a lock, not when it got it,
    # and has writes refused beside those of others.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
}
_SET_SESSION = "; ".join(f"SET {name} = '{value}'" for name, value in SESSION.items())
#: The same from the client's side, in libpq's words.
KEEPALIVES = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
#: How the sessions of DBOS's pool are called.
DBOS_NAME = "dbos_transact"
RETRY = 0.2

_HERE = ("host", "port", "user", "password", "dbname", "passfile")
_TLS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl")
_TLS_VERSIONS = ("ssl_min_protocol_version", "ssl_max_protocol_version")
#: Guards of libpq that asyncpg does not know, and the values that ask for nothing.
_GUARDS = {
    "channel_binding": ("disable", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "require_auth": ("",),
    "requirepeer": ("",),
    "sslcrldir": ("",),
    "sslcertmode": ("allow", "disable"),
    "sslnegotiation": ("postgres",),
}


def lease_key(config: Config) -> str:
    """The key of the URL that the sessions with locks use."""
    return "database.lease_url" if config.database.lease_url else "database.url"


def settings(config: Config, key: str) -> dict[str, Any]:
    """``asyncpg.connect``'s arguments for the URL of ``key``. Raises ConfigError."""
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    url = getattr(config.database, key.removeprefix("database."))
    where = f"{config.source or 'the configuration'}: {key}"
    try:
        given = {k: str(v) for k, v in conninfo_to_dict(url).items() if v is not None}
    except ProgrammingError as error:
        # libpq quotes the piece it stumbled over, which may be of the password.
        reason = str(error).split('"')[0].strip().rstrip(":")
        raise ConfigError(
            f"{where}: {reason or 'is not a valid URL'};"
            " write postgresql://USER:PASSWORD@HOST:PORT/NAME?sslmode=verify-full"
        ) from None
    if not given.get("dbname"):
        raise ConfigError(f"{where}: names no database; end it with /NAME")
    if "," in given.get("host", ""):
        raise ConfigError(f"{where}: names several hosts; name one")
    for guard, harmless in _GUARDS.items():
        if given.get(guard, harmless[0]) not in harmless:
            raise ConfigError(
                f"{where}: {guard}={given[guard]} is not supported on all"
                " connections; remove it, and use sslmode=verify-full"
            )
    found = {k: given[k] for k in _HERE if k in given}
    tls = {k: given[k] for k in (*_TLS, *_TLS_VERSIONS) if k in given}
    arguments: dict[str, Any] = {
        "database": found.pop("dbname"),
        "timeout": float(given.get("connect_timeout") or 10),
        "server_settings": {},
    }
    if tls.get("sslrootcert") == "system":  # libpq's word for the system's authorities
        if tls.get("sslmode", "verify-full") != "verify-full":
            raise ConfigError(f"{where}: sslrootcert=system needs sslmode=verify-full")
        try:
            arguments["ssl"] = ssl.create_default_context()
        except OSError as error:
            raise _key_log(error) or error from None
        tls.clear()
    if "port" in found:
        found["port"] = int(found["port"])  # type: ignore[assignment]
    # asyncpg reads files and TLS modes from a DSN only; the login goes beside it, so
    # that nothing in it needs quoting.
    if tls:
        arguments["dsn"] = f"postgresql://?{urlencode(tls)}"
    return {**arguments, **found}


def _key_log(error: OSError) -> ConfigError | None:
    problem = key_log_problem(error)
    return ConfigError(f"{problem.said}: {problem.fix}") if problem is not None else None


def engine_arguments(config: Config) -> dict[str, Any]:
    """SQLAlchemy's arguments for DBOS's pool: a server that vanished without a word is noticed
    as on the connections of our own. What the URL says goes before."""
    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(config.database.url)
    wanted = {"application_name": DBOS_NAME, "connect_timeout": 10, **KEEPALIVES}
    return {"connect_args": {k: v for k, v in wanted.items() if k not in given}}


def application_name(role: str, executor: str) -> str:
    """How a session is named in pg_stat_activity: 63 bytes, the ID's end is cut first."""
    return f"{role} pid {os.getpid()} on {socket.gethostname()[:24]}: {ascii(executor)[1:-1]}"[:63]


def keep_alive(conn: Any) -> int:
    """The descriptor of ``conn``'s socket, of which a broken connection is known within 5 s."""
    sock = asyncpg_internals.socket_of(conn)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sock.family != socket.AF_UNIX:
        for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4)):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return int(sock.fileno())


def broken_off() -> tuple[type[Exception], ...]:
    """What comes of a connection that breaks while it is used, or is refused something. The
    last is asyncpg's own confusion, when the end comes amid one of its steps."""
    import asyncpg

    return OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError


async def connect(
    config: Config, name: str, *, patience: float | None = None, key: str | None = None
) -> Any:
    """A connection whose session is called ``name``. Tries for ``patience`` seconds
    (default: start_timeout). ``key``: of its URL, by default ``lease_key``.

    Raises: ConfigError for a login or certificate that is refused, Unavailable."""
    key = key or lease_key(config)
    # Reads certificates.
    arguments = await trio.to_thread.run_sync(settings, config, key, abandon_on_cancel=True)
    arguments["server_settings"]["application_name"] = name
    limit = config.start_timeout if patience is None else patience
    place = f"{arguments.get('host', 'the default host')}/{arguments['database']}"
    problem = "no answer"
    with trio.move_on_after(limit):
        while True:
            try:
                return await aio(_connect)(arguments)
            except _refusals() as error:
                # A server that is not up has no socket there.
                if isinstance(error, FileNotFoundError) and _is_socket(arguments):
                    problem = _line(error)
                    await trio.sleep(RETRY)
                    continue
                raise ConfigError(
                    f"PostgreSQL at {place} refuses this {key}: {_line(error)}"
                ) from None
            except broken_off() as error:  # OSError has TimeoutError in it
                problem = _line(error)
                log.debug("connect: %s", problem)
            await trio.sleep(RETRY)
    raise Unavailable(
        f"PostgreSQL at {place} cannot be reached within {limit:g} s ({problem});"
        f" is it running, is {key} right, and has a pooler in between sessions left?"
    )


def _is_socket(arguments: dict[str, Any]) -> bool:
    return str(arguments.get("host", "")).startswith("/")


async def _connect(arguments: dict[str, Any]) -> Any:
    import asyncpg

    try:
        conn = await asyncpg.connect(**arguments)
        try:
            # Not as parameters of the connection: PgBouncer refuses those that it does not know.
            await conn.execute(_SET_SESSION)
        except BaseException:
            conn.terminate()
            raise
        return conn
    except asyncio.CancelledError:
        raise
    except (ValueError, asyncpg.ClientConfigurationError) as error:
        if isinstance(error, ssl.SSLError):
            raise
        raise _BadUrl(_line(error)) from None
    except OSError as error:
        if "rejected SSL" in str(error):  # the server has none: waiting does not help
            raise _BadUrl(_line(error)) from None
        raise _key_log(error) or error from None


class _BadUrl(Exception):
    pass


def _refusals() -> tuple[type[Exception], ...]:
    import asyncpg

    return (
        _BadUrl,
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InsufficientPrivilegeError,
        ssl.SSLCertVerificationError,
        FileNotFoundError,
        PermissionError,
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


@asynccontextmanager
async def connection(
    config: Config, name: str, *, patience: float | None = None, key: str | None = None
) -> AsyncIterator[Any]:
    """``connect`` as a context; closing takes at most a second."""
    conn = await connect(config, name, patience=patience, key=key)
    try:
        yield conn
    finally:
        with trio.move_on_after(1, shield=True) as scope:
            try:
                await aio(conn.close)()
            except Exception as error:
                log.debug("close: %r", error)
        if scope.cancelled_caught:
            conn.terminate()


@asynccontextmanager
async def transaction(conn: Any) -> AsyncIterator[None]:
    """One of ``conn``, which is useless after an error."""
    begun = conn.transaction()
    await aio(begun.start)()
    try:
        yield
    except BaseException:
        conn.terminate()
        raise
    await aio(begun.commit)()


async def check_sessions(config: Config, conn: Any, name: str) -> None:
    """See that ``conn``, and what DBOS's pool gets, are sessions of their own in the same
    database.

    Raises ConfigError, Unavailable, and asyncpg's errors."""
    await _refuse_pool(config, conn, name, lease_key(config))
    if not config.database.lease_url:
        return
    key = "database.url"
    async with connection(config, name, key=key) as other:
        await _refuse_pool(config, other, name, key)
        # What one holds, the other does not get: in any other database, or on a standby, it does.
        lock = secrets.randbits(63)
        async with transaction(conn), transaction(other):
            await aio(conn.execute)("SELECT pg_advisory_xact_lock($1)", lock)
            got = await aio(other.fetchval)("SELECT pg_try_advisory_xact_lock($1)", lock)
    if got:
        raise ConfigError(
            f"{config.source or 'the configuration'}: database.lease_url leads to another database"
            " than database.url: both must end at the same database of the same server"
        )


async def _refuse_pool(config: Config, conn: Any, name: str, key: str) -> None:
    """See that ``conn`` is a session of its own. Behind a pooler in transaction or statement mode
    its server session, and with it a lock, is anybody's: a second connection that is in the midst
    of a transaction then has it, or makes the first one change to another."""
    import asyncpg

    try:
        mine = await _backend(conn)
        async with AsyncExitStack() as stack:
            for _ in range(POOL_LOOKS):
                other = await stack.enter_async_context(connection(config, name, key=key))
                await stack.enter_async_context(transaction(other))
                if await aio(other.fetchval)(_BACKEND) == mine or await _backend(conn) != mine:
                    raise _pooled(config, key)
    except (
        asyncpg.InvalidSQLStatementNameError,
        asyncpg.DuplicatePreparedStatementError,
    ):
        raise _pooled(config, key) from None
    except broken_off() as error:
        if "statement pooling mode" in str(error):
            raise _pooled(config, key) from None
        raise


_BACKEND = "SELECT pg_backend_pid()"
#: So many connections hold a transaction at most: a pool that hands its own out in turn has
#: given the first one's away, or cannot give it back.
POOL_LOOKS = 3


async def _backend(conn: Any) -> int:
    async with transaction(conn):
        return int(await aio(conn.fetchval)(_BACKEND))


def _pooled(config: Config, key: str) -> ConfigError:
    why = (
        "the executor ID is a lock of a session"
        if key == lease_key(config)
        else "DBOS has locks, settings and prepared statements in them"
    )
    return ConfigError(
        f"{config.source or 'the configuration'}: {key} leads through a pooler that shares its"
        f" sessions, such as PgBouncer in transaction mode, and {why}: connect directly, or set"
        " pool_mode = session for this database"
    )
