"""What ``doctor`` asks others: the daemon, NATS, the database, and their clocks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sqlite3
import stat
import time
from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from typing import Any

from ...client.link import Impostor, Link, NotReady, dial
from ...client.requests import ask
from ...config.schema import Config
from ...protocol import __version__, messages, subjects
from ...protocol.errors import RequestError, Unavailable
from ..display.render import seconds, size
from .finding import Finding, fail, ok, split, warn

#: For each of them, seconds.
LIMIT = 8.0
#: Clocks that differ by more make times in listings hard to compare; by much more, wrong.
SKEW, BAD_SKEW = 2.0, 60.0
LEAST_SERVER = (2, 10)


async def nats(
    config: Config, holder: str | None
) -> tuple[messages.DaemonStatus | None, bool, list[Finding]]:
    """The daemon's own answer, if it gives one; and whether NATS, ours for certain if it is
    embedded, answers. ``holder``: who holds the state directory."""
    down = "start it: runctld" + (f" --config {config.source}" if config.source else "")
    try:
        async with asyncio.timeout(LIMIT):
            link = await dial(config)
    except (Unavailable, TimeoutError) as error:
        text = str(error) or f"NATS did not answer within {LIMIT:g} s"
        if config.nats.embedded and holder is None:
            found = [warn("daemon", "neither runctld nor its nats-server is running", down)]
            return None, False, found
        if isinstance(error, Impostor):
            return None, False, [split("nats", "fail", text)]
        if config.nats.embedded:
            said = f"{holder} holds the lock of {config.state_dir}, and its NATS does not answer"
            found = [fail("daemon", said, "see its log; restart it if it has just hung")]
            return None, False, found
        found = [split("nats", "fail", text), warn("daemon", "cannot be asked", "mend NATS")]
        return None, False, found
    try:
        status, found = await _daemon(config, link, holder, down)
        try:
            async with asyncio.timeout(LIMIT):
                found += await _server(config, link, up=status is not None)
        except (NotReady, TimeoutError) as error:
            text = str(error) or f"no answer within {LIMIT:g} s"
            found.append(fail("jetstream", text, "enable JetStream in the server's configuration"))
        except RequestError as error:
            found.append(fail("jetstream", str(error), "see docs/nats.md for the permissions"))
        except Unavailable as error:
            found.append(split("jetstream", "fail", str(error)))
        return status, True, found
    finally:
        await link.close()


async def _daemon(
    config: Config, link: Link, holder: str | None, down: str
) -> tuple[messages.DaemonStatus | None, list[Finding]]:
    request = messages.StatusRequest(alone=True)
    try:
        async with asyncio.timeout(LIMIT):
            status = await ask(link, request, messages.DaemonStatus, executor=config.executor_id)
    except (Unavailable, RequestError, TimeoutError) as error:
        if holder is not None:
            said = f"{holder} holds the lock of {config.state_dir} and does not answer"
            return None, [fail("daemon", said, "see its log; restart it if it has just hung")]
        return None, [warn("daemon", str(error).partition(";")[0] or "does not answer", down)]
    said = f"{status.version}, pid {status.pid}, up {seconds(status.uptime)}"
    if status.version != __version__:
        found = [warn("daemon", said, f"restart it: installed is {__version__}")]
    else:
        found = [ok("daemon", f"{said}, {status.running} running, {status.queued} queued")]
    if status.keeper_warning is not None:
        fix = "see whether a run has stopped it (SIGSTOP): runs as another user cannot"
        found.append(fail("keeper", status.keeper_warning, fix))
    found += _warnings(status.nats)
    found += [_unfinished(x) for x in status.unfinished]
    if status.hooks is not None and status.hooks.failed:
        said = f"{status.hooks.failed} given up since the daemon started"
        found.append(warn("hooks", said, "see the daemon's log for why"))
    return status, found


def _unfinished(x: messages.UnfinishedRun) -> Finding:
    if x.status == "running":
        said = f"{x.run} on thread {x.thread} is not executed: {x.why}"
        return warn("runs", said, "see the daemon's log if it is said again in a minute")
    said = f"{x.run} on thread {x.thread} has {x.status}, and its row does not say so: {x.why}"
    return fail("runs", said, "mend the database; the outcome is stored as soon as it can be")


def _warnings(nats: messages.NatsStatus) -> list[Finding]:
    """What the daemon knows of its stream that the stream itself does not show."""
    lines = [line for line in nats.warnings if " has lost " in line or " was deleted" in line]
    return [warn("stream", line, "see the daemon's log, and docs/nats.md") for line in lines]


async def _server(config: Config, link: Link, *, up: bool) -> list[Finding]:
    """``up``: whether the daemon answers."""
    from ...config.nats_internals import read_server_version

    found = []
    number = read_server_version(link.nc)
    numbers = tuple(int(x) for x in number.split("-")[0].split(".") if x.isdigit())
    if numbers < LEAST_SERVER:
        said = f"nats-server {number or 'of unknown version'}"
        found.append(fail("nats", said, "use 2.10 or newer; 2.11 is tested"))
    elif link.nc.max_payload < subjects.LEAST_PAYLOAD:
        found.append(
            fail(
                "nats",
                f"max_payload is {size(link.nc.max_payload)}",
                f"set max_payload to {subjects.LEAST_PAYLOAD} or more in its configuration",
            )
        )
    else:
        found.append(ok("nats", f"nats-server {number}, max_payload {size(link.nc.max_payload)}"))
    account = await link.api("INFO")
    limit, used = int(account["limits"].get("max_storage", -1)), int(account.get("storage", 0))
    began = time.time()
    try:
        stream = await link.api(f"STREAM.INFO.{subjects.STREAM}")
    except NotReady as error:
        if error.code != subjects.NO_STREAM:
            raise
        found.append(_none(config, up))
        stored = 0
    else:
        if "ts" in stream:
            found.append(_clock("clock of nats", _unix(stream["ts"]), began, time.time()))
        stored = int(stream["state"]["bytes"])
        found += _stream(config, stream["config"], stored)
    if limit >= 0 and limit - used < config.stream.max_bytes - stored:
        found.append(
            warn(
                "nats storage",
                f"{size(max(0, limit - used))} left of the account's {size(limit)}; output may"
                f" grow by {size(config.stream.max_bytes - stored)}",
                "raise the account's limit, or set a smaller stream.max_bytes",
            )
        )
    return found


def _none(config: Config, up: bool) -> Finding:
    from ...protocol.stream_config import adding

    if not up:
        return ok("stream", "none yet; the first start makes it")
    return fail(
        "stream",
        f"{subjects.STREAM} is gone under a running daemon, and all stored output with it",
        "the daemon makes it again within seconds, if it may; else: " + adding(config),
    )


def _stream(config: Config, settings: dict[str, Any], stored: int) -> list[Finding]:
    from nats.js.api import StreamConfig

    from ...protocol.stream_config import broken, differences, wanted

    found, needed = StreamConfig.from_response(deepcopy(settings)), wanted(config)
    embedded = config.nats.embedded
    findings = [fail("stream", *_parted(x)) for x in broken(found, needed, embedded=embedded)]
    most = found.max_bytes or -1
    for line in differences(found, needed, embedded=embedded):
        if " max_bytes = " in line:
            continue
        # Without these output is cut, or what is stored cannot be told.
        bad = " discard = " in line or " allow_direct = " in line
        findings.append((fail if bad else warn)("stream", *_parted(line)))
    if most != config.stream.max_bytes:
        findings.append(
            warn(
                "stream",
                f"{subjects.STREAM}: max_bytes is {size(most) if most >= 0 else 'none'},"
                f" configured is {size(config.stream.max_bytes)}",
                "restart the daemon, or edit the stream",
            )
        )
    return findings or [ok("stream", f"{size(stored)} of {size(most)} used")]


def _parted(line: str) -> tuple[str, str]:
    """What is said of a setting, and what to do."""
    for words in ("; it was not changed. Put it right: ", "; it was not changed. To change it: "):
        said, found, fix = line.partition(words)
        if found:
            return said, fix
    return line, "see docs/nats.md"


def _unix(stamp: str) -> float:
    whole, _, rest = stamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{rest[:6] or 0}")


def _clock(check: str, theirs: float, began: float, ended: float) -> Finding:
    """``theirs`` was read between ``began`` and ``ended`` of ours."""
    skew = max(began - theirs, theirs - ended, 0.0)
    if skew > SKEW:
        said = f"differs from this machine's by {seconds(skew)}"
        make = fail if skew > BAD_SKEW else warn
        return make(check, said, "run a time service (chrony, systemd-timesyncd) on both")
    return ok(check, f"agrees with this machine's within {SKEW:g} s")


def sqlite(config: Config) -> Finding:
    path = config.state_dir / "runctl.sqlite"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return ok("database", f"{path} is made by the first start")
    except OSError as error:
        return fail("database", f"{path}: {error.strerror}", "be the user that runs runctld")
    if not stat.S_ISREG(mode):
        return fail("database", f"{path} is no file", "move it away, and see who made it")
    try:
        made = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
        with contextlib.closing(made) as database:
            (journal,) = database.execute("PRAGMA journal_mode").fetchone()
            if path.stat().st_size < 256 * 1024**2:
                (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
            else:
                sound = "ok"
            runs = database.execute(
                "SELECT count(*) FROM workflow_status WHERE name = 'run_thread'"
            ).fetchone()[0]
    except sqlite3.Error as error:
        return fail("database", f"{path}: {error}", "restore it from a backup, or move it away")
    if sound != "ok":
        return fail("database", f"{path}: {sound}", "restore it from a backup, or move it away")
    if journal != "wal":
        return warn(
            "database", f"{path}: journal_mode is {journal}", "restart the daemon: it sets WAL"
        )
    files = [path, path.with_name(path.name + "-wal")]
    total = sum(file.stat().st_size for file in files if file.exists())
    return ok("database", f"{path}, {size(total)}, {runs} runs")


def postgres(config: Config, up: bool, hide: Callable[[str], str]) -> list[Finding]:
    """``up``: whether the daemon answers."""
    import psycopg

    found: list[Finding] = []
    name, key = "database", "url"
    try:
        with _link(config.database.url) as link:
            found += _ask_postgres(config, link, up)
            if config.database.lease_url:
                name = key = "lease_url"
                with _link(config.database.lease_url) as other:
                    found.append(_compare(link, other))
    except psycopg.Error as error:
        said = hide(" ".join(str(error).split()))
        fix = f"check database.{key}, the server, its pg_hba.conf, and the rights of its user"
        found.append(fail(name, said, f"{fix}, see docs/cluster.md"))
    return found


def _link(url: str) -> Any:
    """A connection. Raises psycopg.Error."""
    import psycopg
    from psycopg.rows import dict_row

    link = psycopg.connect(
        url,
        connect_timeout=int(LIMIT),
        autocommit=True,
        row_factory=dict_row,
        application_name="runctl doctor",
    )
    try:
        # Not as a parameter of the connection: PgBouncer refuses those that it does not know.
        link.execute(f"SET statement_timeout = {int(LIMIT * 1000)}")
    except BaseException:
        link.close()
        raise
    return link


def _compare(link: Any, other: Any) -> Finding:
    """Whether both are connected to the same database: what one has locked the other cannot."""
    lock = secrets.randbits(63)
    with link.transaction(), other.transaction():
        link.execute("SELECT pg_advisory_xact_lock(%s)", (lock,))
        row = other.execute("SELECT pg_try_advisory_xact_lock(%s) AS got", (lock,)).fetchone()
    if row["got"]:
        said = "database.lease_url leads to another database than database.url"
        return fail("lease_url", said, "let both end at the same database of the same server")
    return ok("lease_url", "the same database as database.url")


def _ask_postgres(config: Config, link: Any, up: bool) -> list[Finding]:
    began = time.time()
    row = link.execute(
        "SELECT extract(epoch FROM clock_timestamp())::float8 AS now,"
        " current_setting('server_version') AS version, pg_is_in_recovery() AS standby,"
        " has_database_privilege(current_database(), 'CREATE') AS may_create,"
        " to_regnamespace('dbos') IS NOT NULL AS made"
    ).fetchone()
    found = [_clock("clock of postgresql", row["now"], began, time.time())]
    said = f"PostgreSQL {row['version']}"
    if row["standby"]:
        found.append(fail("database", f"{said} is a standby", "connect to the primary"))
    elif not row["made"] and not row["may_create"]:
        fix = "GRANT CREATE ON DATABASE ... for the first start, see docs/cluster.md"
        found.append(fail("database", f"{said}, and its user may not create the schema", fix))
    else:
        found.append(ok("database", said + ("" if row["made"] else ", still empty")))
    if config.executor_id is not None:
        found.append(_lease(config.executor_id, link, up))
    return found


def _lease(executor: str, link: Any, up: bool) -> Finding:
    held = link.execute(
        "SELECT a.application_name AS name, coalesce(host(a.client_addr), 'a socket') AS peer"
        " FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory'"
        " AND l.granted AND l.objsubid = 1 AND"
        " l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND"
        " (l.classid::bigint << 32 | l.objid::bigint)"
        " = hashtextextended('runctl:' || %s::text, 0)",
        [executor],
    ).fetchone()
    if held is None and up:
        said = f"of executor {executor} is not held, and yet it answers"
        return fail("lease", said, "restart that daemon")
    if held is not None and not up:
        said = f"of executor {executor} is held by {held['name']} at {held['peer']}"
        return warn(
            "lease",
            said,
            "stop that daemon, or see why it does not answer; a lost machine's goes after 10 s",
        )
    return ok("lease", "free" if held is None else f"held by {held['name']} at {held['peer']}")
