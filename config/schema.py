"""What a configuration may hold: its sections as frozen structs, and of each key, once, its
default, kind, bounds and a line of documentation (``keys`` says in which words).

Times are seconds (float), sizes are bytes (int) once loaded; files write them with
units ("24h", "4GiB"). ``load.load`` is the only maker of a ``Config`` from a file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .acp_schema import AcpRunner
from .integration_schema import ENDED, Gateway, Hooks, Metrics, Traces
from .keys import (
    Choice,
    FilePath,
    Flag,
    Hidden,
    Own,
    Seconds,
    Section,
    Size,
    Text,
    Url,
    Whole,
)
from .runner_schema import Account, ChatRunner, CommandRunner, Limits, PushRunner, Runner

__all__ = [
    "ENDED",
    "MAX_ID_BYTES",
    "Account",
    "AcpRunner",
    "ChatRunner",
    "CommandRunner",
    "Config",
    "ConfigError",
    "Database",
    "FileError",
    "Gateway",
    "History",
    "Hooks",
    "Limits",
    "Log",
    "Login",
    "Metrics",
    "Nats",
    "PushRunner",
    "Queue",
    "RunctlError",
    "Runner",
    "Stream",
    "Takeover",
    "Traces",
]


class RunctlError(Exception):
    """Root of the error tree (drawn in ``protocol/errors.py``)."""


class ConfigError(RunctlError):
    """The configuration cannot be used; names the file, the key and the fix."""


class FileError(ConfigError):
    """A file that the configuration names, such as one of credentials, cannot be used."""


#: Of an executor ID, in UTF-8.
MAX_ID_BYTES = 128
#: Seconds. Nothing that outlives its daemon does so for longer.
START_TIMEOUT = 30.0


class Database(Section, frozen=True):
    """``url``: "sqlite" (a file in the state directory) or a postgresql:// URL; with
    ``url_file`` it is what that file held when the configuration was read. ``lease_url``,
    and its file, are the same for the sessions that hold locks; "" means ``url``.
    ``insecure``, here and below: to be reached without knowing who answers, or who listens."""

    url: Annotated[
        str,
        Url(
            "Where runs are kept: a file in `state_dir`, or a PostgreSQL that daemons share.",
            form='`"sqlite"` or `postgresql://USER:PASSWORD@HOST:PORT/NAME`',
        ),
    ] = "sqlite"
    url_file: Annotated[
        Path | None, FilePath("A file that holds the URL instead.", holds="secret")
    ] = None
    lease_url: Annotated[
        str,
        Url(
            "The same database without a pooler, for the sessions that hold locks.",
            form="`postgresql://…`",
            default="`url`",
        ),
    ] = ""
    lease_url_file: Annotated[
        Path | None, FilePath("A file that holds `lease_url` instead.", holds="secret")
    ] = None
    insecure: Annotated[
        bool,
        Flag("Whether a PostgreSQL on another host may be used without verifying its certificate."),
    ] = False

    @property
    def embedded(self) -> bool:
        return self.url == "sqlite"


class Login(Section, frozen=True):
    """A user's name and password, or a token, from a NATS context file."""

    user: str | None = None
    password: Annotated[str | None, Hidden] = None
    token: Annotated[str | None, Hidden] = None


