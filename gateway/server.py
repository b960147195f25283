"""The server: it listens, serves until it is told to stop, and then tells those who watch."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from ..client.cancellation import end_tasks
from ..client.patience import WAIT, Patience
from ..client.shared_link import SharedLink
from ..config.integrations import split_listen
from ..config.schema import Config
from ..protocol.errors import ConfigError, Unavailable
from .access import Access
from .app import Application
from .change_feed import ChangeFeed
from .connections import Connection, Unsent
from .cors import allow_origins
from .hub import Hub
from .service import Service
from .systemd_notify import Notifier

log = logging.getLogger("runctl.gateway")

#: Seconds: an idle connection is kept, as a node client's pool expects; requests may go on after
#: the word to stop.
KEEP_ALIVE, GRACE = 75, 3
BACKLOG = 1024
#: Bytes that the kernel keeps for a client to whom they cannot be sent yet; else it is megabytes.
MOST_QUEUED = 128 * 1024


def listen(address: str) -> socket.socket:
    """Raises ConfigError, Unavailable."""
    host, port = split_listen(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MOST_QUEUED)
            found.bind(place)
            found.listen(BACKLOG)
        except BaseException:
            found.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(
                f"another program listens on {address}; end it, or choose another address with"
                " gateway.listen or --listen"
            ) from None
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror or error}; use an address of this machine"
        ) from None
    return found


async def serve(config: Config, address: str, listener: socket.socket, access: Access) -> None:
    """Until SIGTERM or SIGINT."""
    hub, changes = Hub(config), ChangeFeed(config)
    links = SharedLink(config, Patience(config, WAIT))
    service = Service(config, links, hub, access, changes)
    application = Application(service)
    settings = uvicorn.Config(
        allow_origins(application, config.gateway.origins),
        http=_bound(config.gateway.max_connections),
        ws="none",
        lifespan="off",
        loop="asyncio",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
        backlog=BACKLOG,
    )
    hub.start()
    notifier, stops = Notifier(), [hub.stop, changes.stop, application.stop]
    beside = [asyncio.create_task(access.follow_tokens()), asyncio.create_task(notifier.beat())]
    try:
        await _Server(settings, stops, notifier, address).serve([listener])
    finally:
        await end_tasks(beside)
        await changes.close()
        await hub.close()
        await links.close()


def _bound(most_connections: int) -> type[Connection]:
    class Bound(Connection):
        most = most_connections
        unsent = Unsent()

    return Bound


class _Server(uvicorn.Server):
    """Whoever watches or waits is told as soon as it is to stop, by calling all of ``stops``: the
    server waits for their answers."""

    def __init__(
        self,
        config: uvicorn.Config,
        stops: Sequence[Callable[[], None]],
        notifier: Notifier,
        address: str,
    ) -> None:
        super().__init__(config)
        self._stops = stops
        self._notifier = notifier
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("ready: http://%s/", self._address)
        self._notifier.tell("READY=1", f"STATUS=http://{self._address}/")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self._notifier.tell("STOPPING=1")
        for stop in self._stops:
            stop()
        self.should_exit = True
