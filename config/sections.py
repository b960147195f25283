"""The sections whose keys have rules among each other: [database], [queue], [takeover], and
the executor ID."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from .files import MOST_SECRET, read_bounded
from .read_keys import read_keys
from .schema import MAX_ID_BYTES, ConfigError, Database, Nats, Queue, Takeover
from .typed_table import EXECUTOR_ID_FIX, Table, check_url, quote
from .units import format_duration

#: Seconds by which a daemon without its lease has ended before peers take over.
LEASE_MARGIN = 1.0


def read_executor_id(top: Table, environment: str, database: Database, client: bool) -> str | None:
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


def _client_executor_id(top: Table) -> str | None:
    try:
        return top.text("executor_id")
    except ConfigError:
        return None


def read_database(table: Table) -> Database:
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


def read_queue(table: Table, takeover: Takeover) -> Queue:
    queue = Queue(**read_keys(Queue, table))
    most = takeover.after - LEASE_MARGIN if takeover.enabled else math.inf
    if queue.lease_grace <= most:
        return queue
    if "lease_grace" in table.values:
        table.fail(
            "lease_grace",
            f"peers take over after {format_duration(takeover.after)}: with takeover at most"
            f" {format_duration(most)}; lower it, or raise takeover.after to"
            f" {format_duration(queue.lease_grace + LEASE_MARGIN)}",
        )
    return msgspec.structs.replace(queue, lease_grace=most)


def read_takeover(table: Table, database: Database, nats: Nats) -> Takeover:
    takeover = Takeover(**read_keys(Takeover, table))
    if takeover.enabled and database.embedded:
        table.fail("enabled", "needs executors that share a PostgreSQL: set database.url")
    if takeover.enabled and nats.embedded:
        table.fail("enabled", "needs executors that share a NATS: set nats.url")
    return takeover