class Nats(Section, frozen=True):
    """``url``: "embedded", or the URLs (comma-separated) of a server or cluster.

    ``credentials``: a .creds file; ``nkey``: a file with a user's seed; at most one of
    them, ``login`` and a user in the URL. With ``context``, a NATS context file, all of
    it but ``replicas`` and ``insecure`` came from that file. ``inbox_prefix``: subject that
    replies to this user come below. ``certificate``: the only one, PEM, that the server may
    show, and it begins with TLS; the embedded server's, "" for any other. ``server``: the
    program that is run as the embedded server; None for the one that came with runctl."""

    url: Annotated[
        str,
        Url(
            "Where output and requests go: a server of our own, or others, separated by commas.",
            many=True,
            form='`"embedded"`, or URLs with `nats://`, `tls://`, `ws://` or `wss://`',
        ),
    ] = "embedded"
    context: Annotated[
        Path | None,
        Own(
            "A context of the `nats` command, in place of the other keys.",
            form="a name or a path",
        ),
    ] = None
    credentials: Annotated[
        Path | None, FilePath("Who we are there: a `.creds` file.", holds="secret")
    ] = None
    nkey: Annotated[
        Path | None, FilePath("Who we are there: a file with an nkey's seed.", holds="secret")
    ] = None
    tls_ca: Annotated[
        Path | None,
        FilePath(
            "The CA of the servers' certificates.",
            holds="trust",
            default="those that the system trusts",
        ),
    ] = None
    tls_cert: Annotated[
        Path | None, FilePath("Our certificate, where servers ask for one.", holds="trust")
    ] = None
    tls_key: Annotated[
        Path | None, FilePath("The key of `tls_cert`, not encrypted.", holds="secret")
    ] = None
    tls_first: Annotated[bool, Flag("Whether TLS comes before anything else is said.")] = False
    inbox_prefix: Annotated[
        str, Own("The subject below which replies to us come.", form="a subject without wildcards")
    ] = "_INBOX"
    replicas: Annotated[int, Whole("Copies of each record in a NATS cluster.", least=1, most=5)] = 1
    login: Login | None = None
    certificate: Annotated[str, Hidden] = ""
    insecure: Annotated[
        bool, Flag("Whether servers on other hosts may be reached without TLS.")
    ] = False
    server: Annotated[
        Path | None,
        FilePath(
            "The program that is run as the embedded server.",
            holds="trust",
            default="the one that came with runctl, else `nats-server` on `PATH`",
        ),
    ] = None

    @property
    def tls(self) -> bool:
        """Whether to send nothing to a server that does not speak TLS."""
        named = self.tls_ca or self.tls_cert or self.tls_first or self.certificate
        schemes = {url.partition("://")[0].strip().lower() for url in self.url.split(",")}
        return bool(named) or not schemes.isdisjoint(("tls", "wss"))

    @property
    def embedded(self) -> bool:
        return self.url == "embedded"


class Stream(Section, frozen=True):
    """Retention of output: ``max_age`` seconds from a run's end, ``max_bytes`` bytes over
    all threads, ``max_runs`` finished runs of each thread (0: any number).

    ``sync``: "default" lets JetStream flush to disk every two minutes (a process kill
    loses nothing, a power cut may); "always" flushes each record."""

    max_age: Annotated[
        float, Seconds("How long a run's output is kept, from the run's end.", least=1.0)
    ] = 24 * 3600.0
    max_bytes: Annotated[int, Size("How much output is kept over all threads.", least=1024**2)] = (
        4 * 1024**3
    )
    sync: Annotated[
        Literal["default", "always"],
        Choice("When output is flushed to disk: every two minutes, or each record at once."),
    ] = "default"
    max_runs: Annotated[
        int, Whole("Of how many finished runs of each thread output is kept; 0 for all.")
    ] = 1000


class Queue(Section, frozen=True):
    """``max_running`` runs at once on this executor; a run is tried ``max_attempts``
    times since its last checkpoint, ``max_total_attempts`` in all, and is then ``dead``;
    ``stop_grace`` seconds lie between TERM and KILL. A submit
    is refused while ``max_queued`` runs wait in the database, runs of ``max_queued_bytes``
    bytes, or ``max_queued_per_thread`` on its thread. Without its lease, while PostgreSQL is
    away, the daemon goes on for ``lease_grace`` seconds: less than its peers wait before a
    takeover. Without a daemon runs go on for ``outlive`` seconds."""

    max_running: Annotated[
        int, Whole("Runs at once on this executor.", live=True, least=1, most=1_000_000)
    ] = 1000
    max_attempts: Annotated[
        int,
        Whole(
            "Attempts of a run that takes the daemon down, since its last checkpoint; then it is"
            " `dead`.",
            live=True,
            least=1,
            most=1_000_000,
        ),
    ] = 5
    stop_grace: Annotated[float, Seconds("From TERM to KILL when a run is stopped.", live=True)] = (
        5.0
    )
    max_total_attempts: Annotated[
        int,
        Whole(
            "Attempts of a run in all, whether they got anywhere or not.",
            live=True,
            least=1,
            most=1_000_000,
        ),
    ] = 100
    max_queued: Annotated[int, Whole("Runs that may wait in the database.", live=True, least=1)] = (
        100_000
    )
    max_queued_per_thread: Annotated[
        int, Whole("Runs that may wait on one thread.", live=True, least=1)
    ] = 10_000
    # At least the largest run that there may be, and its JSON.
    max_queued_bytes: Annotated[
        int,
        Size("Bytes of the prompts and arguments that wait.", live=True, least=4 * 1024**2),
    ] = 1024**3
    outlive: Annotated[
        float,
        Seconds(
            "How long commands go on without a daemon, to be adopted by the next one; 0: they end"
            " with it.",
            default="`30s`; at most `start_timeout`",
        ),
    ] = 30.0
    # Other executors are told of it at the start.
    lease_grace: Annotated[
        float,
        Seconds(
            "How long runs go on while the connection to PostgreSQL is away.",
            default="`60s`; with takeover at most a second less than `takeover.after`",
        ),
    ] = 60.0


