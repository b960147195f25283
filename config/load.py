"""TOML file -> ``Config``, and ``Config`` -> text with the secrets hidden.

Whatever is wrong with a file is one ``ConfigError`` of one line: file, key, what was
expected and what was found, or the fix. A secret never appears in a message.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import tomli

from .accounts import describe_limits, find_account, read_limits, read_user
from .files import MOST_SECRET, MOST_TOML, read_bounded
from .integrations import (
    describe_hooks,
    describe_metrics,
    describe_traces,
    read_hooks,
    read_metrics,
    read_traces,
)
from .nats import describe_nats, nats_keys, read_nats
from .schema import (
    MAX_ID_BYTES,
    ChatRunner,
    CommandRunner,
    Config,
    ConfigError,
    Database,
    FileError,
    History,
    Hooks,
    Log,
    Metrics,
    Nats,
    Queue,
    Runner,
    Stream,
    Takeover,
    Traces,
)
from .secrets import HIDDEN, Masker, hide_in_urls, hide_secrets, withheld
from .typed_table import EXECUTOR_ID_FIX, check_url, quote, xdg_dir
from .typed_table import Table as _Table
from .units import format_duration, format_size

SYSTEM_FILE = Path("/etc/runctl/runctld.toml")

#: Seconds by which a daemon without its lease has ended before peers take over.
LEASE_MARGIN = 1.0

_RUNNER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_RUN_VARIABLES = ("RUNCTL_THREAD", "RUNCTL_RUN", "RUNCTL_ATTEMPT")


def load(path: Path | None = None, *, client: bool = False) -> Config:
    """The configuration in ``path``, or in the first default place that has one.

    With ``client`` only what is needed to find the daemon is read: ``runners`` stays
    empty, ``database`` and ``takeover`` are the defaults, and an ``executor_id`` that
    names an unset variable is None, since an operator's shell has neither the daemon's
    keys nor its pod name.
    Raises ConfigError.
    """
    file = Path(path) if path is not None else find_file()
    if file is None:
        return Config(state_dir=_default_state_dir(client), runners=_with_shell({}, True))
    file = file.absolute()
    return _read_config(_Table(file, "", _read_toml(file), _all_keys), client)


def find_file() -> Path | None:
    """$RUNCTL_CONFIG, else the system's file, else the user's; None if there is none.

    A file that is there but cannot be seen into counts as found: using another one
    silently would mean another state directory."""
    if named := os.environ.get("RUNCTL_CONFIG"):
        return Path(named)
    user_file = xdg_dir("XDG_CONFIG_HOME", ".config") / "runctl" / "runctld.toml"
    for file in (SYSTEM_FILE, user_file):
        try:
            os.lstat(file)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise FileError(_unreadable(file, error)) from error
        return file
    return None


def _unreadable(file: Path, error: OSError) -> str:
    return (
        f"{file}: cannot be read: {error.strerror}: be the user that runs runctld,"
        " or name another file with --config"
    )


def _default_state_dir(client: bool) -> Path:
    """For a service of systemd what StateDirectory= made; a client that is part of some
    other service has nothing to find there. A client in a run is told by its daemon."""
    made = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if made and not client:
        return Path(made)
    told = os.environ.get("RUNCTL_STATE", "")
    if client and os.path.isabs(told):
        return Path(told)
    return xdg_dir("XDG_STATE_HOME", ".local/state") / "runctl"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomli.loads(read_bounded(file, MOST_TOML).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file: create it, or name another") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{file}: is a directory: name the file in it") from error
    except PermissionError as error:
        raise FileError(_unreadable(file, error)) from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        # Not only TOMLDecodeError: a number of 5,000 digits is a plain ValueError.
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: is not valid TOML: {reason}") from error


# --- the sections ------------------------------------------------------------------


def _keys(section: type) -> list[str]:
    """The keys a file may hold for a schema class: its fields, less those we fill in."""
    if section is Nats:
        return nats_keys()
    ours = ("name", "source", "withheld", "account")
    return [f.name for f in fields(section) if f.name not in ours]


# Defaults are read from instances: on a class with slots the names are descriptors.
_CONFIG = Config(state_dir=Path())
_DATABASE, _STREAM, _QUEUE = Database(), Stream(), Queue()
_HISTORY = History()
_LOG = Log()
_TAKEOVER = Takeover()
_CHAT = ChatRunner("", base_url="", model="")

_SECTIONS = {
    "database": Database,
    "nats": Nats,
    "stream": Stream,
    "queue": Queue,
    "history": History,
    "takeover": Takeover,
    "log": Log,
    "metrics": Metrics,
    "traces": Traces,
    "hooks": Hooks,
}
_RUNNER_KINDS: dict[str, type] = {"command": CommandRunner, "chat": ChatRunner}


def _all_keys() -> list[str]:
    """Every key by its full name, runners' as ``runners.NAME.key``."""
    names = _keys(Config)
    for section, schema in _SECTIONS.items():
        names += [f"{section}.{key}" for key in _keys(schema)]
    for key in dict.fromkeys(k for schema in _RUNNER_KINDS.values() for k in _keys(schema)):
        names.append(f"runners.NAME.{key}")
    return names


