"""The connection to NATS, and requests to the daemon and to JetStream.

A ``Link`` is one connection that is never repaired: when it breaks it is closed, and
whoever needs another dials again. The embedded server may come back on another port,
and a client that was closed for an error cannot be revived; dialling covers both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..config.schema import Config
from ..supervisor import wire
from ..supervisor.errors import BadRequest, RequestError, Unavailable
from .hedge import first_answer

if TYPE_CHECKING:
    from nats.aio.client import Client

R = TypeVar("R", bound=wire.Reply)

CONNECT_TIMEOUT = 2
#: Dialling as a whole: a cluster may have several servers that do not answer.
DIAL_TIMEOUT = 6.0
REQUEST_TIMEOUT = 15.0
#: On top of the configured grace between TERM and KILL.
ABORT_TIMEOUT = 120.0
API_TIMEOUT = 2.0


class NotReady(Exception):
    """JetStream refused a request: its own words. ``code`` is JetStream's error code,
    0 when JetStream did not answer at all."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class LinkLost(Unavailable):
    """The connection broke while it was used."""


class Link:
    """One connection. ``closed`` is set once it is gone, for whatever reason."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.closed = asyncio.Event()
        self.nc: Client

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """One answer. Raises LinkLost; nats' NoRespondersError and TimeoutError."""
        answer = asyncio.ensure_future(self.nc.request(subject, payload, timeout=timeout))
        lost = asyncio.ensure_future(self.closed.wait())
        try:
            await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
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
            answer.cancel()
            lost.cancel()

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
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.nc.close(), 0.5)


def _servers(config: Config) -> tuple[list[str], dict[str, Any]]:
    """Where to connect, and as whom. Raises Unavailable."""
    if not config.nats.embedded:
        servers = [url.strip() for url in config.nats.url.split(",") if url.strip()]
        credentials = config.nats.credentials
        return servers, {} if credentials is None else {"user_credentials": str(credentials)}
    path = config.state_dir / wire.ENDPOINT_FILE
    try:
        endpoint = msgspec.json.decode(path.read_bytes(), type=wire.Endpoint)
    except FileNotFoundError:
        file = config.source or "FILE"
        raise Unavailable(
            f"no runctld has run with state directory {config.state_dir};"
            f" start it with: runctld --config {file}"
        ) from None
    except PermissionError:
        raise Unavailable(
            f"{path} may not be read by this user; run runctl as the user that runs runctld"
        ) from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be used ({error}); restart runctld") from None
    return [endpoint.url], {"user": endpoint.user, "password": endpoint.password}


async def dial(config: Config) -> Link:
    """A new connection. Raises Unavailable, in words for the operator."""
    # nats-py and asyncio log tracebacks of what is reported here in one line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("nats").setLevel(logging.CRITICAL + 1)
    servers, options = _servers(config)
    from nats.aio.client import Client

    link = Link(config)
    link.nc = Client()
    problems: list[Exception] = []

    async def on_error(error: Exception) -> None:
        problems.append(error)

    async def on_closed() -> None:
        link.closed.set()

    try:
        await asyncio.wait_for(
            link.nc.connect(
                servers,
                error_cb=on_error,
                closed_cb=on_closed,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                connect_timeout=CONNECT_TIMEOUT,
                reconnect_time_wait=0,
                ping_interval=10,
                name="runctl",
                **options,
            ),
            DIAL_TIMEOUT,
        )
    except BaseException as error:
        await link.close()  # also when cancelled: nobody else knows of it
        if not isinstance(error, Exception):
            raise
        cause = problems[0] if problems else error
        raise Unavailable(_why(config, servers, cause)) from None
    return link


def _why(config: Config, servers: list[str], cause: Exception) -> str:
    from ..config.load import hide_secrets

    where = ", ".join(hide_secrets(server) for server in servers)
    text = str(cause).removeprefix("nats: ").strip("'\" ") or type(cause).__name__
    if "authorization" in text.lower() or "authentication" in text.lower():
        if config.nats.embedded:
            return f"NATS at {where} is not this runctld's server; restart runctld"
        return f"NATS at {where} refused the credentials; check nats.url and nats.credentials"
    if isinstance(cause, FileNotFoundError | PermissionError) and cause.filename is not None:
        return f"{cause.filename}: {cause.strerror}; check nats.credentials"
    if isinstance(cause, ModuleNotFoundError):
        return f"credentials files need another package; install it: pip install {cause.name}"
    if isinstance(cause, ConnectionRefusedError):
        text = f"nothing listens at {where}"
    elif isinstance(cause, TimeoutError | asyncio.TimeoutError):
        text = f"{where} did not answer in time"
    else:
        text = f"{where}: {text}"
    if config.nats.embedded:
        file = f" --config {config.source}" if config.source else ""
        return f"runctld is not running ({text}); start it with: runctld{file}"
    return f"NATS cannot be reached ({text}); check nats.url"


def _verb(request: wire.Request) -> str:
    return str(type(request).__struct_config__.tag)


async def ask(
    link: Link, request: wire.Request, expect: type[R], *, executor: str | None = None
) -> R:
    """The daemon's answer; any executor's, or the named one's. Raises Unavailable, and what
    the daemon named: BadRequest, NotFound, Refused, RequestError."""
    from nats.errors import NoRespondersError
    from nats.errors import TimeoutError as NatsTimeout

    try:
        payload = wire.encode(request)
    except (UnicodeEncodeError, ValueError):
        raise BadRequest("an argument is not valid UTF-8; use UTF-8 text") from None
    most = link.nc.max_payload
    if len(payload) > most:
        raise BadRequest(
            f"the request has {len(payload)} bytes, NATS takes {most};"
            " put the data in a file and submit its path"
        )
    verb = _verb(request)
    if isinstance(request, wire.Abort | wire.Purge):
        timeout = ABORT_TIMEOUT + 2 * link.config.queue.stop_grace
    else:
        timeout = REQUEST_TIMEOUT
    reads = verb in ("list", "locate", "show", "status")
    unsure = "" if reads else "; it may have taken effect, see: runctl list"
    try:
        subject = wire.control_subject(verb, executor)
        if reads and executor is None:
            answer = await first_answer(lambda left: link.request(subject, payload, left), timeout)
        else:
            answer = await link.request(subject, payload, timeout)
        reply = wire.decode_reply(answer)
    except NoRespondersError:
        if executor is not None:
            raise Unavailable(
                f"executor {executor} does not answer (NATS does); it starts, or is to be started"
            ) from None
        raise Unavailable(
            "runctld is not running (NATS is, but no daemon answers on it); start runctld"
        ) from None
    except NatsTimeout:
        raise Unavailable(f"runctld did not answer within {timeout:g} s{unsure}") from None
    except LinkLost as error:
        raise LinkLost(f"runctld went away before it answered{unsure}") from error
    if isinstance(reply, wire.Problem):
        wire.raise_problem(reply)
    if not isinstance(reply, expect):
        raise RequestError(
            f"runctld answered {verb!r} with {type(reply).__name__};"
            " install the same version of runctl and runctld"
        )
    return reply


async def ask_once(config: Config, request: wire.Request, expect: type[R]) -> R:
    """``ask`` over a connection of its own."""
    link = await dial(config)
    try:
        return await ask(link, request, expect)
    finally:
        await link.close()