class History(Section, frozen=True):
    """Finished runs that stay listed: ``max_age`` seconds from their end, at most
    ``max_runs`` over all threads (0: any number)."""

    max_age: Annotated[
        float, Seconds("How long finished runs stay listed, from their end.", least=1.0)
    ] = 30 * 86400.0
    max_runs: Annotated[
        int, Whole("How many finished runs stay listed, over all threads; 0 for all.")
    ] = 100_000


class Log(Section, frozen=True):
    """``format`` "auto": fields to the journal when stderr is the journal, short lines to
    a terminal, else "plain": lines with time, level and what they are about."""

    format: Annotated[
        Literal["auto", "plain", "json"],
        Choice("`auto` is fields in systemd's journal, short lines on a terminal, else `plain`."),
    ] = "auto"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Choice("The least severe messages that are logged."),
    ] = "info"


class Takeover(Section, frozen=True):
    """Whether peers of ``group`` re-enqueue the unfinished runs of an executor whose
    lease has been gone for ``after`` seconds."""

    enabled: Annotated[
        bool,
        Flag(
            "Whether peers finish the runs of an executor that is gone; needs PostgreSQL and NATS."
        ),
    ] = False
    group: Annotated[str, Text("Executors take over from those of their group.")] = "default"
    # A dead daemon's runs are surely gone after two seconds.
    after: Annotated[float, Seconds("How long an executor must have been gone.", least=2.0)] = 3.0


class Config(Section, frozen=True):
    """A whole configuration. ``source`` is the file it came from, None for defaults.

    ``executor_id`` is None when it was not set: the daemon then generates a stable
    one in ``state_dir`` (allowed with an embedded database in development only).
    ``withheld``: variables of the environment that gave it secrets, which commands do
    not inherit; it does not count when two are compared."""

    state_dir: Annotated[
        Path,
        FilePath(
            "The database file, locks and the embedded server's store.",
            default="`$XDG_STATE_HOME/runctl`, or `~/.local/state/runctl`; as a service of systemd"
            " `$STATE_DIRECTORY`",
        ),
    ]
    source: Path | None = None
    executor_id: Annotated[
        str | None,
        Own(
            "Which daemon this is, over restarts; needed in production and with PostgreSQL.",
            form=f"a string of at most {MAX_ID_BYTES} bytes",
            default="generated once, and kept in `state_dir`",
        ),
    ] = None
    environment: Annotated[
        Literal["development", "production"],
        Choice("`production` refuses what `development` warns of."),
    ] = "development"
    start_timeout: Annotated[
        float, Seconds("How long to wait for NATS and the database at the start.", least=0.001)
    ] = START_TIMEOUT
    allow_shell: Annotated[
        bool,
        Flag("Whether there is the runner `shell`, which runs any command.", live=True),
    ] = True
    database: Database = Database()
    nats: Nats = Nats()
    stream: Stream = Stream()
    queue: Queue = Queue()
    history: History = History()
    takeover: Takeover = Takeover()
    log: Log = Log()
    metrics: Metrics = Metrics()
    traces: Traces = Traces()
    hooks: Hooks = Hooks()
    gateway: Gateway = Gateway()
    runners: Annotated[
        dict[str, Runner],
        Own("What `runctl submit --runner NAME` may start.", form="a table for each", live=True),
    ] = msgspec.field(default_factory=dict)
    withheld: frozenset[str] = frozenset()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Config):
            return NotImplemented
        return self._compared() == other._compared()

    def _compared(self) -> dict[str, Any]:
        found = msgspec.structs.asdict(self)
        del found["withheld"]
        return found
