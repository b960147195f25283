"""Which parts of a configuration are secret: hidden in URLs and texts, and which variables
of the daemon's environment hold them, so that commands do not inherit these."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

from .schema import ChatRunner, CommandRunner, Config, Database, Runner
from .typed_table import VARIABLE, Table

HIDDEN = "***"

_SECRET_PARAMETER = re.compile(
    r"([?&][^=&]*(?:pass|secret|token|key)[^=&]*=)([^&#]*)", re.IGNORECASE
)
_SECRET_NAME = re.compile(r"pass|secret|token|key|cred|auth", re.IGNORECASE)
#: Shorter ones are not looked for in texts: they are no secrets, and part of many words.
_SHORTEST = 4
#: From this length on a secret is hidden in the middle of a word as well.
_LONG = 12


def hide_secrets(url: str) -> str:
    """``url`` with the password, a NATS token and secret query parameters as ``***``.

    An unescaped "/" or "@" in a password must not end it, so all up to the last "@"
    counts as user and password: rather too much hidden than too little."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    login, at, place = rest.rpartition("@")
    if at:
        user, colon, _ = login.partition(":")
        # A user alone is a token to NATS and a plain user name to PostgreSQL.
        keep_user = colon or scheme == "postgresql"
        rest = f"{user if keep_user else HIDDEN}{':' + HIDDEN if colon else ''}@{place}"
    return _SECRET_PARAMETER.sub(rf"\1{HIDDEN}", f"{scheme}://{rest}")


def hide_in_urls(urls: str) -> str:
    """``hide_secrets`` of each; they are separated by commas."""
    return ",".join(map(hide_secrets, urls.split(",")))


class Masker:
    """Replaces the secrets of each configuration that it was given in any text by ``***``: for
    texts that others make, such as libraries' errors. Files of secrets are not read for it.
    One serves a whole daemon, so that after a reload all mask the new secrets, and the old ones."""

    def __init__(self, config: Config) -> None:
        self._found: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self.add(config)

    def add(self, config: Config) -> None:
        """``config`` is in force from now on; earlier ones' secrets stay hidden."""
        self._found |= set(plain_secrets(config))
        if self._found:
            forms = [
                re.escape(secret) if len(secret) >= _LONG else rf"(?<!\w){re.escape(secret)}(?!\w)"
                for secret in sorted(self._found, key=len, reverse=True)
            ]
            self._pattern = re.compile("|".join(forms))

    def __call__(self, text: str) -> str:
        return self._pattern.sub(HIDDEN, text) if self._pattern else text


def plain_secrets(config: Config) -> Iterator[str]:
    """As they are, but for those that are too short to be known in a text."""
    return (secret for secret in _secrets(config) if len(secret) >= _SHORTEST)


def _secrets(config: Config) -> Iterator[str]:
    yield from _in_url(config.database.url)
    yield from _in_url(config.database.lease_url)
    for url in config.nats.url.split(","):
        yield from _in_url(url)
    if (login := config.nats.login) is not None:
        yield login.password or ""
        yield login.token or ""
    for runner in config.runners.values():
        if isinstance(runner, ChatRunner):
            yield runner.api_key or ""
            yield from _in_url(runner.base_url)
        else:
            yield from (v for k, v in runner.env.items() if _SECRET_NAME.search(k))
    hooks = config.hooks
    if isinstance(hooks.on_end, str):  # a webhook's URL is its key
        yield hooks.on_end
        yield hooks.on_end.split("/", 3)[-1]
    for value in hooks.headers.values():
        yield value
        yield value.rpartition(" ")[2]  # less "Bearer"
    yield from (v for k, v in hooks.env.items() if _SECRET_NAME.search(k))
    yield from _in_url(config.traces.endpoint or "")
    for name in config.withheld:
        yield os.environ.get(name, "")


def _in_url(url: str) -> Iterator[str]:
    """As written, and as it is meant."""
    scheme, _, rest = url.partition("://")
    user, colon, password = rest.rpartition("@")[0].partition(":")
    login = password if colon else "" if scheme == "postgresql" else user
    for secret in (login, *(match[2] for match in _SECRET_PARAMETER.finditer(url))):
        yield secret
        yield unquote(secret)


def withheld(
    top: Table, database: Database, nats_url: str, runners: Iterable[Runner]
) -> frozenset[str]:
    """The variables that hold the secrets which the file takes from the environment. One
    that only gives a host or a user is none of them; in commands' argv and env, where
    anything may stand, one is known by its name."""
    names = set(_hidden_by(top.table("database"), "url", hide_secrets(database.url)))
    shown = hide_secrets(database.lease_url)
    names.update(_hidden_by(top.table("database"), "lease_url", shown))
    names.update(_hidden_by(top.table("nats"), "url", hide_in_urls(nats_url)))
    if not database.embedded:
        names.add("PGPASSWORD")  # libpq's, where the URL has none
    for runner in runners:
        table = top.table("runners").table(runner.name)
        if isinstance(runner, CommandRunner):  # one asks for it: the others do not
            names.update(_named(table.values.get("argv", ())))
            names.update(_named(table.table("env").values.values()))
        else:
            names.update(_hidden_by(table, "api_key", ""))
            names.update(_hidden_by(table, "base_url", hide_secrets(runner.base_url)))
    names.update(_of_hooks(top.table("hooks")))
    return frozenset(name for name in names if os.environ.get(name))


def _of_hooks(table: Table) -> Iterator[str]:
    on_end = table.values.get("on_end")
    if isinstance(on_end, list):
        yield from _named(on_end)
        yield from _named(table.table("env").values.values())
        return
    for value in (on_end, *table.table("headers").values.values()):
        yield from (m["name"] for m in VARIABLE.finditer(str(value)) if m["name"])


def _named(values: Iterable[object]) -> Iterator[str]:
    """The variables in ``values`` that sound like secrets."""
    for value in values:
        for match in VARIABLE.finditer(str(value)):
            if match["name"] and _SECRET_NAME.search(match["name"]):
                yield match["name"]


def _hidden_by(table: Table, key: str, shown: str) -> Iterator[str]:
    """The variables named in ``key`` whose values are not in ``shown``, its hidden form."""
    for match in VARIABLE.finditer(str(table.values.get(key, ""))):
        name = match["name"]
        if name and os.environ.get(name, "") not in shown:
            yield name
