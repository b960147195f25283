"""What crosses NATS: stream records, control requests and replies, and their subjects.

Stream records are msgpack (chunks are bytes), control messages are JSON (operators
read them with standard NATS tools). Both are tagged unions, validated at decode.

Other versions' records, and others' messages in the stream:

* A field that we do not know is left out. One that was added later has a default here,
  so that records which lack it are read.
* ``VERSION`` rises when an older reader could misread a newer record. A record of a higher
  version, or of a kind that we do not know, is ``NewerRecord``: the daemon leaves that run
  alone, watchers leave the record out and say that runctl is to be upgraded.
* Whatever else is no record of ours was put there by another program: the daemon writes
  on behind it, watchers leave it out and say so.

``tests/fixtures/records`` holds the bytes of each version, which must stay readable.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from ..config.schema import Login, Nats
from .errors import BadRequest, Busy, NotFound, NotGone, QueueFull, Refused, RequestError
from .model import Outcome, Run, Status, ThreadRow, one_line, token

VERSION = 1
STREAM = "RUNCTL"
SUBJECT_PREFIX = "runctl.out"
#: JetStream's "stream not found".
NO_STREAM = 10059
#: Where JetStream tells that the stream was made, edited or deleted.
ADVISORIES = f"$JS.EVENT.ADVISORY.STREAM.*.{STREAM}"
CONTROL_PREFIX = "runctl.ctl"
SERVICE = "runctl"
#: Its part that answers whoever may only watch, over a connection of its own.
READING_SERVICE = "runctl-reads"
#: The verbs that change nothing: they may be asked again, and need not be heard by nobody.
READING = frozenset({"list", "locate", "show", "status"})
#: A core message without content: there is work that its sender has no room for.
KICK_SUBJECT = "runctl.kick"
#: A core message, its content a thread's name: a run was queued on it, or is no longer.
#: What starts and ends a run is seen in the stream.
CHANGED_SUBJECT = "runctl.changed"
#: Each record's ``Summary``, for readers that ask the server to leave the content out.
SUMMARY_HEADER = "Runctl"
#: JetStream closes a connection on a payload above 1 MiB with headers: stay far below.
MAX_RECORD_BYTES = 512 * 1024
#: What an answer holds of a run beside its spec, at most, roughly.
DETAILS_BYTES = 16 * 1024
#: What NATS, and the stream, must take as one message: a record and its headers.
LEAST_PAYLOAD = MAX_RECORD_BYTES + DETAILS_BYTES

StreamName = Literal["stdout", "stderr", "text"]


def out_subject(thread: str, run: str) -> str:
    return f"{SUBJECT_PREFIX}.{token(thread)}.{run}"


def thread_subjects(thread: str) -> str:
    return f"{SUBJECT_PREFIX}.{token(thread)}.*"


def control_subject(verb: str, executor: str | None = None) -> str:
    """Where ``verb`` is asked for: of any executor, or of the named one."""
    return f"{CONTROL_PREFIX}.{'any' if executor is None else 'id-' + token(executor)}.{verb}"


# ---- stream records -------------------------------------------------------------


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    stream: StreamName
    data: bytes


class Reset(msgspec.Struct, frozen=True, tag="reset", tag_field="t"):
    """Attempt ``attempt`` begins; whatever was shown of earlier ones is void. ``tty``: its
    output is a terminal's, whose size watchers may set."""

    run: str
    attempt: int
    at: float
    executor: str = ""
    tty: bool = False
    v: int = VERSION


class Chunks(msgspec.Struct, frozen=True, tag="chunk", tag_field="t"):
    """Chunks ``seq``, ``seq + 1``, ... of an attempt; ``seq`` starts at 1. ``at``: Unix
    seconds at which the first was read. ``total``: bytes of output that the attempt has
    written with it; 0 from a writer that does not count."""

    attempt: int
    seq: int
    at: float
    chunks: list[Chunk]
    total: int = 0
    v: int = VERSION


class End(msgspec.Struct, frozen=True, tag="end", tag_field="t"):
    """The run is over; ``chunks`` is how many the attempt wrote."""

    run: str
    attempt: int
    chunks: int
    at: float
    outcome: Outcome
    v: int = VERSION


Record = Reset | Chunks | End
_record_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)
_encoder = msgspec.msgpack.Encoder()


def encode_record(record: Record) -> bytes:
    return _encoder.encode(record)


class NewerRecord(ValueError):
    """A record that a newer runctl wrote, and that this one cannot read."""