def _read_config(top: _Table, client: bool) -> Config:
    top.only(_keys(Config))
    environment = top.choice("environment", ("development", "production"), "development")
    database = _read_database(top.table("database"), client)
    allow_shell = top.flag("allow_shell", True)
    runners = {} if client else _read_runners(top.table("runners"), allow_shell)
    nats = read_nats(top.table("nats"), client)
    tells = _read_outside(top, client)
    takeover = _read_takeover(top.table("takeover"), database, nats, client)
    return Config(
        state_dir=top.path("state_dir") or _default_state_dir(client),
        source=top.file,
        executor_id=_read_executor_id(top, environment, database, client),
        environment=environment,
        start_timeout=top.seconds("start_timeout", _CONFIG.start_timeout, least=0.001),
        allow_shell=allow_shell,
        database=database,
        nats=nats,
        stream=_read_stream(top.table("stream")),
        queue=_read_queue(top.table("queue"), takeover),
        history=_read_history(top.table("history")),
        takeover=takeover,
        log=_read_log(top.table("log")),
        **tells,
        runners=runners,
        withheld=withheld(top, database, nats.url, runners.values()),
    )


def _read_outside(top: _Table, client: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, read in (("metrics", read_metrics), ("traces", read_traces), ("hooks", read_hooks)):
        table = top.table(name)
        table.only(_keys(_SECTIONS[name]))
        if not client:  # they may take keys from variables that only the daemon has
            found[name] = read(table)
    return found


def _read_executor_id(
    top: _Table, environment: str, database: Database, client: bool
) -> str | None:
    """The stable identity that decides which runs this daemon recovers."""
    key = "executor_id"
    if client:
        return _client_executor_id(top)
    if key not in top.values:
        if environment == "production":
            top.fail(key, f'is missing and environment = "production" needs it: {EXECUTOR_ID_FIX}')
        if not database.embedded:
            top.fail(key, f"is missing and a PostgreSQL database needs it: {EXECUTOR_ID_FIX}")
        return None
    value = top.text(key, empty=True) or ""
    if not value.strip():
        written = str(top.values[key])
        origin = f" (it is written as {quote(written)})" if written.strip() else ""
        top.fail(key, f"is empty{origin}: {EXECUTOR_ID_FIX}")
    if not value.isprintable():
        top.fail(key, f"holds characters that cannot be printed: {EXECUTOR_ID_FIX}")
    if len(value.encode()) > MAX_ID_BYTES:
        top.fail(
            key,
            f"expected at most {MAX_ID_BYTES} bytes, got {len(value.encode())}: shorten it",
        )
    return value


def _client_executor_id(top: _Table) -> str | None:
    try:
        return top.text("executor_id")
    except ConfigError:
        return None


def _read_database(table: _Table, client: bool) -> Database:
    table.only(_keys(Database))
    if client:  # its URL may come from a variable that only the daemon has
        return _DATABASE
    key, url, file = _read_database_url(table, "url", _DATABASE.url)
    if url != "sqlite":
        check_url(table, key, url, ("postgresql",), '"sqlite"', host_needed=False)
    key, lease_url, lease_file = _read_database_url(table, "lease_url", _DATABASE.lease_url)
    if key in table.values:
        if url == "sqlite":
            table.fail(key, "is for a PostgreSQL: set database.url, or remove it")
        check_url(table, key, lease_url, ("postgresql",), host_needed=False)
    return Database(
        url, file, lease_url, lease_file, insecure=table.flag("insecure", _DATABASE.insecure)
    )


def _read_database_url(table: _Table, key: str, default: str) -> tuple[str, str, Path | None]:
    """(the key that has it, the URL, its file)."""
    in_file = f"{key}_file"
    file = table.path(in_file)
    if file is None:
        return key, table.text(key, default) or "", None
    if key in table.values:
        table.fail(key, f"{table.full_name(in_file)} is set too: remove one")
    return in_file, _read_secret(table, in_file, file), file


def _read_secret(table: _Table, key: str, file: Path) -> str:
    """What ``file`` holds, without the white space around it."""
    try:
        text = read_bounded(file, MOST_SECRET).decode().strip()
    except OSError as error:
        table.fail(key, f"{file} cannot be read ({error.strerror}): correct the path or its mode")
    except UnicodeDecodeError:
        table.fail(key, f"{file} is not UTF-8 text: write it anew")
    if not text:
        table.fail(key, f"{file} is empty: write the URL to it")
    return text


def _read_log(table: _Table) -> Log:
    table.only(_keys(Log))
    return Log(
        format=table.choice("format", ("auto", "plain", "json"), _LOG.format),
        level=table.choice("level", ("debug", "info", "warning", "error"), _LOG.level),
    )


def _read_stream(table: _Table) -> Stream:
    table.only(_keys(Stream))
    return Stream(
        max_age=table.seconds("max_age", _STREAM.max_age, least=1.0),
        max_bytes=table.size("max_bytes", _STREAM.max_bytes, least=1024**2),
        max_runs=table.whole("max_runs", _STREAM.max_runs, 0, 1_000_000_000),
        sync=table.choice("sync", ("default", "always"), _STREAM.sync),
    )


def _read_queue(table: _Table, takeover: Takeover) -> Queue:
    table.only(_keys(Queue))
    most = takeover.after - LEASE_MARGIN if takeover.enabled else math.inf
    lease_grace = table.seconds("lease_grace", min(_QUEUE.lease_grace, most))
    if lease_grace > most:
        table.fail(
            "lease_grace",
            f"peers take over after {format_duration(takeover.after)}: with takeover at most"
            f" {format_duration(most)}; lower it, or raise takeover.after to"
            f" {format_duration(lease_grace + LEASE_MARGIN)}",
        )
    return Queue(
        max_running=table.whole("max_running", _QUEUE.max_running, 1, 1_000_000),
        max_attempts=table.whole("max_attempts", _QUEUE.max_attempts, 1, 1_000_000),
        stop_grace=table.seconds("stop_grace", _QUEUE.stop_grace),
        max_queued=table.whole("max_queued", _QUEUE.max_queued, 1, 1_000_000_000),
        max_queued_per_thread=table.whole(
            "max_queued_per_thread", _QUEUE.max_queued_per_thread, 1, 1_000_000_000
        ),
        # The largest run that there may be, and its JSON.
        max_queued_bytes=table.size("max_queued_bytes", _QUEUE.max_queued_bytes, least=4 * 1024**2),
        lease_grace=lease_grace,
    )


def _read_history(table: _Table) -> History:
    table.only(_keys(History))
    return History(
        max_age=table.seconds("max_age", _HISTORY.max_age, least=1.0),
        max_runs=table.whole("max_runs", _HISTORY.max_runs, 0, 1_000_000_000),
    )


def _read_takeover(table: _Table, database: Database, nats: Nats, client: bool) -> Takeover:
    table.only(_keys(Takeover))
    if client:
        return _TAKEOVER
    enabled = table.flag("enabled", _TAKEOVER.enabled)
    if enabled and database.embedded:
        table.fail("enabled", "needs executors that share a PostgreSQL: set database.url")
    if enabled and nats.embedded:
        table.fail("enabled", "needs executors that share a NATS: set nats.url")
    return Takeover(
        enabled=enabled,
        group=table.text("group", _TAKEOVER.group) or "",
        # A dead daemon's runs are surely gone after two seconds.
        after=table.seconds("after", _TAKEOVER.after, least=2.0),
    )


# --- runners -----------------------------------------------------------------------


def _read_runners(table: _Table, allow_shell: bool) -> dict[str, Runner]:
    runners: dict[str, Runner] = {}
    for name in table.values:
        if not _RUNNER_NAME.fullmatch(name):
            table.fail(name, "a runner's name is 1 to 64 of A-Z a-z 0-9 _ and -: rename it")
        if name == "shell" and not allow_shell:
            table.fail(name, "allow_shell = false forbids it: remove one of the two")
        runners[name] = _read_runner(name, table.table(name))
    return _with_shell(runners, allow_shell)


def _with_shell(runners: dict[str, Runner], allow_shell: bool) -> dict[str, Runner]:
    """``runners`` with the built-in ``shell``, unless it is forbidden or defined."""
    if allow_shell and "shell" not in runners:
        return {"shell": CommandRunner("shell", cwd="submitter"), **runners}
    return runners


def _read_runner(name: str, table: _Table) -> Runner:
    kind = table.choice("kind", tuple(_RUNNER_KINDS))
    if kind == "chat":
        for key in _COMMANDS_ONLY:
            if key in table.values:
                table.fail(key, 'is for kind = "command" only: remove it')
    table.only(_keys(_RUNNER_KINDS[kind]))
    return _read_command(name, table) if kind == "command" else _read_chat(name, table)


#: Keys of a command that a chat's table might hold by mistake.
_COMMANDS_ONLY = [key for key in _keys(CommandRunner) if key not in _keys(ChatRunner)]
#: What becomes of processes that have left a run's session, when it ends.
LEFTOVERS = ("end", "keep-until-daemon")


def _read_command(name: str, table: _Table) -> CommandRunner:
    argv = table.texts("argv")
    if not argv and not table.flag("args", True):
        table.fail(
            "args",
            "false needs an argv: without one, submitters give the whole command; name the command"
            " in argv, or remove args",
        )
    user, group = read_user(table)
    return CommandRunner(
        name,
        argv=argv,
        args=table.flag("args", False) and bool(argv),  # without argv it goes without saying
        cwd=_read_cwd(table, bool(argv)),
        user=user,
        group=group,
        limits=read_limits(table.table("limits")),
        env=table.environment(_RUN_VARIABLES, "run"),
        tty=table.flag("tty", False),
        merge_output=table.flag("merge_output", False),
        leftovers=table.choice("leftovers", LEFTOVERS, "end"),
        account=None if user is None else find_account(table, user, group),
    )


def _read_cwd(table: _Table, closed: bool) -> Path | Literal["submitter"] | None:
    """``closed``: the runner has an argv; then a submitter's directory has to be asked for."""
    if table.values.get("cwd", None if closed else "submitter") == "submitter":
        return "submitter"
    return table.path("cwd")


def _read_chat(name: str, table: _Table) -> ChatRunner:
    base_url = table.required("base_url", "http://127.0.0.1:8080/v1")
    check_url(table, "base_url", base_url, ("http", "https"))
    api_key, api_key_file = table.text("api_key"), table.path("api_key_file")
    if api_key is not None and api_key_file is not None:
        table.fail("api_key", f"{table.full_name('api_key_file')} is set too: remove one")
    return ChatRunner(
        name,
        base_url=base_url.rstrip("/"),
        model=table.required("model", "some-model"),
        api_key=api_key,
        api_key_file=api_key_file,
        system=table.text("system", empty=True),
        timeout=table.seconds("timeout", _CHAT.timeout, least=0.001),
        retry=table.seconds("retry", _CHAT.retry),
        history=table.whole("history", _CHAT.history, 0, 1_000_000),
        history_bytes=table.size("history_bytes", _CHAT.history_bytes, least=0),
        insecure=table.flag("insecure", _CHAT.insecure),
    )


# --- the effective configuration ---------------------------------------------------


def describe(config: Config) -> str:
    """The effective configuration as TOML, secrets as ``***``, ends with a newline.

    Without secrets in it the text is itself a configuration, and loads as ``config``."""
    return "\n".join(_describe(config)) + "\n"


def _describe(config: Config) -> Iterator[str]:
    yield f"# from {config.source or 'the built-in defaults'}"
    if config.executor_id is None:
        yield "# executor_id: not set; generated once and kept in state_dir"
    else:
        yield _line("executor_id", config.executor_id)
    if config.withheld:
        yield f"# not in the environment of commands: {', '.join(sorted(config.withheld))}"
    yield _line("environment", config.environment)
    yield _line("state_dir", config.state_dir)
    yield _line("start_timeout", format_duration(config.start_timeout))
    yield _line("allow_shell", config.allow_shell)
    database = config.database
    yield from _lines(
        "database",
        url=None if database.url_file else hide_secrets(database.url),
        url_file=database.url_file,
        lease_url=None if database.lease_url_file else hide_secrets(database.lease_url) or None,
        lease_url_file=database.lease_url_file,
        insecure=database.insecure,
    )
    yield from _lines("nats", **describe_nats(config.nats, hide_in_urls(config.nats.url)))
    stream, queue = config.stream, config.queue
    yield from _lines(
        "stream",
        max_age=format_duration(stream.max_age),
        max_bytes=format_size(stream.max_bytes),
        max_runs=stream.max_runs,
        sync=stream.sync,
    )
    yield from _lines(
        "queue",
        max_running=queue.max_running,
        max_attempts=queue.max_attempts,
        stop_grace=format_duration(queue.stop_grace),
        max_queued=queue.max_queued,
        max_queued_per_thread=queue.max_queued_per_thread,
        max_queued_bytes=format_size(queue.max_queued_bytes),
        lease_grace=format_duration(queue.lease_grace),
    )
    yield from _lines(
        "history",
        max_age=format_duration(config.history.max_age),
        max_runs=config.history.max_runs,
    )
    takeover = config.takeover
    yield from _lines(
        "takeover",
        enabled=takeover.enabled,
        group=takeover.group,
        after=format_duration(takeover.after),
    )
    yield from _lines("log", format=config.log.format, level=config.log.level)
    hide = Masker(config)
    yield from _lines("metrics", **describe_metrics(config.metrics))
    yield from _lines("traces", **describe_traces(config.traces))
    yield from _lines("hooks", **describe_hooks(config.hooks, hide))
    for name, runner in config.runners.items():
        yield from _lines(f"runners.{name}", **_describe_runner(runner, hide))


def _describe_runner(runner: Runner, hide: Callable[[str], str]) -> dict[str, object]:
    if isinstance(runner, CommandRunner):
        return {
            "kind": runner.kind,
            "argv": list(map(hide, runner.argv)),
            "args": runner.args if runner.argv else None,
            "cwd": runner.cwd,
            "user": runner.user,
            "group": runner.group,
            "limits": describe_limits(runner.limits) or None,
            "env": dict.fromkeys(runner.env, HIDDEN),
            "tty": runner.tty,
            "merge_output": runner.merge_output,
            "leftovers": runner.leftovers,
        }
    return {
        "kind": runner.kind,
        "base_url": hide_secrets(runner.base_url),
        "model": runner.model,
        "api_key": None if runner.api_key is None else HIDDEN,
        "api_key_file": runner.api_key_file,
        "system": runner.system,
        "timeout": format_duration(runner.timeout),
        "retry": format_duration(runner.retry),
        "history": runner.history,
        "history_bytes": format_size(runner.history_bytes),
        "insecure": runner.insecure,
    }


def _lines(section: str, **values: object) -> Iterator[str]:
    """A section; None is a key that is not set."""
    yield ""
    yield f"[{section}]"
    for key, value in values.items():
        if value is not None:
            yield _line(key, value)


def _line(key: str, value: object) -> str:
    return f"{key} = {_toml(value)}"


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            pairs = ", ".join(f"{quote(name)} = {_toml(item)}" for name, item in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case str() | Path():
            return quote(str(value).replace("$", "$$"))
        case _:
            return str(value)
