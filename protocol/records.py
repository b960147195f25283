"""The records of a run's output in the stream, as msgpack (chunks are bytes): a tagged union,
validated at decode.

Other versions' records, and others' messages in the stream:

* A field that we do not know is left out. One that was added later has a default here,
  so that records which lack it are read.
* ``VERSION`` rises when an older reader could misread a newer record. A record of a higher
  version, or of a kind that we do not know, is ``NewerRecord``: the daemon leaves that run
  alone, watchers leave the record out and say that runctl is to be upgraded. Each record says
  the oldest version that can read it: 2 is ``Continue`` alone.
* Whatever else is no record of ours was put there by another program: the daemon writes
  on behind it, watchers leave it out and say so.

``tests/fixtures/records`` holds the bytes of each version, which must stay readable.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from .model import Outcome, one_line
from .push import PushState

VERSION = 2
#: Each record's ``Summary``, for readers that ask the server to leave the content out.
SUMMARY_HEADER = "Runctl"

StreamName = Literal["stdout", "stderr", "text"]


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    stream: StreamName
    data: bytes


class Reset(msgspec.Struct, frozen=True, tag="reset", tag_field="t"):
    """Attempt ``attempt`` begins; whatever was shown of earlier ones is void. ``tty``: its
    output is a terminal's, whose size watchers may set. ``push``: it comes from elsewhere."""

    run: str
    attempt: int
    at: float
    executor: str = ""
    tty: bool = False
    v: int = 1
    push: bool | msgspec.UnsetType = msgspec.UNSET


class Chunks(msgspec.Struct, frozen=True, tag="chunk", tag_field="t"):
    """Chunks ``seq``, ``seq + 1``, ... of an attempt; ``seq`` starts at 1. ``at``: Unix
    seconds at which the first was read. ``total``: bytes of output that the attempt has
    written with it, or of its run, if it continues; 0 from a writer that does not count.
    ``of``: the attempt's own, of each stream. ``checkpoint``: what the work needs to go on from
    here, should it die. ``push``: of a run whose output comes from elsewhere."""

    attempt: int
    seq: int
    at: float
    chunks: list[Chunk]
    total: int = 0
    of: dict[StreamName, int] = {}
    v: int = 1
    checkpoint: bytes | msgspec.UnsetType = msgspec.UNSET
    push: PushState | msgspec.UnsetType = msgspec.UNSET


class Continue(msgspec.Struct, frozen=True, tag="continue", tag_field="t"):
    """Attempt ``attempt`` goes on behind chunk ``after``: what earlier ones wrote up to there is
    valid, and void beyond. Its first chunk is ``after + 1``: the first of ``chunks``, which
    repeat what is valid of a record that is not valid as a whole. ``total``: bytes of output up
    to ``after``. ``base``: the attempt whose reset all of that followed."""

    run: str
    attempt: int
    after: int
    at: float
    executor: str = ""
    tty: bool = False
    total: int = 0
    base: int = 1
    chunks: list[Chunk] = []
    v: int = 2


class End(msgspec.Struct, frozen=True, tag="end", tag_field="t"):
    """The run is over; ``chunks`` is how many the attempt wrote. ``push``: as of ``Chunks``."""

    run: str
    attempt: int
    chunks: int
    at: float
    outcome: Outcome
    v: int = 1
    push: PushState | msgspec.UnsetType = msgspec.UNSET


Record = Reset | Continue | Chunks | End
_record_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)
_encoder = msgspec.msgpack.Encoder()


def find_push(record: Record | None) -> PushState | None:
    """What ``record`` says of a push run's stream."""
    found = record.push if isinstance(record, Chunks | End) else None
    return found if isinstance(found, PushState) else None


def encode_record(record: Record) -> bytes:
    return _encoder.encode(record)


class NewerRecord(ValueError):
    """A record that a newer runctl wrote, and that this one cannot read."""


class _Head(msgspec.Struct):
    """What is looked at in a record that cannot be read."""

    t: str = ""
    v: int = 1


_head_decoder = msgspec.msgpack.Decoder(_Head)
_KINDS = ("reset", "continue", "chunk", "end")
#: A date in the year 9999, in Unix seconds: no later one can be shown.
_LATEST = 253_000_000_000.0
#: No count is higher: beyond it JSON's readers lose digits.
_MOST = 2**53
MAX_EXECUTOR_BYTES = 256


