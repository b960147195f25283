"""What a command reads and writes, and our ends of that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import trio

from ....config.schema import CommandRunner
from ....protocol.records import StreamName
from ...processes.memory_files import make_memory_file
from ...processes.terminal_size import DEFAULT, Window
from .feed import feed_bytes, feed_file
from .filters import Identity, identity
from .flow import PipeSource, Source
from .spool import Spool, TerminalSpool
from .terminal import Terminal


@dataclass(slots=True)
class Ends:
    """``given``: the command's three descriptors; we close ours once it has them (``hand_over``).
    ``outputs`` and ``stdin``: what they lead to, ``stdin`` where it is a pipe of ours."""

    given: tuple[int, int, int] = (-1, -1, -1)
    sources: list[Source] = field(default_factory=list)
    outputs: frozenset[Identity] = frozenset()
    stdin: Identity | None = None
    terminal: Terminal | None = None
    #: Where stdin is fed, and the file in memory that it comes from; or what it is.
    pipe: int = -1
    text: int = -1
    prompt: bytes = b""
    _theirs: ExitStack = field(default_factory=ExitStack)

    def hand_over(self) -> None:
        """The command has what it was given, or will never have it."""
        self._theirs.close()

    def note_stored(self, totals: Mapping[StreamName, int]) -> None:
        """So many bytes of each stream are stored."""
        for source in self.sources:
            if isinstance(source, Spool):
                source.note_stored(totals.get(source.name, 0))

    async def feed(self, scope: trio.CancelScope) -> None:
        """Until all is fed, the command reads no more, or ``scope`` is cancelled; it sees the end
        of its stdin then."""
        pipe, self.pipe = self.pipe, -1
        with scope:
            if self.text < 0:
                await feed_bytes(pipe, self.prompt)
                return
            try:
                await feed_file(pipe, self.text)
            finally:
                os.close(pipe)

    def close_feed(self) -> None:
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1


def open_ends(
    stack: ExitStack,
    config: CommandRunner,
    prompt: bytes | None,
    window: Window | None,
    *,
    spooled: bool,
) -> Ends:
    """``stack`` closes all of it. ``prompt``: None where stdin is empty. ``spooled``: output, and
    the prompt, go through files in memory. Raises OSError; RunFailed, when there is no
    terminal."""
    ends = Ends()
    stack.callback(ends.hand_over)
    stack.callback(ends.close_feed)
    if config.tty:
        _open_terminal(stack, ends, window, spooled)
    else:
        _open_pipes(stack, ends, 1 if config.merge_output else 2, spooled)
    if prompt is not None:
        _open_feed(stack, ends, prompt, spooled)
    elif not config.tty:
        null = os.open(os.devnull, os.O_RDONLY)
        ends._theirs.callback(os.close, null)
        ends.given = (null, *ends.given[1:])
    return ends


def _open_pipes(stack: ExitStack, ends: Ends, count: int, spooled: bool) -> None:
    given = []
    names: tuple[StreamName, ...] = ("stdout", "stderr")
    for name in names[:count]:
        read, write = os.pipe()
        stack.callback(os.close, read)
        ends._theirs.callback(os.close, write)
        given.append(write)
        if spooled:
            ends.sources.append(Spool(name, read, _make_memory(stack, name)))
        else:
            ends.sources.append(PipeSource(name, read))
    ends.given = (-1, given[0], given[-1])
    ends.outputs = frozenset(map(identity, given))


def _open_terminal(stack: ExitStack, ends: Ends, window: Window | None, spooled: bool) -> None:
    terminal = ends.terminal = Terminal(window.size if window else DEFAULT)
    stack.callback(terminal.close)
    if window is not None:
        window.apply = terminal.resize
        stack.callback(window.close)
    if spooled:
        inner = os.pipe()
        for fd in inner:
            stack.callback(os.close, fd)
        memory = _make_memory(stack, "stdout")
        ends.sources.append(TerminalSpool(terminal.master, memory, inner))
    else:
        ends.sources.append(terminal.source())
    slave = terminal.slave
    ends.given = (slave, slave, slave)
    ends.outputs = frozenset((identity(slave),))


def _open_feed(stack: ExitStack, ends: Ends, prompt: bytes, spooled: bool) -> None:
    """A prompt needs an end, which a terminal that nobody types at cannot give."""
    read, ends.pipe = os.pipe()
    ends._theirs.callback(os.close, read)
    ends.given = (read, *ends.given[1:])
    ends.stdin = identity(read)
    if spooled:
        ends.text = _make_memory(stack, "stdin")
        with open(ends.text, "wb", buffering=0, closefd=False) as file:
            left = memoryview(prompt)
            while left:
                left = left[file.write(left) :]
            file.seek(0)
    else:
        ends.prompt = prompt


def _make_memory(stack: ExitStack, name: str) -> int:
    memory = make_memory_file(f"runctl-{name}")
    stack.callback(os.close, memory)
    return memory
