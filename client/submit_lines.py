"""Runs submitted as JSON lines: many requests on their way at once, answers in order."""

from __future__ import annotations

import asyncio
import collections
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

from ..protocol import messages
from ..protocol.errors import BadRequest, RequestError, Unavailable, innermost
from ..protocol.model import OnInterrupt, one_line
from .link import Link
from .requests import ask
from .shared_link import SharedLink

#: Requests in flight, and the bytes of their lines: one that is larger is alone.
MOST, MOST_BYTES = 64, 8 * 1024 * 1024
#: For one answer, seconds: the daemon takes a thread's requests one after the other.
TIMEOUT = 60.0


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One run to submit. ``cwd``: below where the batch is submitted from, which it is without
    one."""

    thread: str
    runner: str | None = None
    id: str | None = None
    prompt: str | None = None
    argv: list[str] = []
    cwd: str | None = None
    on_interrupt: OnInterrupt | None = None


class Problem(msgspec.Struct):
    """The answer to a line that was not submitted. ``code``: bad-request, not-found, refused,
    queue-full, busy, error, or unanswered, which means that it may have been submitted. ``line``
    counts from 1."""

    error: str
    code: str
    line: int
    thread: str | None = None
    id: str | None = None


Answer = messages.Submitted | RequestError | Unavailable


@dataclass
class _Sent:
    number: int
    size: int
    line: Line | None
    answer: asyncio.Task[Answer]


_decode = msgspec.json.Decoder(Line).decode


class SubmitLines:
    """Over a connection of ``links``; ``submit`` once. ``ordered``: all requests go to one
    daemon, which takes them in order; else a thread's next line waits for the answer to the one
    before it, since several executors may answer. ``cwd``: what a line's is below; None: it has to
    be absolute. ``check``: raises RequestError of a line that is not to be submitted.

    ``lost``: why daemons stopped answering, after which no more is read; ``unread``: why the rest
    of the lines could not be; each None."""

    def __init__(
        self,
        links: SharedLink,
        *,
        runner: str | None,
        cwd: str | None,
        ordered: bool,
        check: Callable[[Line], None] = lambda _: None,
    ) -> None:
        self._links = links
        self._link: Link
        self._runner = runner
        self._cwd = cwd
        self._ordered = ordered
        self._check = check
        self._sent: collections.deque[_Sent] = collections.deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._read_all = False
        self.lost: Exception | None = None
        self.unread: OSError | None = None
        self._first: asyncio.Task[Answer] | None = None
        #: Of each thread the request that is on its way.
        self._before: dict[str, asyncio.Task[Answer]] = {}
        #: Lines that were read.
        self.number = 0
        self.answered = 0
        self.failed = 0
        self.unanswered = 0

    async def submit(
        self,
        lines: Callable[[int], AsyncIterator[bytes | None]],
        write: Callable[[object], Awaitable[None]],
    ) -> None:
        """Submit the lines of ``lines(most)``, where None stands for one of more than ``most``
        bytes, and ``write`` an answer to each, in order. Lines that cannot be read to their end
        raise OSError, and what was read before is answered. Raises Unavailable."""
        self._link = await self._links.reach()
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(lines(self._link.nc.max_payload), group))
                await self._answer(reader, write)
        except BaseExceptionGroup as several:
            raise innermost(several) from None

    async def _read(self, lines: AsyncIterator[bytes | None], group: asyncio.TaskGroup) -> None:
        """Send the lines, as far as there is room for their answers."""
        try:
            async for data in lines:
                self.number += 1
                if data is not None and not data.strip():
                    continue  # as at the end of many a file
                size = len(data or b"")
                while self._sent and (len(self._sent) >= MOST or self._bytes + size > MOST_BYTES):
                    await self._change()
                self._send(self.number, data, size, group)
        except OSError as error:  # raised at once it would cancel the answers to what was sent
            self.unread = error
        finally:
            self._read_all = True
            self._changed.set()

    def _send(self, number: int, data: bytes | None, size: int, group: asyncio.TaskGroup) -> None:
        line: Line | None = None
        try:
            line = _parsed(data, self._link.nc.max_payload)
            self._check(line)
        except RequestError as error:
            answer = group.create_task(_refused(error))
        else:
            # Until there was one answer, nats-py may send a second request before the first.
            before = [self._first, self._before.get(line.thread)]
            answer = group.create_task(self._ask(line, before))
            self._first = self._first or answer
            if not self._ordered:
                self._before[line.thread] = answer
        self._sent.append(_Sent(number, size, line, answer))
        self._bytes += size
        self._changed.set()

    async def _ask(self, line: Line, before: list[asyncio.Task[Answer] | None]) -> Answer:
        for task in before:
            if task is not None:
                await asyncio.wait([task])
        if self.lost is not None:
            return Unavailable("not sent: runctld went away before")
        request = messages.Submit(
            *(line.thread, line.runner or self._runner, line.id, line.prompt, line.argv),
            line.cwd if self._cwd is None else os.path.join(self._cwd, line.cwd or ""),
            line.on_interrupt,
        )
        try:
            if self._first is asyncio.current_task():  # nothing was sent behind it yet
                return await self._links.use(
                    lambda link: self._submit(link, request), repeatable=False
                )
            return await self._submit(self._link, request)
        except RequestError as error:
            return error
        except Unavailable as error:
            self.lost = self.lost or error
            return error

    async def _submit(self, link: Link, request: messages.Submit) -> messages.Submitted:
        self._link = link
        # What was sent behind it may be queued already: its thread's order counts for more.
        patience = 0.0 if self._ordered else None
        return await ask(link, request, messages.Submitted, timeout=TIMEOUT, patience=patience)

    async def _answer(
        self, reader: asyncio.Task[None], write: Callable[[object], Awaitable[None]]
    ) -> None:
        """Write the answers, in order."""
        while True:
            while not self._sent:
                if self._read_all:
                    return
                await self._change()
            sent = self._sent[0]
            await asyncio.wait([sent.answer])
            await write(self._told(sent))
            self._sent.popleft()
            self._bytes -= sent.size
            if sent.line is not None and self._before.get(sent.line.thread) is sent.answer:
                del self._before[sent.line.thread]
            if self.lost is not None:
                reader.cancel()
            self._changed.set()

    def _told(self, sent: _Sent) -> object:
        answer = sent.answer.result()
        if isinstance(answer, messages.Submitted):
            self.answered += 1
            return {"thread": answer.thread, "run": answer.run, "status": answer.status}
        if isinstance(answer, RequestError):
            self.answered += 1
            self.failed += 1
            code = answer.code
        else:
            self.unanswered += 1
            code = "unanswered"
        line = sent.line
        thread, run = (None, None) if line is None else (line.thread, line.id)
        return Problem(one_line(str(answer)), code, sent.number, thread, run)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def split_lines(blocks: AsyncIterable[bytes], most: int) -> AsyncIterator[bytes | None]:
    """The lines of a text that comes in ``blocks``, as they come; None for one of more than
    ``most`` bytes, which is not kept."""
    kept = bytearray()
    too_long = False
    async for block in blocks:
        *whole, rest = block.split(b"\n")
        for part in whole:
            kept += part
            yield None if too_long or len(kept) > most else bytes(kept)
            kept.clear()
            too_long = False
        kept += rest
        if len(kept) > most:
            kept.clear()
            too_long = True
    if kept or too_long:
        yield None if too_long else bytes(kept)


def _parsed(data: bytes | None, most: int) -> Line:
    """Raises BadRequest."""
    if data is None:
        raise BadRequest(
            f"the line has more than the {most} bytes that NATS takes; put the data in a file and"
            " submit its path"
        )
    try:
        return _decode(data.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError is a ValueError
        raise BadRequest(f"not a run to submit: {one_line(str(error))}") from None


async def _refused(error: RequestError) -> Answer:
    return error
