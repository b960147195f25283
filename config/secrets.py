"""Which parts of a configuration are secret: hidden in URLs and texts, and which variables
of the daemon's environment hold them, so that commands do not inherit these."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

from .keys import Argv, Environment, Key, Url, walk
from .schema import Config
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
    for _, key, value in walk(config):
        yield from _in_value(key, value)
    if (login := config.nats.login) is not None:
        yield login.password or ""
        yield login.token or ""
    for name in config.withheld:
        yield os.environ.get(name, "")


def _in_value(key: Key, value: Any) -> Iterator[str]:
    match key, value:
        case Url(many=many), str():
            for url in value.split(",") if many else [value]:
                yield from _in_url(url)
        case Environment(), dict():
            yield from (v for k, v in value.items() if _SECRET_NAME.search(k))
        case Key(secret=True), str():
            yield value
            yield value.split("/", 3)[-1]  # of a webhook's URL, which is its key
        case Key(secret=True), dict():  # headers
            for text in value.values():
                yield text
                yield text.rpartition(" ")[2]  # less "Bearer"


def _in_url(url: str) -> Iterator[str]:
    """As written, and as it is meant."""
    scheme, _, rest = url.partition("://")
    user, colon, password = rest.rpartition("@")[0].partition(":")
    login = password if colon else "" if scheme == "postgresql" else user
    for secret in (login, *(match[2] for match in _SECRET_PARAMETER.finditer(url))):
        yield secret
        yield unquote(secret)


def find_withheld(top: Table, config: Config) -> frozenset[str]:
    """The variables that hold the secrets which the file takes from the environment. One
    that only gives a host or a user is none of them; in commands' argv and env, where
    anything may stand, one is known by its name. A command that asks for one gets it; the others
    do not."""
    names: set[str] = set()
    for name, key, value in walk(config):
        written: Any = top.values
        for part in name.split("."):
            written = written.get(part) if isinstance(written, dict) else None
        names.update(_withheld_by(key, written, value))
    if not config.database.embedded:
        names.add("PGPASSWORD")  # libpq's, where the URL has none
    return frozenset(name for name in names if os.environ.get(name))


def _withheld_by(key: Key, written: object, value: Any) -> Iterable[str]:
    """``written``: what the file has for ``key``, before variables are replaced."""
    match key, written:
        case Url(many=many), str():
            shown = (hide_in_urls if many else hide_secrets)(value or "")
            return (n for n in _variables([written]) if os.environ.get(n, "") not in shown)
        case (Argv(), list()) | (Key(secret=True), list()):
            return _sound_secret(_variables(written))
        case Environment(), dict():
            return _sound_secret(_variables(written.values()))
        case Key(secret=True), dict():
            return _variables(written.values())
        case Key(secret=True), str():
            return _variables([written])
    return ()


def _variables(values: Iterable[object]) -> Iterator[str]:
    """Those that are named in ``values``."""
    for value in values:
        for match in VARIABLE.finditer(str(value)):
            if match["name"]:
                yield match["name"]


def _sound_secret(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if _SECRET_NAME.search(name))
