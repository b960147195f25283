"""A run's events as a response that goes on until the run's end (server-sent events)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from starlette.types import Receive, Scope, Send

from ..client.run_state import Place
from .access import Watching
from .frames import FAREWELL, HEARTBEAT
from .hub import Hub
from .watcher import Watcher

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep them back
    (b"x-content-type-options", b"nosniff"),
]


class EventStream:
    """An ASGI application for one request, of which ``watching`` hears when it is over."""

    def __init__(self, hub: Hub, thread: str, run: str, place: Place, watching: Watching) -> None:
        self._hub = hub
        self._thread = thread
        self._run = run
        self._place = place
        self._watching = watching

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._hub.open(self._thread, self._run) as channel:
                watcher = Watcher(channel, self._place)
                self._watching.wake = watcher.wake
                channel.watchers.add(watcher)
                gone = asyncio.create_task(wait_disconnect(receive))
                gone.add_done_callback(lambda _: watcher.wake())
                try:
                    await self._serve(watcher, gone, send)
                finally:
                    channel.watchers.discard(watcher)
                    gone.cancel()
        finally:
            self._watching.left()

    async def _serve(self, watcher: Watcher, gone: asyncio.Task[None], send: Send) -> None:
        def write(data: bytes, more: bool = True) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        while not gone.done():
            watcher.clear()
            if self._hub.stopping:
                return await write(FAREWELL, more=False)
            if self._watching.sent_away:
                return await write(b"", more=False)
            if data := watcher.take():
                await write(data, more=not watcher.ended)
            elif watcher.stored:
                await watcher.fetch()
            elif data := watcher.take_lost_end():
                await write(data, more=False)
            elif watcher.take_beat():
                await write(HEARTBEAT)
            else:
                await watcher.wait()
            if watcher.ended:
                return None
        return None


async def wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
