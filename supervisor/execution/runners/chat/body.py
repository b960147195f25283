"""Bytes of an answer -> events.

An answer is an event stream, whatever its content type says, or JSON: a whole completion, an
error, or several documents, where an event stream was asked for. Which of them shows in its
first characters."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import trio

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

#: Longest event, and longest answer that is no event stream: they are held in memory.
MAX_EVENT_CHARS = 4 * 1024 * 1024
MAX_DOCUMENT_CHARS = 16 * 1024 * 1024
#: What is looked at to tell what an answer is: its first line, or so many characters of it.
HEAD_CHARS = 512
DONE = "[DONE]"

_FIELD = re.compile(r"\s*(data|event|id|retry)\s*(:|[\r\n]|$)|\s*:")
#: A line of an event stream that lacks its field's name: the standard has it left out, and
#: an error with it.
_BETWEEN = re.compile(r"\s*(?:data:)?\s*(?=\S)")
_NAMELESS = re.compile(r"(?<=[\r\n])\{")


class TooLong(Exception):
    """What is longer than it may be; the message says which, and how long."""


class Event(NamedTuple):
    """``name``: of an event stream's event, mostly "". ``last``: nothing follows, and its
    end may be missing."""

    name: str
    data: str
    last: bool = False


class Body:
    """One answer's body: a context, and ``look`` comes first. ``heard`` is called for
    whatever comes in."""

    def __init__(self, response: httpx.Response, heard: Callable[[], None]) -> None:
        #: httpx-sse looks at them, and refuses what servers get wrong.
        self.headers = {"content-type": "text/event-stream"}
        self._response = response
        self._heard = heard
        self._texts: AsyncIterator[str]
        #: The beginning, which ``look`` has read.
        self.head = ""
        self._over = False
        #: Whether bytes that are not UTF-8 were replaced.
        self.replaced = False

    async def __aenter__(self) -> Body:
        self._texts = self._decoded()
        return self

    async def __aexit__(self, *why: object) -> None:
        async with unwinding(self._texts):
            pass

    async def look(self) -> Literal["events", "json", "other"]:
        """What it is, as far as its beginning tells."""
        while not self.head.strip() or (
            len(self.head) < HEAD_CHARS and not re.search(r"\S[^\r\n]*[\r\n]", self.head)
        ):
            if len(self.head) >= MAX_EVENT_CHARS:
                raise _too_long()
            try:
                self.head += await anext(self._texts)
            except StopAsyncIteration:
                self._over = True
                break
        start = self.head.lstrip()
        if start.startswith(("{", "[")) and not start.startswith(DONE):
            return "json"
        return "events" if not start or _FIELD.match(start) else "other"

    async def events(self) -> AsyncGenerator[Event, None]:
        """Of an event stream. Raises TooLong, httpx's errors."""
        from httpx_sse import EventSource, ServerSentEvent

        sse: ServerSentEvent
        source: Any = self
        async with unwinding(EventSource(source).aiter_sse()) as found:
            async for sse in found:
                yield Event(sse.event, sse.data, self._over)

    async def aiter_text(self) -> AsyncIterator[str]:
        """For httpx-sse, in which neither lines nor events have a limit. An event ends with
        an empty line, which may be cut anywhere, and which the last one may lack."""
        size, end = 0, "\n"
        async with unwinding(self._all()) as parts:
            async for part in parts:
                seen = end + part
                last = max(seen.rfind(mark) for mark in ("\n\n", "\r\r", "\n\r\n"))
                size = size + len(part) if last < 0 else len(seen) - last
                if size > MAX_EVENT_CHARS:
                    raise _too_long()
                if "{" in part:
                    yield _NAMELESS.sub("data: {", end[-1:] + part)[1:]
                else:
                    yield part
                end = seen[-2:]
        self._over = True
        yield "\n\n"

    async def documents(self) -> AsyncGenerator[Event, None]:
        """Of JSON, or JSON and an event stream's marks. Raises TooLong, httpx's errors."""
        parts, size = [], 0
        async with unwinding(self._all()) as found:
            async for part in found:
                parts.append(part)
                size += len(part)
                if size > MAX_DOCUMENT_CHARS:
                    most = MAX_DOCUMENT_CHARS // 1024**2
                    raise TooLong(f"the answer is longer than {most} MiB")
        self._over = True
        for data in _documents("".join(parts)):
            yield Event("", data, True)

    async def _all(self) -> AsyncIterator[str]:
        if self.head:
            yield self.head
        async with unwinding(self._texts) as texts:
            async for text in texts:
                yield text

    async def _decoded(self) -> AsyncIterator[str]:
        """UTF-8, whatever the header says, without its byte order mark."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        first = True
        async with unwinding(self._response.aiter_bytes()) as parts:
            async for part in parts:
                self._heard()
                try:
                    text = decoder.decode(part)
                except UnicodeDecodeError:
                    held = decoder.getstate()[0]
                    decoder = codecs.getincrementaldecoder("utf-8")("replace")
                    text, self.replaced = decoder.decode(held + part), True
                if text:
                    yield text.removeprefix("\ufeff") if first else text
                    first = False
        try:
            rest = decoder.decode(b"", True)
        except UnicodeDecodeError:
            rest, self.replaced = "\ufffd", True
        if rest:
            yield rest


def _documents(text: str) -> Iterator[str]:
    decoder = json.JSONDecoder()
    at = 0
    while match := _BETWEEN.match(text, at):
        at = match.end()
        if text.startswith(DONE, at):
            yield DONE
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = len(text)  # whoever reads it finds out what is wrong with it
        yield text[at:end]
        at = end


def _too_long() -> TooLong:
    return TooLong(f"an event of the stream is longer than {MAX_EVENT_CHARS // 1024**2} MiB")


@asynccontextmanager
async def unwinding(body: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Leaves nothing of ``body`` suspended. It is a chain of generators that httpx does
    not close from the outside in (aclose() reaches the outermost only, and trio warns of
    the others): a cancelled read ends them all from the inside out."""
    try:
        yield body
    finally:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                async for _ in body:
                    pass
            except Exception:
                pass  # what the rest of the body held no longer matters
