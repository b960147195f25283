"""The executor ID and [queue], whose keys depend on those of other sections."""

from __future__ import annotations

import math

import msgspec

from .read_keys import read_keys
from .schema import MAX_ID_BYTES, ConfigError, Database, Queue, Takeover
from .typed_table import EXECUTOR_ID_FIX, Table, quote
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


def read_queue(table: Table, takeover: Takeover, start_timeout: float) -> Queue:
    queue = _bound_outlive(Queue(**read_keys(Queue, table)), table, start_timeout)
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


def _bound_outlive(queue: Queue, table: Table, start_timeout: float) -> Queue:
    """A start that cannot take over what runs waits for its end."""
    if queue.outlive <= start_timeout:
        return queue
    if "outlive" in table.values:
        table.fail(
            "outlive",
            f"a start waits no longer than start_timeout = {format_duration(start_timeout)} for"
            " what it cannot take over: lower it, or raise start_timeout to"
            f" {format_duration(queue.outlive)}",
        )
    return msgspec.structs.replace(queue, outlive=start_timeout)
