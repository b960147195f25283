"""What the daemon tells others by itself: [metrics], [traces] and [hooks]."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .files import MOST_SECRET, read_bounded
from .schema import ENDED, FileError, Hooks, Metrics, Traces
from .secrets import HIDDEN, hide_secrets
from .typed_table import Table, check_url
from .units import format_duration

_METRICS, _TRACES, _HOOKS = Metrics(), Traces(), Hooks()
_LISTEN = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:]+)):(?P<port>[0-9]{1,5})")
_TOKEN = re.compile(rb"[!-~]+")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_RUN_VARIABLES = ("RUNCTL_THREAD", "RUNCTL_RUN", "RUNCTL_ATTEMPT", "RUNCTL_STATUS", "RUNCTL_HOOK")


def read_metrics(table: Table) -> Metrics:
    listen = table.text("listen")
    remote = table.flag("allow_remote", _METRICS.allow_remote)
    token_file = table.path("token_file")
    if listen is not None:
        host, _ = split_listen(listen, table)
        if not remote and not is_loopback(host):
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
    return Metrics(listen=listen, allow_remote=remote, token_file=token_file)


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
    if not _TOKEN.fullmatch(token):
        raise FileError(f"{file} holds no token: write one line of ASCII without spaces to it")
    return token


def split_listen(listen: str, table: Table | None = None) -> tuple[str, int]:
    """(host, port). Raises ConfigError in the words of ``table``, which has seen it first."""
    match = _LISTEN.fullmatch(listen)
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
    endpoint = table.text("endpoint")
    if endpoint is not None:
        check_url(table, "endpoint", endpoint, ("http", "https"))
    return Traces(endpoint=endpoint, insecure=table.flag("insecure", _TRACES.insecure))


def read_hooks(table: Table) -> Hooks:
    on_end: tuple[str, ...] | str | None
    if isinstance(table.values.get("on_end"), list):
        on_end = table.texts("on_end")
        if not on_end:
            table.fail("on_end", "is empty: name a command, or remove the key")
    else:
        if "on_end" in table.values and not isinstance(table.values["on_end"], str):
            table.mismatch("on_end", 'a command such as ["page", "ops"], or a URL')
        on_end = table.text("on_end")
        if on_end is not None:
            check_url(table, "on_end", on_end, ("http", "https"), 'a command ["NAME", ...]')
    return Hooks(
        on_end=on_end,
        on=_read_on(table),
        headers=_read_headers(table, on_end),
        env=_read_env(table, on_end),
        timeout=table.seconds("timeout", _HOOKS.timeout, least=0.001),
        tries=table.whole("tries", _HOOKS.tries, 1, 1000),
        backoff=table.seconds("backoff", _HOOKS.backoff, least=0.001),
        insecure=table.flag("insecure", _HOOKS.insecure),
    )


def _read_on(table: Table) -> tuple[str, ...]:
    if "on" not in table.values:
        return _HOOKS.on
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
        if not _HEADER.fullmatch(name):
            names.fail(name, "is not a header's name: use letters, digits and -")
        if not value.isascii() or not value.isprintable():
            names.fail(name, "holds characters that a header cannot: use printable ASCII")
    if headers and not isinstance(on_end, str):
        table.fail("headers", "is for an on_end that is a URL: remove it")
    return headers


def _read_env(table: Table, on_end: tuple[str, ...] | str | None) -> dict[str, str]:
    env = table.environment(_RUN_VARIABLES, "hook")
    if env and not isinstance(on_end, tuple):
        table.fail("env", "is for an on_end that is a command: remove it")
    return env


def describe_metrics(metrics: Metrics) -> dict[str, object]:
    return {
        "listen": metrics.listen,
        "allow_remote": metrics.allow_remote,
        "token_file": metrics.token_file,
    }


def describe_traces(traces: Traces) -> dict[str, object]:
    return {
        "endpoint": traces.endpoint and hide_secrets(traces.endpoint),
        "insecure": traces.insecure,
    }


def describe_hooks(hooks: Hooks, hide: Any) -> dict[str, object]:
    return {
        "on_end": shown_target(hooks)
        if isinstance(hooks.on_end, str)
        else hooks.on_end and list(map(hide, hooks.on_end)),
        "on": list(hooks.on),
        "headers": dict.fromkeys(hooks.headers, HIDDEN) or None,
        "env": dict.fromkeys(hooks.env, HIDDEN) or None,
        "timeout": format_duration(hooks.timeout),
        "tries": hooks.tries,
        "backoff": format_duration(hooks.backoff),
        "insecure": hooks.insecure,
    }


def shown_target(hooks: Hooks) -> str:
    """Where hooks go, in words that may be logged: the paths of webhooks are secrets."""
    if not isinstance(hooks.on_end, str):
        return hooks.on_end[0] if hooks.on_end else ""
    parts = urlsplit(hooks.on_end)
    host = parts.netloc.rpartition("@")[2]
    rest = "" if parts.path in ("", "/") and not parts.query else f"/{HIDDEN}"
    return f"{parts.scheme}://{host}{rest}"
