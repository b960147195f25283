"""The daemon's connection to NATS: made within ``start_timeout``, reconnected for ever.

What cannot become right by waiting (credentials, certificates, permissions) ends the
start at once, in words for the operator.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
import trio_asyncio

from ...config import connection
from ...config.schema import Config, Nats
from ...protocol.endpoint import Endpoint
from ...protocol.errors import ConfigError, RunctlError, Unavailable
from ...protocol.subjects import ADVISORIES, LEAST_PAYLOAD

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("runctld.nats")
aio = trio_asyncio.aio_as_trio

#: One attempt at all servers, seconds.
DIAL_TIMEOUT = 8.0


class Connection:
    """``client`` is there once the connection is made."""

    def __init__(
        self,
        config: Config,
        executor: str,
        endpoint: Callable[[], Endpoint] | None,
    ) -> None:
        """``executor``: who NATS is told that we are. ``endpoint``: says where the embedded
        server is by now; None for an external one."""
        #: Called in asyncio each time the connection breaks, and when it is there again.
        self.on_break: list[Callable[[], object]] = []
        self.on_return: list[Callable[[], object]] = []
        self._config = config
        self._endpoint = endpoint
        self._name = f"runctld {executor}"
        self._problems: list[Exception] = []
        self._starting = True
        self._closing = False
        self._fatal: RunctlError | None = None
        self._failed = trio.Event()
        self._dialling: trio.CancelScope
        self.client: Client

    @property
    def _nats(self) -> Nats:
        return self._config.nats if self._endpoint is None else self._endpoint().nats()

    async def open(self) -> None:
        """Raises ConfigError, when waiting is of no use, and Unavailable."""
        await trio.to_thread.run_sync(_check_nats, abandon_on_cancel=True)
        with trio.move_on_after(self._config.start_timeout):
            while True:
                if await self._dial():
                    return self._check_size()
                await trio.sleep(0.05)
        reason = f" ({self._describe_problem()})" if self._problems else ""
        raise Unavailable(
            f"NATS at {connection.name_servers(self._nats)} cannot be reached within"
            f" {self._config.start_timeout:g} s{reason}; is it running?"
        )

    def _check_size(self) -> None:
        """Raises ConfigError, when a record of output might not get through."""
        least, most = LEAST_PAYLOAD, self.client.max_payload
        if most < least:
            raise ConfigError(
                f"NATS at {connection.name_servers(self._nats)} takes messages of {most} bytes at"
                f" most, and output needs {least}: raise max_payload in its configuration"
            )

    async def _dial(self) -> bool:
        nats = self._nats
        # Reads files, of certificates and keys.
        options: dict[str, Any] = await trio.to_thread.run_sync(
            connection.make_options, nats, abandon_on_cancel=True
        )
        self._problems = []
        client = connection.new_client(nats, self._endpoint and (lambda: self._nats))
        connected = False
        # Bounded, since nats-py waits for ever after some errors of TLS.
        with trio.move_on_after(DIAL_TIMEOUT) as self._dialling:
            try:
                await aio(client.connect)(
                    connection.list_servers(nats),
                    name=self._name,
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    allow_reconnect=True,
                    max_reconnect_attempts=1,  # of each server, until we are connected
                    reconnect_time_wait=0.05,
                    connect_timeout=2,
                    ping_interval=10,
                    pending_size=64 * 1024 * 1024,
                    **options,
                )
                connected = True
            except Exception as error:
                self._note(error)
        from ...config.nats_internals import abandon, keep_reconnecting

        if connected:
            keep_reconnecting(client)
            self.client = client
            return True
        abandon(client)  # nats-py leaves its socket open
        if self._fatal is not None:
            raise self._fatal
        log.debug("connect: %r", self._problems)
        return False

    def _describe_problem(self) -> str:
        first = self._problems[0]
        if isinstance(first, TimeoutError):
            return "no answer in time; if it begins with TLS, set nats.tls_first"
        return str(first).removeprefix("nats: ") or type(first).__name__

    def started(self) -> None:
        """All subscriptions are made, and the server has confirmed them. From here on a
        refusal is a warning. Raises ConfigError, if there was one."""
        if self._fatal is not None:
            raise self._fatal
        self._starting = False

    async def watch(self) -> None:
        """Raises what makes the connection useless: Unavailable, ConfigError."""
        await self._failed.wait()
        assert self._fatal is not None
        raise self._fatal

    async def close(self) -> None:
        self._closing = True
        with trio.move_on_after(1, shield=True):
            try:
                await aio(self.client.close)()
            except (Exception, asyncio.CancelledError) as error:
                # The latter comes from tasks of its own that it has cancelled: a wish of
                # ours to cancel is trio's, and comes as such.
                log.debug("close: %r", error)

    async def ask_server(self, limit: float) -> None:
        """Returns when the server has answered; raises when it does not within ``limit``
        seconds."""
        if not self.client.is_connected:  # nats-py's flush returns at once then
            raise ConnectionError("not connected")
        await aio(self.client.flush)(round(limit))
        if not self.client.is_connected:
            raise ConnectionError("the connection broke")

    async def _on_disconnected(self) -> None:
        for hear in self.on_break:
            hear()

    async def _on_reconnected(self) -> None:
        for hear in self.on_return:
            hear()

    async def _on_error(self, error: Exception) -> None:
        log.debug("nats: %r", error)
        refused = connection.read_denial(error)
        if refused == ("subscribe", ADVISORIES.lower()):  # without them one looks now and then
            log.debug("JetStream's advisories are not for this user")
        elif refused is not None:
            words = (
                f"NATS at {connection.name_servers(self._nats)} does not allow this user to"
                f" {refused[0]} on {refused[1]}: give it the daemon's permissions, see docs/nats.md"
            )
            if self._starting:
                self._fail(ConfigError(words))
            else:
                log.warning("%s", words)
        elif not hasattr(self, "client"):
            self._note(error)

    def _note(self, error: Exception) -> None:
        """Why we are not connected yet."""
        self._problems.append(error)
        why = connection.explain_refusal(self._nats, error)
        if why is not None and self._endpoint is None:
            self._fail(ConfigError(why))
            self._dialling.cancel()

    async def _on_closed(self) -> None:
        """nats-py closes for good on errors of the protocol, and when credentials expire."""
        if not self._closing and hasattr(self, "client"):
            why = str(self.client.last_error or "no reason given").removeprefix("nats: ")
            self._fail(Unavailable(f"NATS closed the connection ({why}); start runctld again"))

    def _fail(self, error: RunctlError) -> None:
        if self._fatal is None:
            self._fatal = error
            self._failed.set()


def _check_nats() -> None:
    """Raises ConfigError, when the nats-py that is installed lacks what is used of it."""
    from ...config.nats_internals import PRIVATE_OF_SERVICES

    PRIVATE_OF_SERVICES.check()


@asynccontextmanager
async def connect(
    config: Config,
    executor: str,
    endpoint: Callable[[], Endpoint] | None,
) -> AsyncIterator[Connection]:
    """A connection, closed at the end. Raises ConfigError, Unavailable."""
    made = Connection(config, executor, endpoint)
    await made.open()
    try:
        yield made
    finally:
        await made.close()
