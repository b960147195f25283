"""The only file that touches names of nats-py that are private to it, or whose working it does not
promise: it lists, reads and overrides them, for the daemon and the command line alike.

Import it where a client is made: nats-py takes a while. Importing it raises ConfigError, when the
nats-py that is installed lacks one of them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from .connection import EMBEDDED_NAME, NO_TLS
from .private_names import PrivateNames
from .schema import Nats

#: All that is private and in use. Behind what we override stand all arguments.
PRIVATE = PrivateNames(
    "nats-py",
    "nats-py",
    "2.16.0",
    {
        "nats.aio.client": (
            "Client._close(status, do_cbs)",
            "Client._connect_command()",
            "Client._connect_to_server(s)",
            "Client._current_server",
            "Client._flusher_task",
            "Client._ping_interval_task",
            "Client._process_err(err_msg)",
            "Client._process_headers(headers)",
            "Client._process_msg(sid, subject, reply, data, headers)",
            "Client._process_op_err(e)",
            "Client._ps",
            "Client._reading_task",
            "Client._server_info",
            "Client._status",
            "Client._subs",
            "Client._transport",
            "Client.flush(timeout)",
            "Client.options",
            "Client.publish(subject, payload, reply, headers)",
        ),
        "nats.aio.subscription": ("Subscription._wait_for_msgs_task",),
        "nats.aio.transport": (
            "TcpTransport._bare_io_reader",
            "TcpTransport._bare_io_writer",
            "TcpTransport._io_reader",
            "TcpTransport._io_writer",
            "TcpTransport.close()",
            "TcpTransport.connect(uri, buffer_size, connect_timeout)",
            "TcpTransport.connect_tls(uri, ssl_context, buffer_size, connect_timeout)",
        ),
        "nats.protocol.parser": (
            "AWAITING_CONTROL_LINE",
            "Parser.buf",
            "Parser.needed",
            "Parser.parse(data)",
            "Parser.state",
        ),
    },
)
#: And of what the daemon answers requests with, which the command line does not import.
PRIVATE_OF_SERVICES = PrivateNames(
    *("nats-py", "nats-py", "2.16.0"), {"nats.micro.request": ("Request._msg",)}
)
PRIVATE.check()

from nats.aio.client import Client  # noqa: E402
from nats.aio.transport import TcpTransport  # noqa: E402
from nats.errors import Error, FlushTimeoutError, ProtocolError  # noqa: E402
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser  # noqa: E402

if TYPE_CHECKING:
    from nats.micro.request import Request

#: A server's longest line, which is its INFO with the addresses of a cluster; its longest
#: message (NATS has 64 MiB as the highest max_payload, headers on top); and what is kept of its
#: errors.
MOST_LINE = 1024 * 1024
MOST_MESSAGE = 72 * 1024 * 1024
MOST_WORDS = 2000
#: One PING's answer is waited for so long, seconds.
FLUSH = 2


class _BoundedParser(Parser):
    async def parse(self, data: bytes = b"") -> None:
        try:
            await super().parse(data)
        except ProtocolError:
            raise
        except Exception as error:
            raise ProtocolError(f"nats: {error!r}") from None
        line = self.state == AWAITING_CONTROL_LINE
        if (len(self.buf) if line else self.needed) > (MOST_LINE if line else MOST_MESSAGE):
            raise ProtocolError("nats: more is sent than a server may send")


class SturdyClient(Client):
    """nats-py stops reading for good, without a word, at a subject that is not UTF-8 and at
    some headers, which whoever may publish can send us: this reads on. And a flush whose
    answer went with its connection is in vain: this asks again. What does not end as the
    protocol has it, nats-py keeps in memory for as long as it comes: this ends the connection.
    When one breaks while something waits to be sent, nats-py fails at that and tells nobody that
    it is closed: this does."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = _BoundedParser(self)

    async def _connect_to_server(self, s: Any) -> None:
        if self._transport is not None:  # of an attempt that failed: it is only forgotten
            cut_transport(self._transport)
        await super()._connect_to_server(s)

    async def _process_err(self, err_msg: str) -> None:
        await super()._process_err(err_msg[:MOST_WORDS])

    async def _process_op_err(self, e: Exception) -> None:
        # It is of no more use, and its far end may be silent: nobody waits for that one's farewell.
        if not (self.is_closed or self.is_reconnecting) and isinstance(
            self._transport, TcpTransport
        ):
            cut_transport(self._transport)
        await super()._process_op_err(e)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        try:
            await super()._close(status, do_cbs)
        except OSError:  # met as it sent what was waiting, which is dropped by now
            self._status = Client.DISCONNECTED
            await super()._close(status, do_cbs)

    async def flush(self, timeout: int = 10) -> None:
        for left in range(timeout, 0, -FLUSH):
            try:
                return await super().flush(min(FLUSH, left))
            except FlushTimeoutError:
                if left <= FLUSH:
                    raise

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        await super()._process_msg(sid, _as_utf8(subject), _as_utf8(reply), data, headers)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except Exception:  # as if it had none
            return None


