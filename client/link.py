"""The connection to NATS, how it is made, and requests to JetStream.

A ``Link`` is one connection that is never repaired: when it breaks it is closed, and
whoever needs another dials again. The embedded server may come back on another port,
and a client that was closed for an error cannot be revived; dialling covers both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import connection
from ..config.files import MOST_SECRET
from ..config.schema import Config, ConfigError, Nats
from ..protocol import subjects
from ..protocol.endpoint import ENDPOINT_FILE, Endpoint
from ..protocol.errors import Away, Denied, Unavailable
from .cancellation import give_up

if TYPE_CHECKING:
    from nats.aio.client import Client

CONNECT_TIMEOUT = 2
#: Dialling as a whole: a cluster may have several servers that do not answer.
DIAL_TIMEOUT = 6.0
API_TIMEOUT = 2.0


class NotReady(Exception):
    """JetStream refused a request: its own words. ``code`` is JetStream's error code,
    0 when JetStream did not answer at all."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


def _make_denied(subject: str) -> Denied:
    control = subject.startswith(subjects.CONTROL_PREFIX + ".")
    verb = subject.rpartition(".")[2] if control else "read stored output"
    return Denied(
        f"NATS does not allow this user to {verb}; ask for publish permission on {subject}"
    )


class Impostor(Away):
    """Somebody else answers where the embedded server was. It was told nothing."""


class LinkLost(Unavailable):
    """The connection broke while it was used."""


