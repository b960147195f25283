"""A command's output, from one or two descriptors, in the order in which it comes.

Two pipes have no common order: the kernel says which of them had something first since we
looked last, and nothing about what is in them by now. So both are read by one task, in the
kernel's order, and in small steps while both have something.
"""

from __future__ import annotations

import array
import fcntl
import os
import selectors
import termios
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from ....protocol.records import StreamName
from .protocol import Emit

READ_SIZE = 64 * 1024
#: One read while another source has something, too: what a program writes at once, mostly.
STEP = 4096


class Source(Protocol):
    """Output that comes through ``fd``. ``held``: the beginning of a UTF-8 character whose rest is
    to come. ``waits``: there is something to read, whatever ``fd`` says. ``backlog``: how many
    bytes there are to read now."""

    name: StreamName
    fd: int
    held: bytes

    @property
    def waits(self) -> bool: ...

    @property
    def backlog(self) -> int: ...

    def read(self, most: int) -> bytes | None:
        """Up to ``most`` bytes; None when there is nothing now, b"" at the end."""
        ...


class PipeSource:
    """Of ``fd``, a pipe's read end, which is made non-blocking."""

    waits = False

    def __init__(self, name: StreamName, fd: int) -> None:
        os.set_blocking(fd, False)
        self.name = name
        self.fd = fd
        self.held = b""

    @property
    def backlog(self) -> int:
        return count_readable(self.fd)

    def read(self, most: int) -> bytes | None:
        try:
            return os.read(self.fd, most)
        except BlockingIOError:
            return None


def count_readable(fd: int) -> int:
    """How many bytes a pipe, or a terminal, holds for its reader."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:  # a terminal that nobody writes to any more
        return 0
    return count[0]


@dataclass(eq=False)
class _Drain:
    """``goals``: how much of each source is to be passed on."""

    goals: dict[int, int]
    done: trio.Event = field(default_factory=trio.Event)


class Flow:
    """``run`` in a nursery, then ``close``. ``total``: bytes read. ``emitting``: what was read
    is being passed on, and nothing is read meanwhile.

    Raises OSError, when there is no descriptor left."""

    def __init__(self, sources: Sequence[Source], emit: Emit) -> None:
        self.total = 0
        self.emitting = False
        self._emit = emit
        self._sources = sources
        self._open = len(sources)
        # Its order is the kernel's: what had something first comes first.
        self._selector = selectors.DefaultSelector()
        for source in sources:
            self._selector.register(source.fd, selectors.EVENT_READ, source)
        self._finished = False
        self._waiting = trio.CancelScope()
        self._moved: trio.Event | None = None
        #: Bytes of each source, by its descriptor, that were read, and that were passed on.
        self._read = dict.fromkeys([source.fd for source in sources], 0)
        self._passed = dict(self._read)
        self._drains: list[_Drain] = []

    @property
    def open(self) -> bool:
        """Whether somebody may still write."""
        return self._open > 0

    async def moved(self) -> None:
        """Wait until something is read, was passed on, or has ended."""
        if self._moved is None:
            self._moved = trio.Event()
        await self._moved.wait()

    async def drain(self) -> None:
        """Returns when all that was written before is passed on, half characters too."""
        if not self._open:
            return
        drain = _Drain({x.fd: self._read[x.fd] + x.backlog for x in self._sources})
        self._drains.append(drain)
        self._waiting.cancel()
        await drain.done.wait()

    def finish(self) -> None:
        """Whoever wrote is gone: what is there now is the rest, whoever holds the other end."""
        self._finished = True
        self._waiting.cancel()

    def close(self) -> None:
        self._selector.close()

    async def run(self) -> None:
        """Each read is a chunk; returns at the end of all sources, or after ``finish``."""
        while self._open:
            await trio.lowlevel.checkpoint()
            ready: list[Source] = [source for source in self._sources if source.waits]
            ready = ready or [key.data for key, _ in self._selector.select(0)]
            if ready:
                size = READ_SIZE if len(ready) == 1 else STEP
                for source in ready:
                    if await self._take(source, size):
                        self._selector.unregister(source.fd)
            elif self._finished:
                break
            elif not self._drains:
                with trio.CancelScope() as self._waiting:
                    await trio.lowlevel.wait_readable(self._selector)
            if self._drains:
                await self._end_drains(idle=not ready)
        for source in self._sources:  # those that had no end
            await self._pass_on(source.name, source.held)
        self._open = 0
        await self._end_drains(idle=True)
        self._tell()

    async def _end_drains(self, *, idle: bool) -> None:
        """``idle``: there was nothing to read."""
        for drain in list(self._drains):
            if idle or all(self._passed[fd] >= goal for fd, goal in drain.goals.items()):
                for source in self._sources:
                    held, source.held = source.held, b""
                    await self._pass_on(source.name, held)
                self._drains.remove(drain)
                drain.done.set()

    async def _take(self, source: Source, size: int) -> bool:
        """Whether it was the end."""
        data = source.read(size)
        if data is None:
            return False
        if not data:
            self._open -= 1
            held, source.held = source.held, b""
            await self._pass_on(source.name, held)
            return True
        read = len(data)
        self.total += read
        self._read[source.fd] += read
        data = source.held + data
        cut = incomplete_tail(data)
        source.held = data[len(data) - cut :]
        await self._pass_on(source.name, data[: len(data) - cut])
        self._passed[source.fd] += read
        return False

    async def _pass_on(self, name: StreamName, data: bytes) -> None:
        self._tell()
        if data:
            self.emitting = True
            try:
                await self._emit(name, data)
            finally:
                self.emitting = False
            self._tell()

    def _tell(self) -> None:
        if self._moved is not None:
            self._moved.set()
            self._moved = None


def incomplete_tail(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character whose rest is missing (0 to 3)."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        need = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if need > back and byte < 0xF8 else 0
    return 0