def _as_utf8(text: bytes) -> bytes:
    return text if text is None or text.isascii() else text.decode(errors="replace").encode()


class TlsClient(SturdyClient):
    """Says nothing to a server whose first, plain words are that it has no TLS: nats-py would
    go on without."""

    def __init__(self, *, first: bool) -> None:
        """``first``: TLS comes before those words."""
        super().__init__()
        self._tls_first = first

    def _connect_command(self) -> bytes:
        # Of this server: those of one configuration may differ.
        server: Any = self._current_server
        scheme = server.uri.scheme
        first = self._tls_first or scheme == "wss"
        if scheme == "ws" or not (first or self._server_info.get("tls_required")):
            raise Error(NO_TLS)
        return bytes(super()._connect_command())


class EmbeddedClient(SturdyClient):
    """nats-py keeps the addresses and the password that it was given: this asks anew, ``now``,
    at each connection. ``pinned`` makes of a certificate, PEM, what takes that server alone."""

    def __init__(self, now: Callable[[], Nats], pinned: Callable[[str], ssl.SSLContext]) -> None:
        super().__init__()
        self._now = now
        self._transport = _EmbeddedTransport(now, pinned)

    def _connect_command(self) -> bytes:
        login = self._now().login
        assert login is not None
        self.options |= {"user": login.user, "password": login.password}
        return bytes(super()._connect_command())


class _EmbeddedTransport(TcpTransport):
    def __init__(self, now: Callable[[], Nats], pinned: Callable[[str], ssl.SSLContext]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = now
        self._pinned = pinned
        self._nats = now()

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
        self._nats = self._now()
        await super().connect(urlparse(self._nats.url), buffer_size, connect_timeout)

    async def connect_tls(
        self, uri: Any, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        context = self._pinned(self._nats.certificate)
        plain = self._bare_io_reader
        try:
            await super().connect_tls(EMBEDDED_NAME, context, buffer_size, connect_timeout)
        except BaseException as error:
            # Our server says nothing before it was spoken to.
            if isinstance(error, TimeoutError) and plain is not None and await _was_told(plain):
                raise ssl.SSLError(0, "it does not begin with TLS") from None
            raise
        finally:
            if self._io_reader is plain:
                # It is closed, and nobody tells those who would wait for that.
                self._io_reader = self._io_writer = None

    def __bool__(self) -> bool:  # else nats-py makes one of its own
        return True


async def _was_told(reader: asyncio.StreamReader) -> bool:
    """Whether ``reader``, which is of no more use, holds anything."""
    reader.feed_eof()
    return bool(await reader.read(1))


def keep_reconnecting(client: Client) -> None:
    """From here on for ever; what was given to ``connect`` was for the first connection."""
    client.options["max_reconnect_attempts"] = -1


def read_server_version(client: Client) -> str:
    """What the server of the last connection has said that it is, such as 2.11.4; or ""."""
    return str(client._server_info.get("version", ""))


def read_reply_subject(request: Request) -> str:
    """Where the answer is heard; "" where nobody hears it."""
    return request._msg.reply


def publish_now(
    client: Client, subject: str, data: bytes, *, reply: str, headers: dict[str, str]
) -> bool:
    """Put a message into the client's buffer, in asyncio: run at once, here, that costs a third
    less than as a task. False when it would have to wait, since too much waits to be sent.
    Raises nats-py's errors."""
    publish = client.publish(subject, data, reply=reply, headers=headers)
    try:
        publish.send(None)
    except StopIteration:
        return True
    publish.close()
    return False


def cut_transport(transport: Any) -> None:
    """Close its socket at the loop's next turn. A server that does not answer would have TLS
    keep it open for half a minute."""
    if not isinstance(transport, TcpTransport):
        transport.close()
        return
    for writer in (transport._io_writer, transport._bare_io_writer):
        if writer is not None:
            writer.transport.abort()


def abandon(client: Client) -> None:
    """Close its socket and end its tasks, at the loop's next turn. nats-py's ``close`` leaves
    both as they are when it is cut short, as by a server that is stopped; after a whole one
    there is nothing left."""
    if transport := client._transport:
        cut_transport(transport)
    tasks = [client._reading_task, client._ping_interval_task, client._flusher_task]
    tasks += [sub._wait_for_msgs_task for sub in client._subs.values()]
    for task in tasks:
        if task is not None and task is not asyncio.current_task():
            task.cancel()
