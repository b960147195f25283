"""The section ``[nats]``, and the NATS CLI's context files that it may name.

Only contexts are read here, since they say where NATS is. Whether credentials and
certificates can be used is seen when connecting (``connection.py``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .files import MOST_SECRET, read_bounded
from .keys import entries, names_of
from .natsserver import not_a_program
from .read_keys import read_keys
from .schema import ConfigError, FileError, Login, Nats
from .typed_table import Table, check_url, kind_of, quote, xdg_dir

#: What the nats command connects to when a context has no URL.
CONTEXT_URL = "nats://127.0.0.1:4222"

_DEFAULT = Nats()
_SCHEMES = ("nats", "tls", "ws", "wss")
_PREFIX = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
#: "op://vault/item/field" and the like, which the nats command resolves.
_REFERENCE = "[A-Za-z][A-Za-z0-9+.-]*://"
_CONTEXT_NAME = r"[^/\\.][^/\\]*"
#: What a context calls our keys, where that is something else.
CONTEXT_KEYS = {"credentials": "creds", "tls_ca": "ca", "tls_cert": "cert", "tls_key": "key"}
#: A context's keys that change what we would have to do, and that we do not do.
_UNSUPPORTED = (
    "nsc",
    "socks_proxy",
    "jetstream_domain",
    "jetstream_api_prefix",
    "user_jwt",
    "user_seed",
    "windows_cert_store",
)


def read_nats(table: Table, client: bool = False) -> Nats:
    """``client``: who starts no server. Raises ConfigError; FileError when the context cannot be
    used."""
    values = read_keys(Nats, table)
    _check_server(table, values.get("server"), client)
    if "context" in table.values:
        for key in names_of(Nats):
            if key in table.values and key not in ("context", "replicas", "insecure"):
                table.fail(key, f"comes from {table.full_name('context')}: remove one of the two")
        return _read_context(table, values)
    url = values.get("url", _DEFAULT.url)
    if url == "embedded":
        for entry in entries(Nats):
            if entry.key is None or entry.name in ("url", "replicas", "server"):
                continue
            if table.values.get(entry.name, entry.default) != entry.default:
                table.fail(entry.name, "needs a server: set nats.url, or remove it")
        if values.get("replicas", 1) != 1:
            table.fail("replicas", "the embedded server is one server: set nats.url, or use 1")
        return Nats(server=values.get("server"))
    values["url"] = _check_urls(table, "url", url, '"embedded"')
    return _checked(table, Nats(inbox_prefix=_inbox_prefix(table), **values))


def _check_server(table: Table, file: Path | None, client: bool) -> None:
    if file is None:
        return
    if "context" in table.values or table.text("url", _DEFAULT.url) != _DEFAULT.url:
        table.fail("server", 'is the program of the embedded server: set nats.url = "embedded"')
    if not client and (problem := not_a_program(file)) is not None:
        table.fail("server", f"{problem}: name the program nats-server, or remove the key")


def _check_urls(table: Table, key: str, text: str, otherwise: str = "") -> str:
    urls = [part.strip() for part in text.split(",")]
    schemes = {check_url(table, key, part, _SCHEMES, otherwise) for part in urls}
    if schemes & {"ws", "wss"} and schemes & {"nats", "tls"}:
        table.fail(key, "mixes WebSocket and plain URLs: use one kind for all servers")
    # nats-py takes "TLS" for the name of a host.
    return ",".join(re.sub(r"^\w+", lambda scheme: scheme[0].lower(), url) for url in urls)


def _inbox_prefix(table: Table) -> str:
    prefix = table.text("inbox_prefix", _DEFAULT.inbox_prefix) or ""
    if not re.fullmatch(_PREFIX, prefix):
        table.fail(
            "inbox_prefix",
            "expected a subject without wildcards such as _INBOX.alice, of A-Z a-z 0-9 _ - and .",
        )
    return prefix


def _checked(table: Table, nats: Nats) -> Nats:
    """``nats``, if its settings go together. Raises ConfigError."""
    logins = [key for key in ("credentials", "nkey") if getattr(nats, key) is not None]
    if len(logins) > 1:
        table.fail("nkey", f"{table.full_name('credentials')} is set too: remove one")
    if logins and "@" in nats.url:
        table.fail(logins[0], f"{table.full_name('url')} holds a user too: remove one")
    if nats.tls_cert is None and nats.tls_key is not None:
        table.fail("tls_key", f"needs {table.full_name('tls_cert')}: add the certificate")
    if nats.tls_cert is not None and nats.tls_key is None:
        table.fail("tls_cert", f"needs {table.full_name('tls_key')}: add the key")
    for key in ("tls_ca", "tls_cert", "tls_first"):
        if getattr(nats, key) and re.search(r"(^|,)ws://", nats.url, re.IGNORECASE):
            table.fail(key, f"{table.full_name('url')} has ws://, which has no TLS: use wss://")
    if nats.tls_first and nats.url.lower().startswith("wss://"):
        table.fail("tls_first", "wss:// has TLS first by itself: remove it")
    return nats


# --- context files -----------------------------------------------------------------


class _Context(Table, frozen=True):
    """A context file as a table: strings are as they are, and what is wrong is a
    FileError that names the key which led here. Both our names and its own do."""

    def full_name(self, key: str) -> str:
        return quote(CONTEXT_KEYS.get(key, key))

    def fail(self, key: str, problem: str) -> NoReturn:
        raise FileError(f"{self.file}: {self.full_name(key)}: {problem} (it is nats.context)")

    def text(self, key: str, default: str | None = None, *, empty: bool = False) -> str | None:
        value = self.values.get(key)
        if value is None or value == "":
            return default
        if not isinstance(value, str):
            self.fail(key, f"expected a string, got {kind_of(value)}")
        if "\0" in value:
            self.fail(key, "holds a NUL character: remove it")
        if key != "url" and re.match(_REFERENCE, value):
            self.fail(
                key,
                "refers to a secret kept elsewhere, which runctl does not fetch:"
                " write the secret itself, or have a file with creds or nkey",
            )
        return value

    def path(self, key: str, default: Path | None = None) -> Path | None:
        """A whole path; the nats command takes another from wherever it is started."""
        text = self.text(key)
        if text is None:
            return default
        path = Path(os.path.expanduser(os.path.expandvars(text)))
        if not path.is_absolute():
            self.fail(key, "expected a file's whole path: write it from / or ~ on")
        return path


def _read_context(table: Table, values: Mapping[str, Any]) -> Nats:
    """``values``: of the section's keys that may stand beside the context."""
    file = _context_file(table)
    context = _Context(file, "", _read_json(table, file), tuple)
    for key in _UNSUPPORTED:
        if context.values.get(key):
            context.fail(key, "runctl does not support it: remove it, or set nats.url instead")
    user, token = context.text("user"), context.text("token")
    credentials, nkey = context.path("creds"), context.path("nkey")
    login = None
    # As the nats command has it: the first of these is used.
    if user is not None:
        login, credentials, nkey = Login(user, context.text("password", "")), None, None
    elif credentials is not None:
        nkey = None
    elif nkey is None and token is not None:
        login = Login(token=token)
    nats = Nats(
        url=_check_urls(context, "url", context.text("url") or CONTEXT_URL),
        context=file,
        credentials=credentials,
        nkey=nkey,
        tls_ca=context.path("ca"),
        tls_cert=context.path("cert"),
        tls_key=context.path("key"),
        tls_first="tls_first" in context.values and context.flag("tls_first"),
        inbox_prefix=_inbox_prefix(context),
        login=login,
        **values,
    )
    return _checked(context, nats)


def _context_file(table: Table) -> Path:
    """The file that the key "context" means: a path, or a name as the nats command has."""
    text = table.text("context") or ""
    if "/" in text or text.endswith(".json"):
        file = table.path("context")
        assert file is not None
        return file
    if not re.fullmatch(_CONTEXT_NAME, text):
        table.fail("context", "expected a context's name, or its file's path")
    try:
        directory = xdg_dir("XDG_CONFIG_HOME", ".config")
    except ConfigError:
        table.fail("context", "no home directory to look in: write the context file's path")
    return directory / "nats" / "context" / f"{text}.json"


def _read_json(table: Table, file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(read_bounded(file, MOST_SECRET))
    except FileNotFoundError:
        problem = "no such file: make it with `nats context save`, or correct the name"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        problem = "is not JSON: name a context file of the nats command"
    else:
        if isinstance(found, dict):
            return found
        problem = "is not a JSON object: name a context file of the nats command"
    raise FileError(f"{table.file}: {table.full_name('context')}: {file}: {problem}")
