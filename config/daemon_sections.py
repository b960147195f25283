"""The sections that the daemon alone needs, [database] and [takeover] with their rules: a command
starts without what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from .files import MOST_SECRET, read_bounded
from .gateway import check_other_users, read_gateway
from .integrations import read_hooks, read_metrics, read_traces
from .read_keys import read_keys
from .runners import read_runners
from .schema import Database, Nats, Takeover
from .typed_table import Table, check_url


def read_daemons(top: Table, nats: Nats, allow_shell: bool) -> dict[str, Any]:
    """By their names, runners among them. Raises ConfigError."""
    database = _read_database(top.table("database"))
    gateway, table = read_gateway(top.table("gateway")), top.table("gateway")
    runners = read_runners(top.table("runners"), allow_shell)
    check_other_users(gateway, runners, table)
    return {
        "database": database,
        "takeover": _read_takeover(top.table("takeover"), database, nats),
        "metrics": read_metrics(top.table("metrics")),
        "traces": read_traces(top.table("traces")),
        "hooks": read_hooks(top.table("hooks")),
        "gateway": gateway,
        "runners": runners,
    }


def _read_database(table: Table) -> Database:
    database = Database(**read_keys(Database, table))
    key, url = _find_url(table, "url", database.url_file, database.url)
    if url != "sqlite":
        check_url(table, key, url, ("postgresql",), '"sqlite"', host_needed=False)
    key, lease_url = _find_url(table, "lease_url", database.lease_url_file, database.lease_url)
    if key in table.values:
        if url == "sqlite":
            table.fail(key, "is for a PostgreSQL: set database.url, or remove it")
        check_url(table, key, lease_url, ("postgresql",), host_needed=False)
    return msgspec.structs.replace(database, url=url, lease_url=lease_url)


def _find_url(table: Table, key: str, file: Path | None, url: str) -> tuple[str, str]:
    """(the key that has it, the URL): ``url``, or what ``file`` holds."""
    if file is None:
        return key, url
    in_file = f"{key}_file"
    if key in table.values:
        table.fail(key, f"{table.full_name(in_file)} is set too: remove one")
    return in_file, _read_secret(table, in_file, file)


def _read_secret(table: Table, key: str, file: Path) -> str:
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


def _read_takeover(table: Table, database: Database, nats: Nats) -> Takeover:
    takeover = Takeover(**read_keys(Takeover, table))
    if takeover.enabled and database.embedded:
        table.fail("enabled", "needs executors that share a PostgreSQL: set database.url")
    if takeover.enabled and nats.embedded:
        table.fail("enabled", "needs executors that share a NATS: set nats.url")
    return takeover
