"""What a stream reader tells: where runs begin and end, and what they wrote."""

from __future__ import annotations

import msgspec

from ..protocol import records


class Reset(msgspec.Struct, frozen=True, gc=False):
    """Attempt ``attempt`` begins: what was shown of earlier ones is void. ``executor``:
    where it runs, "" when its record is not stored any more. ``tty``: see records.Reset."""

    run: str
    attempt: int
    executor: str = ""
    tty: bool = False


class Continue(msgspec.Struct, frozen=True, gc=False):
    """Attempt ``attempt`` goes on behind chunk ``after``: what was shown beyond that is void, and
    the next chunk is ``after + 1``. ``void``: how many chunks that were shown are. ``executor``,
    ``tty``: as of a Reset."""

    run: str
    attempt: int
    after: int
    void: int = 0
    executor: str = ""
    tty: bool = False


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """``seq`` begins at 1 in each attempt that starts over, goes on in one that continues, and
    rises by one. ``stream``: stdout, stderr, or text,
    a chat's reply in UTF-8."""

    run: str
    attempt: int
    seq: int
    stream: records.StreamName
    data: bytes
    #: Unix seconds at which the daemon read it, or what came just before it.
    at: float = 0.0


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Chunks ``from_`` to ``to`` of the current attempt are not stored any more."""

    run: str
    from_: int
    to: int


class End(msgspec.Struct, frozen=True, gc=False):
    """The run is over. ``exit_code``: the process's, 128 + n for signal n. ``lost``: its record
    is not stored any more, this is the daemon's word, and output before it may be missing."""

    run: str
    attempt: int
    status: str
    exit_code: int | None
    error: str | None
    note: str | None = None
    lost: bool = False


class CaughtUp(msgspec.Struct, frozen=True, gc=False):
    """Everything that was stored when this consumer was made has been seen. Comes once
    after the start and once after each reconnection."""


class Connection(msgspec.Struct, frozen=True, gc=False):
    """The connection broke (``up`` False), or is there again. ``stream``: it is not the
    connection, but the stream that is gone."""

    up: bool
    stream: bool = False


class Lost(msgspec.Struct, frozen=True, gc=False):
    """The run has ended, and its end is not stored any more: what was not seen of its
    output until then is lost."""

    run: str


class Malformed(msgspec.Struct, frozen=True, gc=False):
    """A record that cannot be read; it was left out. ``why`` is one line."""

    why: str


class Progress(msgspec.Struct, frozen=True, gc=False):
    """Where a run stands, of a Watcher with ``summaries``: what its last record says."""

    run: str
    summary: records.Summary
    subject: str = ""


Event = Reset | Continue | Chunk | Gap | End | CaughtUp | Connection | Lost | Malformed | Progress
