"""What a configuration may hold: frozen dataclasses, their defaults and units.

Times are seconds (float), sizes are bytes (int) once loaded; files write them with
units ("24h", "4GiB"). ``load.load`` is the only maker of a ``Config`` from a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class RunctlError(Exception):
    """Root of the error tree (drawn in ``protocol/errors.py``)."""


class ConfigError(RunctlError):
    """The configuration cannot be used; names the file, the key and the fix."""


class FileError(ConfigError):
    """A file that the configuration names, such as one of credentials, cannot be used."""


@dataclass(frozen=True, slots=True)
class Database:
    """``url``: "sqlite" (a file in the state directory) or a postgresql:// URL; with
    ``url_file`` it is what that file held when the configuration was read. ``lease_url``,
    and its file, are the same for the sessions that hold locks; "" means ``url``.
    ``insecure``, here and below: to be reached without knowing who answers, or who listens."""

    url: str = field(default="sqlite", repr=False)
    url_file: Path | None = None
    lease_url: str = field(default="", repr=False)
    lease_url_file: Path | None = None
    insecure: bool = False

    @property
    def embedded(self) -> bool:
        return self.url == "sqlite"


@dataclass(frozen=True, slots=True)
class Login:
    """A user's name and password, or a token, from a NATS context file."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Nats:
    """``url``: "embedded", or the URLs (comma-separated) of a server or cluster.

    ``credentials``: a .creds file; ``nkey``: a file with a user's seed; at most one of
    them, ``login`` and a user in the URL. With ``context``, a NATS context file, all of
    it but ``replicas`` and ``insecure`` came from that file. ``inbox_prefix``: subject that
    replies to this user come below. ``certificate``: the only one, PEM, that the server may
    show, and it begins with TLS; the embedded server's, "" for any other. ``server``: the
    program that is run as the embedded server; None for the one that came with runctl."""

    url: str = field(default="embedded", repr=False)
    context: Path | None = None
    credentials: Path | None = None
    nkey: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_first: bool = False
    inbox_prefix: str = "_INBOX"
    replicas: int = 1
    login: Login | None = None
    certificate: str = field(default="", repr=False)
    insecure: bool = False
    server: Path | None = None

    @property
    def tls(self) -> bool:
        """Whether to send nothing to a server that does not speak TLS."""
        named = self.tls_ca or self.tls_cert or self.tls_first or self.certificate
        schemes = {url.partition("://")[0].strip().lower() for url in self.url.split(",")}
        return bool(named) or not schemes.isdisjoint(("tls", "wss"))

    @property
    def embedded(self) -> bool:
        return self.url == "embedded"


@dataclass(frozen=True, slots=True)
class Stream:
    """Retention of output: ``max_age`` seconds from a run's end, ``max_bytes`` bytes over
    all threads, ``max_runs`` finished runs of each thread (0: any number).

    ``sync``: "default" lets JetStream flush to disk every two minutes (a process kill
    loses nothing, a power cut may); "always" flushes each record."""

    max_age: float = 24 * 3600.0
    max_bytes: int = 4 * 1024**3
    sync: Literal["default", "always"] = "default"
    max_runs: int = 1000


@dataclass(frozen=True, slots=True)
class Queue:
    """``max_running`` runs at once on this executor; a run is tried ``max_attempts``
    times and is then ``dead``; ``stop_grace`` seconds lie between TERM and KILL. A submit
    is refused while ``max_queued`` runs wait in the database, runs of ``max_queued_bytes``
    bytes, or ``max_queued_per_thread`` on its thread. Without its lease, while PostgreSQL is
    away, the daemon goes on for ``lease_grace`` seconds: less than its peers wait before a
    takeover."""

    max_running: int = 1000
    max_attempts: int = 5
    stop_grace: float = 5.0
    max_queued: int = 100_000
    max_queued_per_thread: int = 10_000
    max_queued_bytes: int = 1024**3
    lease_grace: float = 60.0


@dataclass(frozen=True, slots=True)
class History:
    """Finished runs that stay listed: ``max_age`` seconds from their end, at most
    ``max_runs`` over all threads (0: any number)."""

    max_age: float = 30 * 86400.0
    max_runs: int = 100_000


