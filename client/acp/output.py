"""What the bridge writes, and the checkpoints between, in one order; the loop is not held up."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from typing import Any

from ...protocol.errors import BadRequest
from .. import run

STDOUT, STDERR = 1, 2
#: The agent is not read while more than this is waiting to be written, bytes.
MOST = 256 * 1024


class Output:
    """``pump`` in a task. Writing is waited for by whoever calls ``wait_for_room`` or ``drain``."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, bytes] | bytes] = deque()
        self._waiting = 0
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._inside = True

    def write(self, fd: int, text: str) -> None:
        """Half a surrogate pair, which JSON can hold, is no text."""
        data = text.encode(errors="replace")
        self._items.append((fd, data))
        self._waiting += len(data)
        self._wake.set()

    def say(self, text: str) -> None:
        """A line of our own, on stderr."""
        self.write(STDERR, f"runctl: {' '.join(text.split())}\n")

    def mark(self, state: dict[str, Any]) -> None:
        """A checkpoint behind all that was written so far."""
        self._items.append(json.dumps(state).encode())
        self._wake.set()

    async def wait_for_room(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting <= MOST)

    async def drain(self) -> None:
        """Returns when all that was written is with the daemon, or in its pipe, and all marks are
        durable."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._items)

    async def pump(self) -> None:
        """Until cancelled. Raises OSError, when nobody reads any more."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._items:
                done = await self._do_first()
                async with self._changed:
                    for _ in range(done):
                        item = self._items.popleft()
                        if isinstance(item, tuple):
                            self._waiting -= len(item[1])
                    self._changed.notify_all()

    async def _do_first(self) -> int:
        """How many items this was."""
        first = self._items[0]
        if isinstance(first, bytes):
            await self._store(first)
            return 1
        pieces = []
        for item in self._items:
            if not isinstance(item, tuple) or item[0] != first[0]:
                break
            pieces.append(item[1])
        await asyncio.to_thread(_write_all, first[0], b"".join(pieces))
        return len(pieces)

    async def _store(self, state: bytes) -> None:
        """A daemon that restarts is waited for as long as the run goes on without one."""
        if self._inside:
            try:
                await asyncio.to_thread(run.checkpoint, state, wait=float("inf"))
            except run.NotInside:
                self._inside = False
            except BadRequest as error:
                self._inside = False
                self.say(f"no checkpoints are stored: {error}")


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
