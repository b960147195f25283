"""One connection of HTTP/1.1, within bounds: uvicorn's, with limits that it does not have."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .problems import TYPE, encode_problem

#: Of a request's head: bytes, and seconds until it is complete.
MOST_HEAD, HEAD_LIMIT = 32 * 1024, 10.0
#: What is left of a body that nobody waits for any more has so long, seconds.
REST_LIMIT = 30.0
#: A client that takes nothing of what it is sent for so long is cut off, seconds.
STUCK = 60.0
#: Bytes of answers that clients have not taken yet, of all connections that wait for theirs.
MOST_UNSENT = 128 * 1024 * 1024


class Unsent:
    """What waits for clients that are slow. Where it is more than MOST_UNSENT, those are cut off
    that have waited longest: whoever watches comes back and goes on."""

    def __init__(self) -> None:
        self._total = 0
        self._sizes: dict[Connection, int] = {}

    def add(self, connection: Connection, size: int) -> None:
        self._sizes[connection] = size
        self._total += size
        while self._total > MOST_UNSENT:
            slowest = next(iter(self._sizes))
            self.remove(slowest)
            slowest.cut_off()

    def remove(self, connection: Connection) -> None:
        self._total -= self._sizes.pop(connection, 0)


class Connection(HttpToolsProtocol):
    """``most``: how many there may be; one more is told so, and closed. ``unsent`` is of all."""

    most = 4096
    unsent = Unsent()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Whether a head is awaited, or begun; and whether a body is.
        self._in_head = self._in_body = False
        #: Bytes that have come since any of them was part of a body, or completed a head or body.
        self._pending = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._stuck_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(503, f"there are {self.most} connections already; try again later")
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._rest_timer, self._stuck_timer):
            if timer is not None:
                timer.cancel()
        self.unsent.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._pending += len(data)
        super().data_received(data)
        if self._pending <= MOST_HEAD or self.transport.is_closing():
            return
        if self._in_head:
            self._refuse(431, f"the head of the request has more than {MOST_HEAD} bytes")
        else:
            self.transport.abort()  # trailers, or what stands beside chunks, without an end

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer, which nobody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body, self._pending = False, True, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._pending = False, 0
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and self.cycle.response_complete:
            self._rest_timer = self.loop.call_later(REST_LIMIT, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request that can be read", "bad-request")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_timer = self.loop.call_later(STUCK, self.cut_off)
        self.unsent.add(self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unsent.remove(self)
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()

    def cut_off(self) -> None:
        """At once: else the kernel would keep what it has for the client for many minutes."""
        with contextlib.suppress(OSError):
            plain = self.transport.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _await_head(self) -> None:
        self._in_head = True
        self._head_timer = self.loop.call_later(HEAD_LIMIT, self._end_slow)

    def _end_slow(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, f"the head of the request was not there within {HEAD_LIMIT:g} s")

    def _refuse(self, status: int, detail: str, code: str = "limit") -> None:
        """Answer without an application, and close."""
        self._in_head = False
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer is on its way, and another would be part of it
            return
        body = encode_problem(status, code, detail)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
