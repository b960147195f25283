"""The daemon's end of the connection to its keeper: numbered requests and their answers, and
descriptors beside them."""

from __future__ import annotations

import contextlib
import errno
from typing import Any, NamedTuple

import trio

from ...protocol.errors import Unavailable
from .keeper_messages import encode, take_messages
from .message_socket import TOO_MANY, make_rights


class KeeperLost(Unavailable):
    """The keeper is gone, and with it all knowledge of its processes."""

    def __init__(self, why: str | None = None) -> None:
        gone = "the process keeper is gone; restart runctld, which clears up after it"
        super().__init__(why or gone)


class Origin(NamedTuple):
    """Of the keeper: its process id, the version of the daemon that started it, and the number of
    the last message that it had of an earlier daemon."""

    pid: int
    version: str
    last: int


NOWHERE = Origin(0, "", 0)


class KeeperLink:
    """``gone``: the keeper is dead, or let go of at our end; ``stopped`` says why, when it was we
    who killed it. ``last``: the number of the last message that it had of an earlier daemon."""

    def __init__(self, sock: trio.socket.SocketType, last: int = 0) -> None:
        self.sock = sock
        self.gone = False
        self.stopped: str | None = None
        self._lock = trio.Lock()
        self._last = last
        self._waiting: dict[int, trio.Event] = {}
        self._replies: dict[int, dict[str, Any]] = {}
        self._buffer = bytearray()

    def next_number(self) -> int:
        self._last += 1
        return self._last

    async def tell(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """A message without an answer. A keeper that is gone is told nothing."""
        with contextlib.suppress(KeeperLost):
            async with self._lock:
                with trio.CancelScope(shield=True):
                    await self.send(encode(message), fds)

    async def post(
        self, number: int, message: dict[str, Any], fds: tuple[int, ...] = ()
    ) -> trio.Event:
        """Send ``message``; what is set when its answer is there. When this is cancelled
        nothing was sent. Raises KeeperLost."""
        data = encode({**message, "id": number, "fds": len(fds)})
        event = self._waiting[number] = trio.Event()
        try:
            async with self._lock:
                with trio.CancelScope(shield=True):  # half a message would garble the next
                    await self.send(data, fds)
        except BaseException:
            self.forget_request(number)
            raise
        return event

    def take_answer(self, number: int) -> dict[str, Any]:
        """Raises KeeperLost."""
        if number not in self._replies:
            raise KeeperLost(self.stopped)
        return self._replies[number]

    def forget_request(self, number: int) -> None:
        self._waiting.pop(number, None)
        self._replies.pop(number, None)

    async def send(self, data: bytes, fds: tuple[int, ...]) -> None:
        try:
            while True:
                if self.gone:
                    raise KeeperLost(self.stopped)
                try:
                    sent = await self.sock.sendmsg([data], make_rights(fds))
                    break
                except OSError as error:
                    if error.errno != errno.ETOOMANYREFS:
                        raise
                    await trio.sleep(TOO_MANY)  # too many descriptors under way: let it take some
            while sent < len(data):
                sent += await self.sock.send(data[sent:])
        except (BrokenPipeError, ConnectionError, trio.ClosedResourceError) as error:
            raise KeeperLost(self.stopped) from error

    def note_received(self, rest: bytes) -> None:
        """What came before we had the connection, and was not taken."""
        self._buffer += rest

    async def receive(self) -> list[dict[str, Any]] | None:
        """What has come since; None when the keeper is gone."""
        if messages := take_messages(self._buffer):
            return messages
        try:
            data = await self.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        self._buffer += data
        return take_messages(self._buffer)

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Raises KeeperLost."""
        number = self.next_number()
        try:
            await (await self.post(number, message)).wait()
            return self.take_answer(number)
        finally:
            self.forget_request(number)

    def answer(self, number: int, message: dict[str, Any]) -> None:
        """``message`` has come for whoever has asked so."""
        if number in self._waiting:
            self._replies[number] = message
            self._waiting[number].set()

    def mark_lost(self) -> None:
        """Let nobody wait for a keeper that is gone."""
        self.gone = True
        for event in self._waiting.values():
            event.set()
