"""Control requests and their answers, as JSON, so that operators read them with standard NATS
tools: tagged unions, validated at decode."""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import BadRequest, Busy, NotFound, NotGone, QueueFull, Refused, RequestError, Stopping
from .model import AttemptRow, OnInterrupt, Opening, Run, Status, ThreadRow, one_line

#: The verbs that change nothing: they may be asked again, and need not be heard by nobody.
READING = frozenset({"list", "locate", "show", "status"})


class Submit(
    msgspec.Struct,
    tag="submit",
    tag_field="verb",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """``runner`` None: the runner "shell" with argv, else the configuration's only or
    "default" runner, or, with ``push``, the only or "push" one of that kind. ``on_interrupt``
    None: as the runner says. ``push``: how the stream of a run begins whose output comes from
    elsewhere; ``initial``: in base64, what with."""

    thread: str
    runner: str | None = None
    run: str | None = None
    prompt: str | None = None
    argv: list[str] = []
    cwd: str | None = None
    on_interrupt: OnInterrupt | None = None
    push: Opening | None = None
    initial: list[str] = []


class List(msgspec.Struct, tag="list", tag_field="verb", forbid_unknown_fields=True):
    """One page. ``thread`` None lists threads. ``after``: the previous page's ``next``.
    ``live``: only threads on which a run is running or queued, running ones first."""

    thread: str | None = None
    status: str | None = None
    limit: int | None = None
    after: int = 0
    live: bool = False


class Locate(msgspec.Struct, tag="locate", tag_field="verb", forbid_unknown_fields=True):
    """The thread's current or latest run: running, else next in the queue, else last."""

    thread: str
    run: str | None = None


class Abort(msgspec.Struct, tag="abort", tag_field="verb", forbid_unknown_fields=True):
    """Ends the running run (or ``run``), and with ``queued`` the queued ones as well.
    Answered when the process trees are gone, or, by a ``Problem`` "not-gone", some seconds
    after the grace."""

    thread: str
    run: str | None = None
    queued: bool = False


class Purge(
    msgspec.Struct,
    tag="purge",
    tag_field="verb",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """``older_than`` seconds since the run ended. ``check``: only say whether it would be
    refused, and how many runs' output would go."""

    threads: list[str]
    older_than: float | None = None
    force: bool = False
    check: bool = False


class Show(
    msgspec.Struct,
    tag="show",
    tag_field="verb",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """``prefix``: of the only run whose id begins with ``run``."""

    run: str
    prefix: bool = False


class Retry(msgspec.Struct, tag="retry", tag_field="verb", forbid_unknown_fields=True):
    run: str


class StatusRequest(msgspec.Struct, tag="status", tag_field="verb", forbid_unknown_fields=True):
    """``alone``: of the executor that is asked, without its asking the others. ``brief``:
    at once, without its asking NATS or the database either, whose fields stay empty."""

    alone: bool = False
    brief: bool = False


class Restart(msgspec.Struct, tag="restart", tag_field="verb", forbid_unknown_fields=True):
    """The executor that is asked starts its program again, under its running commands."""


class Resize(msgspec.Struct, tag="resize", tag_field="verb", forbid_unknown_fields=True):
    """The terminal of a client that watches ``run``, which is on a terminal as well; asked
    of the run's executor. ``client``: an inbox to which it is subscribed as long as it
    watches. 0 columns and rows: it leaves."""

    run: str
    client: str
    columns: int
    rows: int


class Session(msgspec.Struct, tag="session", tag_field="verb", forbid_unknown_fields=True):
    """By which names agents know the conversation of ``thread``. ``forget``: they begin another
    one with its next run."""

    thread: str
    forget: bool = False


Request = (
    Submit
    | List
    | Locate
    | Abort
    | Purge
    | Show
    | Retry
    | StatusRequest
    | Resize
    | Restart
    | Session
)


class ThreadSession(msgspec.Struct):
    """``session``: its name there. ``made_at``: when it was stored, RFC 3339 UTC."""

    runner: str
    session: str
    made_at: str


class Sessions(msgspec.Struct, tag="sessions", tag_field="reply"):
    """Those that there are, or were until they were forgotten."""

    sessions: list[ThreadSession] = []


class Submitted(msgspec.Struct, tag="submitted", tag_field="reply"):
    thread: str
    run: str
    status: Status


class ExecutorStatus(msgspec.Struct):
    """One executor of those that share the database. ``state``: "up" when it answered,
    "silent" when it holds its lease and did not, "gone" when it holds none.
    ``takeover``: it is gone, and a peer that is alive takes its runs over."""

    executor_id: str
    state: str
    version: str = ""
    pid: int = 0
    running: int = 0
    uptime: float = 0.0
    takeover: bool = False


class Threads(msgspec.Struct, tag="threads", tag_field="reply"):
    """``silent``, with the first page: executors that have running runs and did not
    answer."""

    threads: list[ThreadRow]
    next: int | None = None
    silent: list[ExecutorStatus] = []


#: How much of a run's output is stored: all of it, all but its head, or nothing.
Output = Literal["stored", "partial", "none"]


class RunRow(Run, frozen=True):
    """A run and its ``output``; None from a daemon that does not tell."""

    output: Output | None = None


def run_row(run: Run, output: Output) -> RunRow:
    return msgspec.convert({**msgspec.structs.asdict(run), "output": output}, RunRow)


class Runs(msgspec.Struct, tag="runs", tag_field="reply"):
    """``silent``, with the first page: executors that run one of these and did not
    answer."""

    runs: list[RunRow]
    next: int | None = None
    silent: list[ExecutorStatus] = []


class RunDetails(msgspec.Struct, tag="run", tag_field="reply"):
    """What was submitted: argv or prompt, cwd, retry_of, and ``push``. ``output``: see
    ``RunRow``; only of ``Show``. ``waits_for``: in words, the run before it, or processes of
    its own that cannot be ended. ``session``: by which name its agent knows the thread.
    ``usage``: of all ``attempts``."""

    run: Run
    argv: list[str] = []
    prompt: str | None = None
    cwd: str | None = None
    retry_of: str | None = None
    output: Output | None = None
    waits_for: str | None = None
    session: str | None = None
    attempts: list[AttemptRow] = []
    usage: dict[str, int | float] = {}
    push: Opening | None = None


def details_json(details: RunDetails) -> dict[str, object]:
    """What ``show --json`` prints, and hooks are told."""
    found: dict[str, object] = msgspec.to_builtins(details.run)
    return found | {
        "output": details.output,
        "argv": details.argv,
        "prompt": details.prompt,
        "cwd": details.cwd,
        "retry_of": details.retry_of,
        "waits_for": details.waits_for,
        "session": details.session,
        "attempts": msgspec.to_builtins(details.attempts),
        "usage": details.usage,
    }


class Aborted(msgspec.Struct, tag="aborted", tag_field="reply"):
    """``runs``: those that this request ended, their process trees verified gone."""

    runs: list[str]


class Purged(msgspec.Struct, tag="purged", tag_field="reply"):
    """``runs``: how many runs' output was deleted."""

    runs: int


class Resized(msgspec.Struct, tag="resized", tag_field="reply"):
    """The size in force: that of the client that was first."""

    columns: int
    rows: int


class NatsStatus(msgspec.Struct):
    """``warnings``: what was lost of its stream, and what that has other than configured, a
    line each. ``unfit``: why nothing can be stored there; None when it can."""

    url: str
    embedded: bool
    connected: bool
    version: str
    stream_bytes: int
    stream_messages: int
    warnings: list[str] = []
    unfit: str | None = None


class DatabaseStatus(msgspec.Struct):
    url: str
    kind: str


class HooksStatus(msgspec.Struct):
    """``delivered`` and ``failed`` (given up) since this daemon started; ``waiting``: of all
    executors."""

    delivered: int = 0
    failed: int = 0
    waiting: int = 0


class UnfinishedRun(msgspec.Struct):
    """A run whose row says that it is running here, while nothing of it is: ``status`` is what
    it has ended as, "running" when that is not known; ``why`` the row does not say so."""

    run: str
    thread: str
    status: str
    why: str


class KeeperStatus(msgspec.Struct):
    """The process keeper. ``version``: of the runctl that started it."""

    pid: int
    version: str


class DaemonStatus(msgspec.Struct, tag="status", tag_field="reply"):
    executor_id: str
    version: str
    pid: int
    running: int
    queued: int
    nats: NatsStatus
    database: DatabaseStatus
    uptime: float = 0.0
    executors: list[ExecutorStatus] = []
    runners: list[str] = []
    #: Where Prometheus reads; None for nowhere.
    metrics: str | None = None
    #: None when no hooks are configured.
    hooks: HooksStatus | None = None
    #: Whether each run has a cgroup of its own; None when it is not known.
    cgroups: bool | None = None
    #: They count as running.
    unfinished: list[UnfinishedRun] = []
    keeper: KeeperStatus | None = None
    #: Seconds since which the process keeper owes an answer; the daemon ends at 10.
    keeper_silent: float = 0.0

    @property
    def keeper_warning(self) -> str | None:
        """A line on a keeper that does not answer."""
        if self.keeper_silent < 2:
            return None
        return (
            f"the process keeper has not answered for {self.keeper_silent:.0f} s: no run begins or"
            " ends; the daemon ends within 10 s, to be started again"
        )


class Restarting(msgspec.Struct, tag="restarting", tag_field="reply"):
    """``pid``: of the process that goes on. ``outlive``: whether commands do; else they are ended
    in order, and replayed."""

    pid: int
    outlive: bool


class Problem(msgspec.Struct, tag="error", tag_field="reply"):
    """``code``: bad-request, not-found, refused, queue-full, busy, not-gone, stopping or error."""

    code: str
    message: str


Reply = (
    Submitted
    | Threads
    | Runs
    | RunDetails
    | Aborted
    | Purged
    | Resized
    | DaemonStatus
    | Restarting
    | Sessions
    | Problem
)

_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_reply_decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def decode_request(data: bytes) -> Request:
    """Raises BadRequest, saying what was wrong with it."""
    try:
        request: Request = _request_decoder.decode(data)
        return request
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError is a ValueError
        raise BadRequest(f"malformed request: {one_line(str(error))}") from None


def decode_reply(data: bytes) -> Reply:
    """Raises RequestError when the reply is not one that this version knows."""
    try:
        reply: Reply = _reply_decoder.decode(data)
        return reply
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"runctld answered with something else ({one_line(str(error))});"
            " install the same version of runctl and runctld"
        ) from None


def verb_of(request: Request) -> str:
    return str(type(request).__struct_config__.tag)


def encode(message: Request | Reply) -> bytes:
    return msgspec.json.encode(message)


def raise_problem(problem: Problem) -> None:
    """Raise the error that the daemon named."""
    for kind in (BadRequest, NotFound, Refused, QueueFull, Busy, NotGone, Stopping):
        if problem.code == kind.code:
            raise kind(problem.message)
    raise RequestError(problem.message)
