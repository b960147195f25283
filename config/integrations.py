"""What the daemon tells others by itself: [metrics], [traces] and [hooks]."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from .files import MOST_SECRET, read_bounded
from .read_keys import read_keys
from .schema import ENDED, FileError, Hooks, Metrics, Traces
from .secrets import HIDDEN
from .typed_table import Table, check_url

_LISTEN = r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:]+)):(?P<port>[0-9]{1,5})"
_TOKEN = rb"[!-~]+"
_HEADER = "[A-Za-z0-9!#$%&'*+.^_`|~-]+"


def read_metrics(table: Table) -> Metrics:
    metrics = Metrics(table.text("listen"), **read_keys(Metrics, table))
    token_file = metrics.token_file
    if metrics.listen is not None:
        host, _ = split_listen(metrics.listen, table)
        if not metrics.allow_remote and not is_loopback(host):
            lack = "password" if token_file is None else "TLS, so others may read the token"
            table.fail(
                "listen",
                f"{host} can be reached from other machines, and metrics have no {lack}:"
                " listen on 127.0.0.1, or set metrics.allow_remote = true",
            )
    if token_file is not None:
        try:
            read_token(token_file)
        except FileError as error:
            table.fail("token_file", str(error))
    return metrics


def read_token(file: Path) -> bytes:
    """The bearer token in ``file``, without the white space around it. Blocking. Raises
    FileError, which names the file and not the key."""
    try:
        token = read_bounded(file, MOST_SECRET).strip()
    except OSError as error:
        raise FileError(
            f"{file} cannot be read ({error.strerror}): correct the path or its mode"
        ) from None
    if not token:
        raise FileError(f"{file} is empty: write the token to it")
    if not re.fullmatch(_TOKEN, token):
        raise FileError(f"{file} holds no token: write one line of ASCII without spaces to it")
    return token


def split_listen(listen: str, table: Table | None = None) -> tuple[str, int]:
    """(host, port). Raises ConfigError in the words of ``table``, which has seen it first."""
    match = re.fullmatch(_LISTEN, listen)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        assert table is not None
        table.fail("listen", 'expected HOST:PORT such as "127.0.0.1:9464" or "[::1]:9464"')
    return match["six"] or match["host"], int(match["port"])


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_traces(table: Table) -> Traces:
    return Traces(**read_keys(Traces, table))


def read_hooks(table: Table) -> Hooks:
    values = read_keys(Hooks, table)
    on_end = _read_target(table)
    if values.get("env") and not isinstance(on_end, tuple):
        table.fail("env", "is for an on_end that is a command: remove it")
    return Hooks(on_end=on_end, on=_read_on(table), headers=_read_headers(table, on_end), **values)


def _read_target(table: Table) -> tuple[str, ...] | str | None:
    if isinstance(table.values.get("on_end"), list):
        argv = table.texts("on_end")
        if not argv:
            table.fail("on_end", "is empty: name a command, or remove the key")
        return argv
    if "on_end" in table.values and not isinstance(table.values["on_end"], str):
        table.mismatch("on_end", 'a command such as ["page", "ops"], or a URL')
    url = table.text("on_end")
    if url is not None:
        check_url(table, "on_end", url, ("http", "https"), 'a command ["NAME", ...]')
    return url


def _read_on(table: Table) -> tuple[str, ...]:
    if "on" not in table.values:
        return ENDED
    found = table.texts("on")
    for status in found:
        if status not in ENDED:
            table.fail("on", f"no run ends as {status!r}: use some of {', '.join(ENDED)}")
    if not found:
        table.fail("on", f"is empty: use some of {', '.join(ENDED)}, or remove the key")
    return found


def _read_headers(table: Table, on_end: tuple[str, ...] | str | None) -> dict[str, str]:
    headers, names = table.mapping("headers"), table.table("headers")
    for name, value in headers.items():
        if not re.fullmatch(_HEADER, name):
            names.fail(name, "is not a header's name: use letters, digits and -")
        if not value.isascii() or not value.isprintable():
            names.fail(name, "holds characters that a header cannot: use printable ASCII")
    if headers and not isinstance(on_end, str):
        table.fail("headers", "is for an on_end that is a URL: remove it")
    return headers


def shown_target(hooks: Hooks) -> str:
    """Where hooks go, in words that may be logged: the paths of webhooks are secrets."""
    if not isinstance(hooks.on_end, str):
        return hooks.on_end[0] if hooks.on_end else ""
    parts = urlsplit(hooks.on_end)
    host = parts.netloc.rpartition("@")[2]
    rest = "" if parts.path in ("", "/") and not parts.query else f"/{HIDDEN}"
    return f"{parts.scheme}://{host}{rest}"
