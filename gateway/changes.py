"""/v1/changes: which threads have changed, as server-sent events."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..protocol import json_text
from .access import Watching, require
from .change_feed import ChangeFeed, Listener
from .event_stream import HEADERS, wait_disconnect
from .frames import FAREWELL, HEARTBEAT
from .service import Service, caller_of

#: Seconds: at most one event in this time; until a sign of life.
PAUSE, BEAT = 0.25, 15.0


class Changes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def of_threads(self, request: Request) -> Response | ChangeStream:
        caller = caller_of(request)
        require(caller, "read")
        if request.method == "HEAD":
            return Response(headers={k.decode(): v.decode() for k, v in HEADERS})
        return ChangeStream(self._service.changes, self._service.access.watch(caller))


class ChangeStream:
    """An ASGI application for one request."""

    def __init__(self, feed: ChangeFeed, watching: Watching) -> None:
        self._feed = feed
        self._watching = watching

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._feed.open() as listener:
                self._watching.wake = listener.changed.set
                gone = asyncio.create_task(wait_disconnect(receive))
                gone.add_done_callback(lambda _: listener.changed.set())
                try:
                    await self._serve(listener, gone, send)
                finally:
                    gone.cancel()
        finally:
            self._watching.left()

    async def _serve(self, listener: Listener, gone: asyncio.Task[None], send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await write(self._take(listener))
        while not gone.done():
            try:
                async with asyncio.timeout(BEAT):
                    await listener.changed.wait()
            except TimeoutError:
                await write(HEARTBEAT)
                continue
            if gone.done():
                return
            if self._feed.stopping or self._watching.sent_away:
                await write(FAREWELL if self._feed.stopping else b"", more=False)
                return
            if data := self._take(listener):
                await write(data)
            await asyncio.sleep(PAUSE)

    def _take(self, listener: Listener) -> bytes:
        """One frame of what has changed; b"" for nothing that the caller may see."""
        threads, listener.threads = listener.threads, set()
        listener.changed.clear()
        if threads is None:
            value: dict[str, list[str] | None] = {"threads": None}
        else:
            seen = sorted(filter(self._watching.caller.may_see, threads))
            if not seen:
                return b""
            value = {"threads": seen}
        return b"event: changed\ndata: %s\n\n" % json_text.encode(value)
