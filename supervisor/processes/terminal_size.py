"""Whose size a run's terminal has: that of the first client attached from a terminal.

A client is known by its inbox, to which it is subscribed as long as it lives. NATS says
at once when nobody is subscribed to a subject, so a client that died without a word is
found out by asking. There is no event for its death: while others wait for its place,
the first one is asked every so often.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

import trio
import trio_asyncio

from ...protocol.errors import BadRequest

if TYPE_CHECKING:
    from nats.aio.client import Client

    from ...protocol import messages

aio = trio_asyncio.aio_as_trio

MOST = 10_000
#: Clients that a run remembers; who comes later watches without a say.
MAX_CLIENTS = 1000
ASK_EVERY = 2.0
ASK_TIMEOUT = 0.5
#: Nothing but an inbox: we send to it, with our own permissions.
_INBOX = re.compile(r"_INBOX(\.[A-Za-z0-9_-]+)+")


class Size(NamedTuple):
    columns: int
    rows: int


DEFAULT = Size(80, 24)

#: Whether somebody is subscribed to the subject.
Alive = Callable[[str], Awaitable[bool]]
#: Clients in order of arrival: inbox, columns, rows.
Clients = list[tuple[str, int, int]]
#: So many of them, the first, are known to the next daemon when a run outlives this one.
MOST_KEPT = 20


class Window:
    """One run's. ``size`` is what is in force, ``apply`` is told each new one."""

    def __init__(self, alive: Alive) -> None:
        self.size = DEFAULT
        self.apply: Callable[[Size], None] | None = None
        self._keep: Callable[[Clients], Awaitable[None]] | None = None
        self._alive = alive
        self._clients: dict[str, Size] = {}  # in order of arrival
        self._lock = trio.Lock()
        self._several = trio.Event()
        self._watching = trio.CancelScope()

    async def announce(self, client: str, size: Size) -> Size:
        """A client has this size now. What is in force then."""
        async with self._lock:
            if client in self._clients or len(self._clients) < MAX_CLIENTS:
                self._clients[client] = size
            await self._settle(trusted=client)
            await self._tell()
            return self.size

    def restore(self, clients: Clients) -> None:
        """Who was there when the daemon before us died: they do not say it again, since the run
        goes on for them."""
        self._clients = {client: Size(columns, rows) for client, columns, rows in clients}
        self.size = next(iter(self._clients.values()), self.size)
        if len(self._clients) > 1:
            self._several.set()

    async def keep_for_next(self, keep: Callable[[Clients], Awaitable[None]]) -> None:
        """Have ``keep`` told from now on, and at once of who came before."""
        async with self._lock:
            self._keep = keep
            if self._clients:
                await self._tell()

    async def _tell(self) -> None:
        if self._keep is not None:
            await self._keep([(x, *size) for x, size in list(self._clients.items())[:MOST_KEPT]])

    async def leave(self, client: str) -> Size:
        async with self._lock:
            self._clients.pop(client, None)
            await self._settle()
            await self._tell()
            return self.size

    async def watch(self) -> None:
        """See to it that a dead client does not keep the first place, until ``close``."""
        with self._watching:
            while True:
                await self._several.wait()
                await trio.sleep(ASK_EVERY)
                async with self._lock:
                    before = len(self._clients)
                    await self._settle()
                    if len(self._clients) != before:
                        await self._tell()

    def close(self) -> None:
        self.apply = self._keep = None
        self._watching.cancel()

    async def _settle(self, trusted: str | None = None) -> None:
        """Drop dead clients from the front, and take the first one's size. ``trusted``
        has just shown that it lives; a lone client has nobody to make room for."""
        while len(self._clients) > 1:
            first = next(iter(self._clients))
            if first == trusted or await self._alive(first):
                break
            del self._clients[first]
        if len(self._clients) > 1:
            self._several.set()
        elif self._several.is_set():
            self._several = trio.Event()
        size = next(iter(self._clients.values()), self.size)
        if size != self.size:
            self.size = size
            if self.apply is not None:
                self.apply(size)


def check_size(r: messages.Resize) -> Size | None:
    """The size in a request, None when its client leaves. Raises BadRequest."""
    if len(r.client) > 200 or not _INBOX.fullmatch(r.client):
        raise BadRequest("client must be a NATS inbox that the client is subscribed to")
    if r.columns == r.rows == 0:
        return None
    if not (1 <= r.columns <= MOST and 1 <= r.rows <= MOST):
        raise BadRequest(f"columns and rows must be 1 to {MOST}, or both 0 to leave")
    return Size(r.columns, r.rows)


def make_alive_check(client: Client) -> Alive:
    """Asks over this connection. Only NATS's word that nobody listens counts as death."""

    async def alive(inbox: str) -> bool:
        from nats.errors import Error, NoRespondersError

        try:
            await aio(client.request)(inbox, b"", ASK_TIMEOUT)
        except NoRespondersError:
            return False
        except (Error, TimeoutError):  # it need not answer; or we are cut off ourselves
            pass
        return True

    return alive