def decode_record(data: bytes) -> Record:
    """Raises ``ValueError`` on anything but a record of this version or older: NewerRecord
    when it is one of a newer version."""
    try:
        record: Record = _record_decoder.decode(data)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError is a ValueError
        _refuse_newer(data)
        raise ValueError(f"not a record: {one_line(str(error))}") from None
    if record.v > VERSION:
        raise _newer(f"version {record.v}, and this one reads up to {VERSION}")
    # Each of these would be taken for the position of a run, or shown.
    if not 0 <= record.attempt <= _MOST or not 0 <= record.at < _LATEST:  # also NaN
        raise ValueError("not a record: its attempt or time is out of range")
    if isinstance(record, Chunks) and not (
        1 <= record.seq <= _MOST
        and all(0 <= total <= _MOST for total in (record.total, *record.of.values()))
    ):
        raise ValueError("not a record: the numbers of its chunks are out of range")
    if isinstance(record, End) and not 0 <= record.chunks <= _MOST:
        raise ValueError("not a record: its number of chunks is out of range")
    if isinstance(record, Reset | Continue) and len(record.executor.encode()) > MAX_EXECUTOR_BYTES:
        raise ValueError("not a record: its executor's ID is too long")
    if isinstance(record, Continue) and not all(
        0 <= number <= _MOST for number in (record.after, record.total, record.base)
    ):
        raise ValueError("not a record: where it continues is out of range")
    return record


def _refuse_newer(data: bytes) -> None:
    try:
        head = _head_decoder.decode(data)
    except (ValueError, RecursionError):
        return
    if head.v > VERSION:
        raise _newer(f"version {head.v}, and this one reads up to {VERSION}") from None
    if head.t and head.t not in _KINDS:
        raise _newer(f"kind {head.t[:40]!r}") from None


def _newer(what: str) -> NewerRecord:
    return NewerRecord(f"written by a newer runctl ({what}): upgrade this one")


class Summary(msgspec.Struct, frozen=True):
    """What a record says without its content. ``chunks``: how many there are with it; of a
    "continue", how many are valid before it. ``status``: of an "end", how the run ended.
    ``total``: of a "chunk" or a "continue", as in those. ``checkpoint``: it holds one.
    ``base``: of a "continue", and ``own`` how many chunks it holds."""

    kind: Literal["reset", "continue", "chunk", "end"]
    attempt: int
    chunks: int = 0
    status: str = ""
    total: int = 0
    checkpoint: bool = False
    base: int = 0
    own: int = 0


def summary(record: Record) -> str:
    """The value of ``SUMMARY_HEADER``: a ``Summary``'s fields in order, e.g. "chunk 1 154 9016"
    or "end 2 20 succeeded"."""
    if isinstance(record, Reset):
        return f"reset {record.attempt}"
    if isinstance(record, Chunks):
        last = record.seq + len(record.chunks) - 1
        mark = "" if record.checkpoint is msgspec.UNSET else f" {_CHECKPOINT}"
        return f"chunk {record.attempt} {last} {record.total}{mark}"
    if isinstance(record, Continue):
        return (
            f"continue {record.attempt} {record.after} {record.total} {record.base}"
            f" {len(record.chunks)}"
        )
    return f"end {record.attempt} {record.chunks} {record.outcome.status}"


_CHECKPOINT = "checkpoint"
_COUNT = re.compile(r"[0-9]{1,18}")
_WORD = re.compile(r"[a-z][a-z-]{0,30}")


def read_summary(text: str) -> Summary:
    """Raises ``ValueError`` on anything but a summary. Words behind it are left out: a
    newer version may have put them there."""
    kind, *rest = text.split(" ")
    numbers = []
    for word in rest:
        if not _COUNT.fullmatch(word):
            break
        numbers.append(int(word))
    after = rest[len(numbers) :]
    if kind == "reset" and numbers:
        return Summary("reset", numbers[0])
    if kind == "chunk" and len(numbers) >= 2:
        total = numbers[2] if len(numbers) > 2 else 0
        marked = after[:1] == [_CHECKPOINT]
        return Summary("chunk", numbers[0], numbers[1], total=total, checkpoint=marked)
    if kind == "continue" and len(numbers) >= 4:
        own = numbers[4] if len(numbers) > 4 else 0
        return Summary(
            "continue", numbers[0], numbers[1], total=numbers[2], base=numbers[3], own=own
        )
    if kind == "end" and len(numbers) == 2 and after and _WORD.fullmatch(after[0]):
        return Summary("end", numbers[0], numbers[1], after[0])
    raise ValueError(f"not a record's summary: {text[:80]!r}")
