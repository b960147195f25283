"""A listener that answers GET, in trio: for those who look at the daemon, not for work."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable

import h11
import trio

from ..config.outside import split_listen
from .errors import ConfigError, Unavailable

log = logging.getLogger("runctld.metrics")

#: Seconds for a whole request and its answer.
LIMIT = 10.0
MOST = 32

#: Path to (status, content type, body).
Answer = Callable[[str], Awaitable[tuple[int, str, bytes]]]


async def listen(address: str, key: str) -> list[trio.SocketListener]:
    """``address`` is HOST:PORT, the value of ``key``. Raises ConfigError, Unavailable."""
    host, port = split_listen(address)
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(
                f"{key}: another program listens on {address}; end it, or choose another port"
            ) from None
        why = error.strerror or str(error)
        raise ConfigError(
            f"{key}: cannot listen on {address}: {why}; use an address of this machine"
        ) from None


async def serve(listeners: list[trio.SocketListener], answer: Answer) -> None:
    """Until cancelled."""
    open_now = 0

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal open_now
        async with stream:
            if open_now >= MOST:
                return
            open_now += 1
            try:
                with trio.move_on_after(LIMIT):
                    await _one(stream, answer)
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as error:
                log.debug("request: %r", error)
            except OSError as error:
                log.debug("request: %r", error)
            finally:
                open_now -= 1

    await trio.serve_listeners(handle, listeners)


async def _one(stream: trio.SocketStream, answer: Answer) -> None:
    """One request, one answer: a scrape comes every few seconds."""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)
    request = None
    while True:
        try:
            event = http.next_event()
        except h11.RemoteProtocolError as error:
            await _send(stream, http, error.error_status_hint, "text/plain", b"bad request\n")
            return
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(16 * 1024))
        elif isinstance(event, h11.Request):
            request = event
            break
        else:
            return
    if request.method not in (b"GET", b"HEAD"):
        await _send(stream, http, 405, "text/plain", b"only GET is answered\n")
        return
    path = request.target.split(b"?", 1)[0].decode("ascii", "replace")
    status, kind, body = await answer(path)
    await _send(stream, http, status, kind, body, head=request.method == b"HEAD")


async def _send(
    stream: trio.SocketStream,
    http: h11.Connection,
    status: int,
    kind: str,
    body: bytes,
    head: bool = False,
) -> None:
    headers = [
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    data = http.send(h11.Response(status_code=status, headers=headers)) or b""
    if not head:
        data += http.send(h11.Data(data=body)) or b""
    await stream.send_all(data + (http.send(h11.EndOfMessage()) or b""))
    await stream.send_eof()
