"""Reads of a stream over HTTP: what is stored at once, a long poll, and server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...client.events import End
from ...protocol import json_text
from ...protocol.errors import BadRequest, Unavailable
from ..access import Watching
from ..event_stream import wait_disconnect
from ..frames import FAREWELL, HEARTBEAT
from ..hub import Hub
from ..problems import HttpProblem
from ..service import Service, read_text
from ..tail import Tail
from ..tokens import Caller
from .content import Content
from .offsets import BEGINNING, NOW, Position, make_cursor, read_offset
from .reading import Page, Reader, find_cursor, read_stored

#: Seconds until a long poll is answered without data, and until an event stream is ended, so
#: that its client comes anew: clients and proxies expect both.
POLL, CONNECTION = 15.0, 60.0
#: What every answer has. Output may be secret: only its owner may keep it, and asks each time.
COMMON = {"x-content-type-options": "nosniff", "cross-origin-resource-policy": "same-origin"}
KEPT, NOT_KEPT = {"cache-control": "private, no-cache"}, {"cache-control": "no-store"}


class Asked(NamedTuple):
    """What a read asks for. ``position`` None: where the stream ends now."""

    position: Position | None
    live: str | None
    cursor: str | None


@dataclass(frozen=True, slots=True)
class Source:
    """A stream: the run that it is the output of, and its ``tail``, None where nothing is stored.
    ``lost``: its end, where nothing is stored any more. ``headers``: what else is said of it."""

    thread: str
    run: str
    content: Content
    tail: Tail | None
    lost: End | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def closed(self) -> bool:
        tail = self.tail
        return self.lost is not None or (tail is not None and self.content.is_closed(tail.record))

    @property
    def end(self) -> Position:
        """Where it ends now."""
        if self.lost is not None:
            return Position(self.content.tell_lost_end(self.lost, BEGINNING.place).place)
        if self.tail is None:
            return BEGINNING
        return self.content.find_end(self.tail)


def read_asked(request: Request) -> Asked:
    """Raises BadRequest, HttpProblem."""
    live, offset = read_text(request, "live"), read_text(request, "offset")
    if live not in (None, "long-poll", "sse"):
        raise BadRequest("live is long-poll or sse; leave it out for what is stored")
    if live is not None and offset is None:
        raise BadRequest("a live read needs offset: -1 for the beginning, now for the end")
    position = None if offset == NOW else BEGINNING if offset is None else read_offset(offset)
    return Asked(position, live, read_text(request, "cursor"))


async def answer_read(
    service: Service, request: Request, caller: Caller, source: Source, asked: Asked
) -> Response | ASGIApp:
    """Raises HttpProblem, Unavailable."""
    if request.method == "HEAD":
        headers = _headers(source.content, source.end, False, source.closed)
        return Response(headers={**NOT_KEPT, **headers, **source.headers})
    if asked.live == "sse":
        return EventAnswer(service, source, asked, service.access.watch(caller))
    if asked.position is None:
        page = Page(source.end, complete=True, ended=source.closed)
    else:
        page = await _read_page(service, source, asked.position)
    if asked.live is None or page.messages or not page.complete:
        keep = NOT_KEPT if asked.position is None else KEPT
        return _answer_page(request, source.content, asked, page, keep)
    if page.ended:
        return _answer_nothing(source.content, asked, page)
    return LongPoll(service, request, source, asked, service.access.watch(caller))


async def _read_page(service: Service, source: Source, start: Position) -> Page:
    """Raises Unavailable."""
    tail = source.tail
    if tail is not None:
        return await service.links.use(lambda link: read_stored(link, tail, start, source.content))
    page = Page(start, complete=True)
    if source.lost is not None:
        told = source.content.tell_lost_end(source.lost, start.place)
        page = Page(Position(told.place), told.messages, complete=True, ended=True)
    return page


def _answer_page(
    request: Request, content: Content, asked: Asked, page: Page, keep: dict[str, str]
) -> Response:
    headers = {**keep, **_headers(content, page.position, page.complete, page.ended)}
    if asked.live is not None and not page.ended:
        headers["stream-cursor"] = make_cursor(asked.cursor)
    if asked.position is not None:
        mark = f"{asked.position.offset}:{page.position.offset}{':c' if page.ended else ''}"
        headers["etag"] = f'"{mark}"'
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
    return Response(content.encode(page.messages), 200, headers)


def _headers(content: Content, position: Position, complete: bool, ended: bool) -> dict[str, str]:
    headers = {
        **COMMON,
        "content-type": content.media_type,
        "stream-next-offset": position.offset,
    }
    if complete:
        headers["stream-up-to-date"] = "true"
    if ended:
        headers["stream-closed"] = "true"
    return headers


class LongPoll:
    """An ASGI application for one request of a reader that has all that is stored: answered when
    there is more, or nothing for a while."""

    def __init__(
        self, service: Service, request: Request, source: Source, asked: Asked, watching: Watching
    ) -> None:
        self._hub = service.hub
        self._request = request
        self._source = source
        self._asked = asked
        self._watching = watching

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        source, start = self._source, self._asked.position or self._source.end
        page = Page(start, complete=True)
        try:
            with self._hub.open(source.thread, source.run) as channel:
                cursor = source.tail.sequence - 1 if source.tail else 0
                reader = Reader(channel, start, cursor, source.content)
                live = Live(self._hub, reader, self._watching, receive)
                channel.watchers.add(reader)
                try:
                    async with asyncio.timeout(POLL):
                        page = await live.next_page() or page
                except TimeoutError:
                    pass
                finally:
                    channel.watchers.discard(reader)
                    live.close()
        finally:
            self._watching.left()
        await self._answer(page)(scope, receive, send)

    def _answer(self, page: Page) -> Response:
        if page.messages:
            return _answer_page(self._request, self._source.content, self._asked, page, KEPT)
        return _answer_nothing(self._source.content, self._asked, page)


def _answer_nothing(content: Content, asked: Asked, page: Page) -> Response:
    """Of a long poll: there was no more."""
    headers = {**NOT_KEPT, **_headers(content, page.position, True, page.ended)}
    del headers["content-type"]
    headers["stream-cursor"] = make_cursor(asked.cursor)
    return Response(status_code=204, headers=headers)


class Live:
    """Who waits for what comes, until the client leaves or is sent away."""

    def __init__(self, hub: Hub, reader: Reader, watching: Watching, receive: Receive) -> None:
        self._hub = hub
        self._reader = reader
        self._watching = watching
        watching.wake = reader.wake
        self.gone = asyncio.create_task(wait_disconnect(receive))
        self.gone.add_done_callback(lambda _: reader.wake())

    def close(self) -> None:
        self.gone.cancel()

    @property
    def leaves(self) -> bool:
        return self.gone.done() or self._hub.stopping or self._watching.sent_away

    async def next_page(self, beat: Callable[[Page], bool] = lambda _: False) -> Page | None:
        """The next that holds something, or that ``beat`` wants as it is; None: it is over."""
        reader = self._reader
        while True:
            reader.clear()
            if self.leaves:
                return None
            page = reader.take_page()
            if page.messages or page.ended or beat(page):
                return page
            if reader.stored:
                await reader.fetch()
            else:
                await reader.wait()


class EventAnswer:
    """An ASGI application for one request: server-sent events, each with where the reader stands
    behind it."""

    def __init__(self, service: Service, source: Source, asked: Asked, watching: Watching) -> None:
        self._service = service
        self._source = source
        self._asked = asked
        self._watching = watching

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        source = self._source
        try:
            with self._service.hub.open(source.thread, source.run) as channel:
                reader = Reader(
                    channel,
                    self._asked.position or source.end,
                    await self._find_cursor(),
                    source.content,
                )
                live = Live(self._service.hub, reader, self._watching, receive)
                channel.watchers.add(reader)
                try:
                    await self._serve(reader, live, send)
                finally:
                    channel.watchers.discard(reader)
                    live.close()
        finally:
            self._watching.left()

    async def _find_cursor(self) -> int:
        tail, position = self._source.tail, self._asked.position
        if tail is None:
            return 0
        if position is None:
            return tail.sequence - 1
        try:
            return await find_cursor(await self._service.links.dial(), tail.subject, position)
        except Unavailable:  # the reader searches for it
            return 0

    async def _serve(self, reader: Reader, live: Live, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        content = self._source.content
        await send({"type": "http.response.start", "status": 200, "headers": self._make_headers()})
        told = False  # that nothing is left, or where it stands

        def wants(page: Page) -> bool:
            return (page.complete and not told) or reader.take_beat()

        try:
            async with asyncio.timeout(CONNECTION):
                while (page := await live.next_page(wants)) is not None:
                    if page.messages or page.ended or (page.complete and not told):
                        told = page.complete
                        await write(self._encode(content, page), more=not page.ended)
                        if page.ended:
                            return
                    else:
                        await write(HEARTBEAT)
        except (TimeoutError, HttpProblem):  # the latter is told to who comes again
            pass
        await write(FAREWELL if self._service.hub.stopping else b"", more=False)

    def _encode(self, content: Content, page: Page) -> bytes:
        """Both events at once: there are clients that take one for the end of a read."""
        control: dict[str, object] = {"streamNextOffset": page.position.offset}
        if page.ended:
            control["streamClosed"] = True
        else:
            control["streamCursor"] = make_cursor(self._asked.cursor)
        if page.complete:
            control["upToDate"] = True
        data = b""
        if page.messages:
            data = b"event: data\n%s\n" % content.encode_event(page.messages)
        return data + b"event: control\ndata:%s\n\n" % json_text.encode(control)

    def _make_headers(self) -> list[tuple[bytes, bytes]]:
        headers = {
            **COMMON,
            "cache-control": "no-cache, no-store",
            "content-type": "text/event-stream",
            "x-accel-buffering": "no",  # nginx would keep them back
        }
        if self._source.content.event_encoding is not None:
            headers["stream-sse-data-encoding"] = self._source.content.event_encoding
        return [(name.encode(), value.encode()) for name, value in headers.items()]