@dataclass(frozen=True, slots=True)
class Log:
    """``format`` "auto": fields to the journal when stderr is the journal, short lines to
    a terminal, else "plain": lines with time, level and what they are about."""

    format: Literal["auto", "plain", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class Takeover:
    """Whether peers of ``group`` re-enqueue the unfinished runs of an executor whose
    lease has been gone for ``after`` seconds."""

    enabled: bool = False
    group: str = "default"
    after: float = 3.0


@dataclass(frozen=True, slots=True)
class Metrics:
    """``listen``: HOST:PORT at which Prometheus reads; None for nowhere. A host other than
    loopback needs ``allow_remote``. ``token_file`` holds the bearer token that a request has to
    show, read at each so that it may be rotated; None: none is asked for."""

    listen: str | None = None
    allow_remote: bool = False
    token_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Traces:
    """``endpoint``: an OTLP/HTTP collector's URL for traces; None for no traces."""

    endpoint: str | None = None
    insecure: bool = False


#: How a run may end, in the words of its status.
#: Of an executor ID, in UTF-8.
MAX_ID_BYTES = 128
ENDED = ("succeeded", "failed", "aborted", "dead")


@dataclass(frozen=True, slots=True)
class Hooks:
    """What is told of each run that ends as one of ``on``. ``on_end``: a command's argv, a
    URL that JSON is posted to, or None. ``headers`` for a URL, ``env`` for a command.

    One try takes ``timeout`` seconds at most. Before the second there are ``backoff``
    seconds, and twice as many before each further; after ``tries`` it is given up."""

    on_end: tuple[str, ...] | str | None = field(default=None, repr=False)
    on: tuple[str, ...] = ENDED
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    env: dict[str, str] = field(default_factory=dict, repr=False)
    timeout: float = 10.0
    tries: int = 10
    backoff: float = 1.0
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Account:
    """Whose a run is: ``uid``, ``gid`` and the supplementary ``groups``; ``home`` and
    ``shell`` are what the system's user database says."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"
    shell: str = "/bin/sh"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of each run of a runner, None for none: ``memory`` in bytes, ``processes`` with their
    threads, ``cpu`` in cores, ``files`` that one process may have open."""

    memory: int | None = None
    processes: int | None = None
    cpu: float | None = None
    files: int | None = None


@dataclass(frozen=True, slots=True)
class CommandRunner:
    """A process. ``argv`` empty: given at submit time. "{prompt}" in an element is
    replaced by the prompt; without it the prompt goes to stdin. ``args``: submitters may add
    arguments to ``argv``. ``cwd`` None: the home directory of whom the run is of. ``tty``: it
    runs on a terminal of its own. ``merge_output``: stdout and stderr are one pipe.
    ``leftovers``: whether what has left a run's session ends with it, or goes on until the
    daemon ends. ``user`` and ``group``, names or numbers: whose its runs are, None for the
    daemon's; ``account`` is what the system says of them."""

    name: str
    kind: Literal["command"] = "command"
    argv: tuple[str, ...] = ()
    args: bool = False
    cwd: Path | Literal["submitter"] | None = None
    user: str | None = None
    group: str | None = None
    limits: Limits = field(default_factory=Limits)
    env: dict[str, str] = field(default_factory=dict, repr=False)
    tty: bool = False
    merge_output: bool = False
    leftovers: Literal["end", "keep-until-daemon"] = "end"
    account: Account | None = None


@dataclass(frozen=True, slots=True)
class ChatRunner:
    """An OpenAI-compatible endpoint. ``timeout``: longest silence in seconds, before
    the first and between any two events. The key is ``api_key``, or the content of
    ``api_key_file``, read at each run so that it may be rotated.

    ``retry``: seconds from a turn's first failure in which it is tried again, as long as no
    text has come. ``history``: earlier messages that are sent along, two a turn, and at most
    ``history_bytes`` bytes of them, in whole turns."""

    name: str
    base_url: str = field(repr=False)
    model: str
    kind: Literal["chat"] = "chat"
    api_key: str | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    system: str | None = None
    timeout: float = 60.0
    retry: float = 60.0
    history: int = 50
    history_bytes: int = 256 * 1024
    insecure: bool = False


Runner = CommandRunner | ChatRunner


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration. ``source`` is the file it came from, None for defaults.

    ``executor_id`` is None when it was not set: the daemon then generates a stable
    one in ``state_dir`` (allowed with an embedded database in development only).
    ``withheld``: variables of the environment that gave it secrets, which commands do
    not inherit."""

    state_dir: Path
    source: Path | None = None
    executor_id: str | None = None
    environment: Literal["development", "production"] = "development"
    start_timeout: float = 30.0
    allow_shell: bool = True
    database: Database = field(default_factory=Database)
    nats: Nats = field(default_factory=Nats)
    stream: Stream = field(default_factory=Stream)
    queue: Queue = field(default_factory=Queue)
    history: History = field(default_factory=History)
    takeover: Takeover = field(default_factory=Takeover)
    log: Log = field(default_factory=Log)
    metrics: Metrics = field(default_factory=Metrics)
    traces: Traces = field(default_factory=Traces)
    hooks: Hooks = field(default_factory=Hooks)
    runners: dict[str, Runner] = field(default_factory=dict)
    withheld: frozenset[str] = field(default=frozenset(), compare=False)
