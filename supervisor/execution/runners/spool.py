"""A command's output on its way to the stream, kept in a file in memory until it is stored there.

The kernel moves it into that file. All that says how far it has come, the pipe's content and
the file's size, is in what the descriptors lead to: whoever has copies of them can go on.
"""

from __future__ import annotations

import os

from ....protocol.records import StreamName
from ...processes.memory_files import give_back, move
from .flow import count_readable

#: Memory is given back in steps of so many bytes.
STEP_BACK = 256 * 1024
#: So much of what is stored stays, should NATS lose it in spite of its acknowledgement.
KEPT = 64 * 1024
PAGE = 4096


class Spool:
    """A ``Source`` (``flow.py``). ``fd``: the read end of the command's pipe. ``memory``: where
    its output goes. ``begin``: how much of that was read before, by another daemon."""

    def __init__(self, name: StreamName, fd: int, memory: int, begin: int = 0) -> None:
        self.name = name
        self.fd = fd
        self.held = b""
        self._memory = memory
        self._size = os.fstat(memory).st_size
        self._read = self.begin = begin
        self._freed = 0

    @property
    def waits(self) -> bool:
        """Whether there is something to read, whatever ``fd`` says."""
        return self._read < self._size

    @property
    def backlog(self) -> int:
        return self._size - self._read + count_readable(self.fd)

    def read(self, most: int) -> bytes | None:
        if not self.waits:
            moved = self._move(most)
            if not moved:
                return None if moved is None else b""
            self._size += moved
        data = os.pread(self._memory, min(most, self._size - self._read), self._read)
        self._read += len(data)
        return data

    def _move(self, most: int) -> int | None:
        """How much has come; None when nothing has, 0 at the end."""
        try:
            return move(self.fd, self._memory, most)
        except BlockingIOError:
            return None

    def note_stored(self, total: int) -> None:
        """So many bytes of it are in the stream: their memory is given back, but for the latest."""
        end = (total - KEPT) // PAGE * PAGE
        if end - self._freed >= STEP_BACK:
            give_back(self._memory, self._freed, end)
            self._freed = end


class TerminalSpool(Spool):
    """Of a terminal's ``master``, which the kernel moves nowhere but into a pipe: ``inner``, the
    (read, write) ends of one of ours."""

    def __init__(self, master: int, memory: int, inner: tuple[int, int], begin: int = 0) -> None:
        super().__init__("stdout", master, memory, begin)
        self._out, self._in = inner
        self._size += self._drain()  # an earlier daemon may have ended in between

    def _move(self, most: int) -> int | None:
        """The kernel hands out 4 KiB at most: take several, for fewer chunks."""
        moved = 0
        while moved < most:
            try:
                if not move(self.fd, self._in, most - moved):
                    break
            except BlockingIOError:
                return moved or None
            except OSError:  # EIO: nobody has the other end any more
                break
            moved += self._drain()
        return moved

    def _drain(self) -> int:
        moved = 0
        try:
            while found := move(self._out, self._memory, 1 << 20):
                moved += found
        except BlockingIOError:
            pass
        return moved
