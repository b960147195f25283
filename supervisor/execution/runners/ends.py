"""What a command reads and writes, and our ends of that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import trio

from ....config.schema import CommandRunner
from ....protocol.records import StreamName
from ...processes.memory_files import find_data, make_memory_file
from ...processes.terminal_size import DEFAULT, Window
from .feed import feed_bytes, feed_file
from .filters import Identity, identity
from .flow import PipeSource, Source
from .spool import Spool, TerminalSpool
from .terminal import Terminal

#: Names of descriptors that outlive the daemon.
STDIN, MASTER, SLAVE, INNER = "stdin", "master", "slave", ("inner-read", "inner-write")
#: Those of a command's stdin.
FEED = (STDIN, "stdin-memory")


def memory_of(name: str) -> str:
    """What the file in memory of that is called."""
    return f"{name}-memory"


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
    #: What goes on without us has copies of these, by name.
    kept: dict[str, int] = field(default_factory=dict)
    _theirs: ExitStack = field(default_factory=ExitStack)

    def hand_over(self) -> None:
        """The command has what it was given, or will never have it."""
        self._theirs.close()

    def note_stored(self, totals: Mapping[StreamName, int]) -> None:
        """So many bytes of each stream are stored."""
        for source in self.sources:
            if isinstance(source, Spool):
                source.note_stored(totals.get(source.name, 0))

    def find_lost(self, stored: Mapping[StreamName, int]) -> dict[StreamName, int]:
        """Where streams go on that lack something behind what is stored of them."""
        spools = [source for source in self.sources if isinstance(source, Spool)]
        return {x.name: x.begin for x in spools if x.begin > stored.get(x.name, 0)}

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
            memory = _make_memory(stack, name)
            ends.kept |= {name: read, memory_of(name): memory}
            ends.sources.append(Spool(name, read, memory))
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
        ends.kept |= {MASTER: terminal.master, SLAVE: terminal.slave, memory_of("stdout"): memory}
        ends.kept |= dict(zip(INNER, inner, strict=True))
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
        ends.kept |= {STDIN: ends.pipe, memory_of(STDIN): ends.text}
    else:
        ends.prompt = prompt


def _make_memory(stack: ExitStack, name: str) -> int:
    memory = make_memory_file(f"runctl-{name}")
    stack.callback(os.close, memory)
    return memory


def adopt_ends(
    stack: ExitStack,
    fds: Mapping[str, int],
    stored: Mapping[StreamName, int],
    window: Window | None,
) -> Ends:
    """Of a command that outlived its daemon. ``stack`` closes ``fds``, by their names. ``stored``:
    how many bytes of each stream are. What is there no more of those behind them is left out
    (``find_lost``). Raises OSError."""
    ends = Ends()
    ends.kept = dict(fds)
    for name, fd in fds.items():
        if name not in (MASTER, SLAVE, STDIN):  # the end of these is seen by others
            stack.callback(os.close, fd)
    streams: tuple[StreamName, ...] = ("stdout", "stderr")
    for name in streams:
        if (memory := fds.get(memory_of(name))) is None:
            continue
        begin = find_data(memory, stored.get(name, 0))
        if MASTER in fds:
            inner = fds[INNER[0]], fds[INNER[1]]
            ends.sources.append(TerminalSpool(fds[MASTER], memory, inner, begin))
        else:
            ends.sources.append(Spool(name, fds[name], memory, begin))
    if MASTER in fds:
        _adopt_terminal(stack, ends, fds, window)
    else:
        ends.outputs = frozenset(identity(fds[name]) for name in streams if name in fds)
    if STDIN in fds:
        ends.pipe, ends.text = fds[STDIN], fds[memory_of(STDIN)]
        ends.stdin = identity(ends.pipe)
        stack.callback(ends.close_feed)
    return ends


def _adopt_terminal(
    stack: ExitStack, ends: Ends, fds: Mapping[str, int], window: Window | None
) -> None:
    slave = fds.get(SLAVE, -1)
    terminal = ends.terminal = Terminal.take(fds[MASTER], slave)
    stack.callback(terminal.close)
    if slave >= 0:
        ends.outputs = frozenset((identity(slave),))
    if window is not None:
        window.apply = terminal.resize
        stack.callback(window.close)
