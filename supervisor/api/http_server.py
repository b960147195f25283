"""A listener that answers GET, in trio: for those who look at the daemon, not for work."""

from __future__ import annotations

import errno
import logging
import math
import re
from collections.abc import Awaitable, Callable

import h11
import trio

from ...config.integrations import is_loopback, split_listen
from ...protocol.errors import ConfigError, Unavailable

log = logging.getLogger("runctld.metrics")

#: Seconds for the head of a request, and for all with its answer.
HEAD_LIMIT, LIMIT = 3.0, 10.0
#: Connections at once: a new one takes the place of the oldest that has asked for nothing yet.
MOST = 32
#: Between two lines in the log that say so, seconds.
SELDOM = 60.0

#: A Host header: an address in brackets, or what is before the port.
_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:]*))(?::[0-9]*)?")

#: Path, and what the one Authorization header says (b"" for none), to (status, content type, body).
Answer = Callable[[str, bytes], Awaitable[tuple[int, str, bytes]]]


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
    """Until cancelled. Of a listener on loopback only requests to loopback are answered: a page
    in somebody's browser may have a name of its own for this address."""
    idle: dict[trio.CancelScope, None] = {}  # the oldest first
    open_now, said = 0, -SELDOM

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal open_now, said
        async with stream:
            if open_now >= MOST:
                if trio.current_time() - said >= SELDOM:
                    said = trio.current_time()
                    log.warning("%d connections at once: those that ask nothing are closed", MOST)
                if not idle:
                    return
                oldest = next(iter(idle))
                del idle[oldest]
                oldest.cancel()
            open_now += 1
            try:
                with trio.move_on_after(LIMIT), trio.CancelScope() as scope:
                    scope.deadline = trio.current_time() + HEAD_LIMIT
                    idle[scope] = None

                    def asked() -> None:
                        scope.deadline = math.inf
                        idle.pop(scope, None)

                    try:
                        await _one(stream, answer, asked)
                    finally:
                        idle.pop(scope, None)
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as error:
                log.debug("request: %r", error)
            except OSError as error:
                log.debug("request: %r", error)
            finally:
                open_now -= 1

    await trio.serve_listeners(handle, listeners)


async def _one(stream: trio.SocketStream, answer: Answer, asked: Callable[[], None]) -> None:
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
    asked()
    if not _meant(stream, request):
        words = b"this is a loopback address: ask for it by 127.0.0.1, [::1] or localhost\n"
        await _send(stream, http, 421, "text/plain", words)
        return
    if request.method not in (b"GET", b"HEAD"):
        await _send(stream, http, 405, "text/plain", b"only GET is answered\n")
        return
    path = request.target.split(b"?", 1)[0].decode("ascii", "replace")
    shown = [value for name, value in request.headers if name == b"authorization"]
    status, kind, body = await answer(path, shown[0] if len(shown) == 1 else b"")
    await _send(stream, http, status, kind, body, head=request.method == b"HEAD")


def _meant(stream: trio.SocketStream, request: h11.Request) -> bool:
    """Whether its Host is loopback, if that is where it came in."""
    if not is_loopback(str(stream.socket.getsockname()[0])):
        return True
    hosts = [value.decode("ascii", "replace") for name, value in request.headers if name == b"host"]
    return all(is_loopback(_HOST.sub(r"\1\2", host)) for host in hosts)


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
    if status == 401:
        headers.append(("WWW-Authenticate", 'Bearer realm="runctl"'))
    data = http.send(h11.Response(status_code=status, headers=headers)) or b""
    if not head:
        data += http.send(h11.Data(data=body)) or b""
    await stream.send_all(data + (http.send(h11.EndOfMessage()) or b""))
    await stream.send_eof()
