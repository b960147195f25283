"""Ids, what a run is, and how its status moves.

``Status`` says where a run is in its life; ``Outcome`` says how it ended. They are
different types: only a terminal status has an outcome.
"""

from __future__ import annotations

import base64
import datetime
import enum
import os
import re
import threading
import time
from typing import Literal

import msgspec

from .errors import BadRequest

MAX_THREAD_BYTES = 256
MAX_PROMPT_BYTES = 1024 * 1024
MAX_ARGV_BYTES = 1024 * 1024
#: Of a checkpoint's data.
MAX_CHECKPOINT_BYTES = 64 * 1024
#: The longest path that Linux takes.
MAX_CWD_BYTES = 4096
#: Of a command or a prompt, where runs are listed.
MAX_WORK = 200

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


class Status(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ABORTED = "aborted"
    DEAD = "dead"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]


#: The whole life of a run. ``RUNNING -> QUEUED`` is a replay: its executor stopped or
#: died, and the run waits, first of its thread, to be dispatched again.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.ABORTED}),
    Status.RUNNING: frozenset(
        {Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.ABORTED, Status.DEAD}
    ),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.ABORTED: frozenset(),
    Status.DEAD: frozenset(),
}


#: What becomes of a run whose attempt was interrupted.
OnInterrupt = Literal["continue", "restart", "fail"]