class _Head(msgspec.Struct):
    """What is looked at in a record that cannot be read."""

    t: str = ""
    v: int = VERSION


_head_decoder = msgspec.msgpack.Decoder(_Head)
_KINDS = ("reset", "chunk", "end")
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
    if isinstance(record, Chunks) and not (1 <= record.seq <= _MOST and 0 <= record.total <= _MOST):
        raise ValueError("not a record: the numbers of its chunks are out of range")
    if isinstance(record, End) and not 0 <= record.chunks <= _MOST:
        raise ValueError("not a record: its number of chunks is out of range")
    if isinstance(record, Reset) and len(record.executor.encode()) > MAX_EXECUTOR_BYTES:
        raise ValueError("not a record: its executor's ID is too long")
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
    """What a record says without its content. ``chunks``: how many the attempt has
    written with it. ``status``: of an "end", how the run ended. ``total``: of a "chunk",
    as in ``Chunks``."""

    kind: Literal["reset", "chunk", "end"]
    attempt: int
    chunks: int = 0
    status: str = ""
    total: int = 0


def summary(record: Record) -> str:
    """The value of ``SUMMARY_HEADER``: a ``Summary``'s fields in order, e.g. "chunk 1 154 9016"
    or "end 2 20 succeeded"."""
    if isinstance(record, Reset):
        return f"reset {record.attempt}"
    if isinstance(record, Chunks):
        last = record.seq + len(record.chunks) - 1
        return f"chunk {record.attempt} {last} {record.total}"
    return f"end {record.attempt} {record.chunks} {record.outcome.status}"


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
        return Summary("chunk", numbers[0], numbers[1], total=total)
    if kind == "end" and len(numbers) == 2 and after and _WORD.fullmatch(after[0]):
        return Summary("end", numbers[0], numbers[1], after[0])
    raise ValueError(f"not a record's summary: {text[:80]!r}")


# ---- control --------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit", tag_field="verb", forbid_unknown_fields=True):
    """``runner`` None: the runner "shell" with argv, else the configuration's only or
    "default" runner."""

    thread: str
    runner: str | None = None
    run: str | None = None
    prompt: str | None = None
    argv: list[str] = []
    cwd: str | None = None


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


class Resize(msgspec.Struct, tag="resize", tag_field="verb", forbid_unknown_fields=True):
    """The terminal of a client that watches ``run``, which is on a terminal as well; asked
    of the run's executor. ``client``: an inbox to which it is subscribed as long as it
    watches. 0 columns and rows: it leaves."""

    run: str
    client: str
    columns: int
    rows: int


Request = Submit | List | Locate | Abort | Purge | Show | Retry | StatusRequest | Resize


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
    """``spec`` holds argv or prompt, cwd and retry_of as submitted. ``output``: see
    ``RunRow``; only of ``Show``. ``waits_for``: in words, the run before it, or processes of
    its own that cannot be ended."""

    run: Run
    argv: list[str] = []
    prompt: str | None = None
    cwd: str | None = None
    retry_of: str | None = None
    output: Output | None = None
    waits_for: str | None = None


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


class Problem(msgspec.Struct, tag="error", tag_field="reply"):
    """``code``: bad-request, not-found, refused, queue-full, busy, not-gone or error."""

    code: str
    message: str


Reply = (
    Submitted | Threads | Runs | RunDetails | Aborted | Purged | Resized | DaemonStatus | Problem
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
    for kind in (BadRequest, NotFound, Refused, QueueFull, Busy, NotGone):
        if problem.code == kind.code:
            raise kind(problem.message)
    raise RequestError(problem.message)


# ---- where the embedded server is -------------------------------------------------


class Endpoint(msgspec.Struct, frozen=True):
    """``state_dir/nats/client.json`` (0600): how clients of this user reach the embedded
    server, and know it. ``certificate``: the only one, PEM, that it may show; "" where an
    older daemon wrote this. The password is another one at each start of the server, and the
    port when somebody else has taken it: whoever connects reads this anew."""

    url: str
    user: str
    password: str
    certificate: str = ""

    def __repr__(self) -> str:
        return f"Endpoint(url={self.url!r})"

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def nats(self) -> Nats:
        """As it is connected to."""
        login = Login(self.user, self.password)
        return Nats(self.url, login=login, certificate=self.certificate)


#: Path of the ``Endpoint`` file below the state directory.
ENDPOINT_FILE = "nats/client.json"
