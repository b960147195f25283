"""What a runner is: one call that does an attempt's work and emits its output."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ....protocol.errors import BadRequest
from ....protocol.model import Outcome, RunSpec
from ....protocol.records import Chunk, StreamName
from ...processes.keeper_visit import Found
from ...processes.terminal_size import Window

#: Appends one chunk to the run's stream. Blocking is back-pressure: a runner stops
#: reading its source until it returns.
Emit = Callable[[StreamName, bytes], Awaitable[None]]
NoteStored = Callable[[Mapping[StreamName, int]], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier successful turn of the thread."""

    prompt: str
    reply: str


def ignore_stored(_: Mapping[StreamName, int]) -> None:
    """Nobody is told how much is stored."""


@dataclass(frozen=True, slots=True)
class Remains:
    """A command that outlived its daemon: its process tree, how many bytes of each stream are
    stored, and how to say that more than that is lost."""

    tree: Found
    stored: Mapping[StreamName, int]
    skip: Callable[[Mapping[StreamName, int]], None]


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where an earlier attempt was interrupted: the data of its last checkpoint, None where it has
    stored none, and the output up to there, some at a time. ``total``: bytes of that, as far as
    the stream has not lost any."""

    checkpoint: bytes | None
    read_output: Callable[[], AsyncIterator[list[Chunk]]]
    total: int = 0


class Sessions(Protocol):
    """By which name the run's agent knows the conversation of its thread. Each is durable when it
    returns."""

    async def find(self) -> str | None: ...

    async def look(self) -> str | None:
        """The same for a runner that has none by its configuration: a run may have named one."""
        ...

    async def store(self, name: str) -> None: ...

    async def forget(self) -> None: ...


class Notes(Protocol):
    """What the run says of itself. Each is durable when it returns. Raises Unavailable."""

    async def say(self, text: str) -> None: ...

    async def add_usage(self, text: str) -> None:
        """Raises BadRequest."""
        ...


async def begin_nothing_anew() -> None:
    """Nobody counts what is stored."""


async def refuse_checkpoint(_: bytes) -> None:
    raise BadRequest("this run stores no checkpoints")


async def refuse_to_emit(_: StreamName, __: bytes, ___: bytes) -> None:
    raise BadRequest("this run stores no checkpoints")


def keep_all() -> None:
    """Nothing is stored."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an attempt has besides its output. ``window``: the size of its terminal, if it has one.
    ``watch_stored`` has somebody told how many bytes of each stream are stored, whenever some
    more are. ``found``: its command, when that outlived the daemon that began it.
    ``began``: Unix seconds, as the stream has it. ``checkpoint`` makes data durable, with the
    output that was emitted before; raises BadRequest. ``resumption``: an attempt that
    continues. ``begin_anew``: what is emitted from here on comes of another process.
    ``emit_with``: emits a chunk, and a checkpoint to go on from behind it. ``start_over``: what
    was emitted until now is void. ``is_aborted``: whether a cancelled attempt will not be
    replayed."""

    window: Window | None = None
    watch_stored: Callable[[NoteStored], None] = lambda _: None
    found: Remains | None = None
    began: float = 0.0
    checkpoint: Callable[[bytes], Awaitable[None]] = refuse_checkpoint
    resumption: Resumption | None = None
    sessions: Sessions | None = None
    notes: Notes | None = None
    begin_anew: Callable[[], Awaitable[None]] = begin_nothing_anew
    emit_with: Callable[[StreamName, bytes, bytes], Awaitable[None]] = refuse_to_emit
    start_over: Callable[[], None] = keep_all
    is_aborted: Callable[[], bool] = lambda: False


#: Of work that nobody watches.
ALONE = Surroundings()


class Runner(Protocol):
    """One per configured runner, shared by its runs: an attempt's state is local."""

    async def run(
        self,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        history: Sequence[Turn],
        around: Surroundings = ALONE,
    ) -> Outcome:
        """Do the work, in trio. Cancelling ends it, and leaves nothing running.

        Raises: RunFailed (message, exit_code); whatever ``emit`` raises passes through.
        """
        ...