class Opening(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the stream of a push run begins. ``content_type``: None for what the runner says.
    ``ttl``: seconds, and ``expires``, Unix seconds, until there is no such stream any more.
    ``closed``: no more comes than what it begins with."""

    content_type: str | None = None
    ttl: int | None = None
    expires: float | None = None
    closed: bool = False


class RunSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to do: stored as the durable input of a run, so that it can be replayed.

    ``argv`` for a command whose runner leaves it open; ``cwd`` is the submitter's
    directory; ``retry_of`` is the run that this one repeats; ``on_interrupt``: None for what
    the runner says. ``push``: of a run whose output comes from elsewhere, and ``initial``
    in base64 what that begins with."""

    run: str
    thread: str
    runner: str
    argv: tuple[str, ...] = ()
    cwd: str | None = None
    retry_of: str | None = None
    on_interrupt: OnInterrupt | None = None
    push: Opening | None = None
    prompt: str | None = None  # a list of runs reads only the beginning
    initial: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a run ended. ``exit_code``: the process's, 128 + n for signal n.
    ``reply``: a chat run's whole text, later turns' history. ``note``: one line on an end
    that is no failure and yet not quite what was asked for. ``started_ms``, ``ended_ms``: when
    its last attempt's work began and was gone, in Unix milliseconds; None from an older
    version. ``adopted_ms``: when daemons took that work over, which had outlived the one before,
    the last 20 times."""

    status: Status
    exit_code: int | None = None
    error: str | None = None
    note: str | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    adopted_ms: list[int] = []
    reply: str | None = None  # last: a list of runs reads only the beginning


#: Every aborted run's outcome, wherever its end is written.
ABORTED = Outcome(Status.ABORTED, error="aborted by an operator")


class Run(msgspec.Struct, frozen=True):
    """A run as listed. Times are RFC 3339 UTC. ``adopted_at``: when daemons took over its last
    attempt, which had outlived the one before. ``command`` and ``prompt``: the work as it
    was submitted, ``shortened``; None when there is none. ``status_text``: what a running run
    says of itself."""

    run: str
    thread: str
    status: Status
    attempt: int
    runner: str
    executor: str | None
    created_at: str
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: int | None = None
    error: str | None = None
    note: str | None = None
    command: str | None = None
    prompt: str | None = None
    adopted_at: list[str] = []
    status_text: str | None = None

    @property
    def work(self) -> str:
        """What it says of itself, and what it is; "" when it is nothing."""
        work = self.command or self.prompt or ""
        return work if self.status_text is None else f"{self.status_text} ({work})"


class AttemptRow(msgspec.Struct, frozen=True):
    """One attempt of a run. ``end``: how the run ended, of its last one; "died", when the daemon
    or the machine did; "stopped", when the daemon was; None while it works, or when that is not
    known. ``after``: behind which chunk it continued, None when it began anew.
    ``void_bytes``: earlier output that it made void. ``usage``: what it says that it has used.
    Times are RFC 3339 UTC, None when they are not known."""

    attempt: int
    executor: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    end: str | None = None
    after: int | None = None
    void_bytes: int = 0
    usage: dict[str, int | float] = {}


def shortened(text: str) -> str:
    """``text`` on one line of at most ``MAX_WORK`` characters; one that was cut ends in "…"."""
    line = " ".join(text[: 4 * MAX_WORK].split())
    if len(line) <= MAX_WORK and len(text) <= 4 * MAX_WORK:
        return line
    return line[: MAX_WORK - 1] + "…"


def unix_ms() -> int:
    return time.time_ns() // 1_000_000


def unix_time(stamp: str) -> float:
    """Unix seconds of one of a ``Run``'s times. Raises ValueError."""
    return datetime.datetime.fromisoformat(stamp).timestamp()


class ThreadRow(msgspec.Struct, frozen=True):
    """A thread as listed: its current run (the running one, else the next, else the last),
    and how many wait. ``status``: running, queued or idle."""

    thread: str
    status: str
    run: Run
    queued: int


def check_thread(name: str) -> str:
    """The name, if it may name a thread: 1 to 256 bytes of UTF-8 without control
    characters.

    Raises: BadRequest.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise BadRequest("thread name is not valid Unicode; use UTF-8 text") from None
    if not name.strip():
        raise BadRequest("thread name is empty; give the thread a name")
    if size > MAX_THREAD_BYTES:
        raise BadRequest(
            f"thread name has {size} bytes; use at most {MAX_THREAD_BYTES} bytes of UTF-8"
        )
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
        raise BadRequest("thread name holds a control character; use printable text")
    return name


def is_run_id(text: str) -> bool:
    return _RUN_ID.fullmatch(text) is not None


def one_line(text: str, most: int = 2000) -> str:
    """``text`` as a message that fits anywhere: printable, its middle left out when it is
    longer than ``most``."""
    if len(text) > most:
        text = f"{text[: most - 503]}...{text[-500:]}"
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def check_run_id(run: str) -> str:
    """The id, if it may name a run: it becomes a NATS subject token as it is.

    Raises: BadRequest.
    """
    if not is_run_id(run):
        shown = run if len(run) <= 80 else run[:77] + "..."
        raise BadRequest(
            f"run id {shown!r} is not usable; use 1 to 64 letters, digits, '_' or '-',"
            " starting with a letter or digit"
        )
    return run


def token(name: str) -> str:
    """A legal NATS subject token for any thread name or executor ID, one to one.

    Plain names stay readable; others become "x_" and base64url of their UTF-8. A
    literal "*" in a subject would address every thread."""
    if _PLAIN.fullmatch(name) and not name.startswith("x_"):
        return name
    return "x_" + base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def untoken(text: str) -> str:
    """The name that ``token`` encoded. Raises ValueError on other text."""
    if not text.startswith("x_"):
        return text
    body = text[2:]
    return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)).decode()


def made_at(run: str) -> float | None:
    """When ``RunIds`` made this id, in Unix seconds; None of one that a user chose."""
    if len(run) != 26 or not set(run) <= set(_CROCKFORD) or run[0] > "7":
        return None
    value = 0
    for character in run[:10]:
        value = value << 5 | _CROCKFORD.index(character)
    return value / 1000


class RunIds:
    """Makes run ids: ULIDs (48 bit ms, 80 bit random; https://github.com/ulid/spec) in
    lower case, rising strictly within a process, so that two submits in one
    millisecond keep their order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def new(self) -> str:
        with self._lock:
            value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
            if value <= self._last:
                value = self._last + 1
            self._last = value
        return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))