class Link:
    """One connection. ``closed`` is set once it is gone, for whatever reason."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.closed = asyncio.Event()
        self.nc: Client
        self._first_error: Exception | None = None
        #: What waits for an answer, by its subject in lower case, as refusals have it.
        self._waiting: dict[str, dict[asyncio.Future[bytes], str]] = {}
        #: Why no answer can reach us.
        self._deaf: Denied | None = None

    async def connect(self, nats: Nats, server: str, options: dict[str, Any]) -> None:
        """Connect to ``server``. Raises what nats-py met."""
        self.nc = connection.new_client(nats)
        try:
            await self.nc.connect(
                [server],
                error_cb=self._on_error,
                closed_cb=self._on_closed,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                connect_timeout=CONNECT_TIMEOUT,
                reconnect_time_wait=0,
                ping_interval=10,
                name="runctl",
                **options,
            )
        except Exception as error:
            raise (self._first_error or error) from None

    async def request(
        self, subject: str, payload: bytes, timeout: float, headers: dict[str, str] | None = None
    ) -> bytes:
        """One answer. Raises LinkLost, Denied; nats' NoRespondersError and TimeoutError."""
        if self._deaf is not None:
            raise self._deaf
        asked = self.nc.request(subject, payload, timeout=timeout, headers=headers)
        answer = asyncio.ensure_future(asked)
        lost = asyncio.ensure_future(self.closed.wait())
        refused: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(subject.lower(), {})
        waiting[refused] = subject
        try:
            await asyncio.wait((answer, lost, refused), return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                return refused.result()
            if not answer.done():  # nats-py itself would wait for the time-out
                raise LinkLost("the connection to NATS broke")
            from nats.errors import Error, NoRespondersError

            try:
                return (await answer).data
            except (NoRespondersError, TimeoutError):
                raise
            except (Error, OSError):
                raise LinkLost("the connection to NATS broke") from None
        finally:
            waiting.pop(refused, None)
            if not waiting:
                self._waiting.pop(subject.lower(), None)
            give_up((answer, lost, refused))

    async def _on_error(self, error: Exception) -> None:
        """nats-py tells of refusals here, and leaves the request to its time-out."""
        self._first_error = self._first_error or error
        refused = connection.read_denial(error)
        if refused is None:
            return
        what, subject = refused
        if what == "publish":
            for future, asked in self._waiting.get(subject, {}).items():
                if not future.done():
                    future.set_exception(_make_denied(asked))
        elif subject.startswith(self.config.nats.inbox_prefix.lower() + "."):
            self._deaf = Denied(
                f"NATS does not allow this user to hear answers below"
                f" {self.config.nats.inbox_prefix}: set nats.inbox_prefix to where it may subscribe"
            )
            for future in [f for waiting in self._waiting.values() for f in waiting]:
                if not future.done():
                    future.set_exception(self._deaf)

    async def _on_closed(self) -> None:
        self.closed.set()

    async def api(self, operation: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One JetStream API request, such as "STREAM.INFO.X". Raises NotReady, LinkLost."""
        from nats.errors import NoRespondersError
        from nats.errors import TimeoutError as NatsTimeout

        payload = b"" if body is None else json.dumps(body).encode()
        try:
            raw = await self.request(f"$JS.API.{operation}", payload, API_TIMEOUT)
        except NoRespondersError:
            raise NotReady("JetStream is not enabled, or is starting") from None
        except NatsTimeout:
            raise NotReady("JetStream did not answer in time") from None
        reply: dict[str, Any] = json.loads(raw)
        if "error" in reply:
            error = reply["error"]
            raise NotReady(
                str(error.get("description", error)), int(error.get("err_code", 0)) or -1
            )
        return reply

    async def close(self) -> None:
        """Flush and close; never longer than half a second, never an error."""
        self.closed.set()
        if not hasattr(self, "nc"):  # interrupted before there was one
            return
        from ..config.nats_internals import abandon

        try:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.nc.close(), 0.5)
        finally:
            abandon(self.nc)
            await asyncio.sleep(0)  # then its socket is closed


def _find_server(config: Config) -> tuple[Nats, dict[str, Any]]:
    """Where to connect, and nats-py's options for it. Raises Unavailable."""
    nats = _read_endpoint(config) if config.nats.embedded else config.nats
    if (missing := connection.find_missing_package(nats)) is not None:
        raise Unavailable(missing)
    try:
        return nats, connection.make_options(nats)
    except ConfigError as error:
        raise Unavailable(str(error)) from None


def _read_endpoint(config: Config) -> Nats:
    """Where this user's embedded server is, and how to know it. Raises Unavailable."""
    path = config.state_dir / ENDPOINT_FILE
    try:
        nats = msgspec.json.decode(read_own_file(path), type=Endpoint).nats()
        if nats.certificate:
            connection.pin_certificate(nats.certificate)
    except FileNotFoundError:
        file = config.source or "FILE"
        raise Away(
            f"no runctld has run with state directory {config.state_dir};"
            f" start it with: runctld --config {file}"
        ) from None
    except PermissionError:
        raise Unavailable(
            f"{path} may not be read by this user; run runctl as the user that runs runctld"
        ) from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be used ({error}); restart runctld") from None
    if not nats.certificate:  # and its password is not for whoever has the port by now
        raise Unavailable(
            f"{path} is an older runctld's, whose NATS server cannot prove that it is that;"
            " restart runctld"
        )
    return nats


def read_own_file(path: Path) -> bytes:
    """Its content. Where others may make directories, such as /tmp, one of them could lead
    us to a server of theirs: raises Unavailable. root may use any user's daemon."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        found, user = os.fstat(file.fileno()), os.geteuid()
        owner = found.st_uid
        if user not in (0, owner):
            raise Unavailable(
                f"{path} belongs to user id {owner}, and this is {user};"
                " run runctl as the user that runs runctld"
            )
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no file")
        return file.read(MOST_SECRET)


async def dial(config: Config) -> Link:
    """A new connection. Raises Unavailable, in words for the operator."""
    logging.getLogger("asyncio").addFilter(_is_of_interest)
    nats, options = _find_server(config)
    while True:
        try:
            return await _dial(config, nats, options)
        except Unavailable:
            # A server that was started meanwhile has another password, perhaps another port.
            was, (nats, options) = nats, _find_server(config)
            if nats == was:
                raise


def _is_of_interest(record: logging.LogRecord) -> bool:
    """asyncio warns of nats-py's streams whenever a server closes one that is encrypted, which
    changes nothing."""
    return not str(record.msg).startswith("returning true from eof_received()")


async def _dial(config: Config, nats: Nats, options: dict[str, Any]) -> Link:
    import random

    servers = connection.list_servers(nats)
    random.shuffle(servers)
    problem: Exception = TimeoutError()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DIAL_TIMEOUT):
            # One by one: nats-py gives up at the first that accepts and then is silent.
            for server in servers:
                link = Link(config)
                try:
                    await link.connect(nats, server, options)
                    return link
                except BaseException as error:
                    await link.close()
                    if not isinstance(error, Exception):
                        raise
                    problem = error
                    if connection.explain_refusal(nats, error):
                        break
    raise _make_unavailable(config, nats, problem)


def _make_unavailable(config: Config, nats: Nats, cause: Exception) -> Unavailable:
    refused = connection.explain_refusal(nats, cause)
    if refused is None:
        return Away(_explain(config, nats, cause))
    return Impostor(refused) if connection.is_other_server(nats, cause) else Unavailable(refused)


def _explain(config: Config, nats: Nats, cause: Exception) -> str:
    where = connection.name_servers(nats)
    text = str(cause).removeprefix("nats: ").strip("'\" ") or type(cause).__name__
    if isinstance(cause, ConnectionRefusedError):
        text = f"nothing listens at {where}"
    elif isinstance(cause, TimeoutError | asyncio.TimeoutError):
        if config.nats.embedded:
            return (
                f"{where} does not answer: the embedded NATS server hangs, or somebody else has"
                " its port, who was told nothing; restart runctld"
            )
        text = f"{where} did not answer in time"
    elif isinstance(cause, ConnectionError):
        text = f"{where} closed the connection"
    else:
        text = f"{where}: {text}"
    if config.nats.embedded:
        file = f" --config {config.source}" if config.source else ""
        return f"runctld is not running ({text}); start it with: runctld{file}"
    return f"NATS cannot be reached ({text}); check nats.url"
