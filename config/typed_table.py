"""One table of a TOML file, read key by key, and the words for what is wrong with it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec

from .schema import ConfigError
from .units import (
    DURATION_FORMS,
    SIZE_FORMS,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

EXECUTOR_ID_FIX = (
    "use a name that stays the same across restarts: on Kubernetes a StatefulSet with "
    'executor_id = "${POD_NAME}" and POD_NAME from the downward API (fieldRef metadata.name); '
    'elsewhere a constant of this instance, such as executor_id = "box-1"'
)

VARIABLE = re.compile(r"\$(?:(?P<escape>\$)|\{(?P<name>[^{}]*)\}|(?P<open>\{))")
_VARIABLE_NAME = "[A-Za-z_][A-Za-z0-9_]*"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+(?:\[[0-9]+\])?")

_CENTURY = 36_500 * 86_400.0
"""Longest duration, seconds: JetStream counts nanoseconds in 64 bits."""
_MOST_BYTES = 2**62


class Table(msgspec.Struct, frozen=True):
    """A table of a file, read key by key. ``name`` is dotted; "" is the file itself.
    ``all_keys``: every key that a file may hold, by its full name.

    Every getter raises ConfigError for a value it cannot accept. Those of texts and paths
    return ``default`` for a missing key, ``texts`` and ``mapping`` nothing; the others need it."""

    file: Path
    name: str
    values: Mapping[str, Any]
    all_keys: Callable[[], Iterable[str]]

    def full_name(self, key: str) -> str:
        key = key if _BARE_KEY.fullmatch(key) else quote(key)
        return f"{self.name}.{key}" if self.name else key

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ConfigError(f"{self.file}: {self.full_name(key)}: {problem}")

    def mismatch(self, key: str, expected: str) -> NoReturn:
        self.fail(key, f"expected {expected}, got {kind_of(self.values[key])}")

    def only(self, known: Iterable[str]) -> None:
        """Refuse keys other than ``known``."""
        known = list(known)
        for key in self.values:
            if key not in known:
                self.fail(key, f"unknown key: {self._advice(key, known)}")

    def _advice(self, key: str, known: list[str]) -> str:
        import difflib

        if close := difflib.get_close_matches(key, known, n=1):
            return f"did you mean {self.full_name(close[0])}?"
        if elsewhere := [name for name in self.all_keys() if name.split(".")[-1] == key]:
            return f"did you mean {' or '.join(elsewhere)}?"
        return f"remove it, or use one of {', '.join(map(self.full_name, known))}"

    def table(self, key: str) -> Table:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            self.mismatch(key, "a table")
        return Table(self.file, self.full_name(key), value, self.all_keys)

    def text(self, key: str, default: str | None = None, *, empty: bool = False) -> str | None:
        """A string with its variables expanded, not empty unless ``empty``."""
        if key not in self.values:
            return default
        value = self._expanded(key, self.values[key])
        if not value.strip() and not empty:
            self.fail(key, "is empty: give it a value, or remove the key")
        return value

    def required(self, key: str, example: str) -> str:
        value = self.text(key)
        if value is None:
            self.fail(key, f"is missing: add {key} = {quote(example)}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> Any:
        """One of ``choices``: typed Any because callers store it in a Literal field."""
        expected = " or ".join(map(quote, choices))
        if key not in self.values:
            self.fail(key, f"is missing: set it to {expected}")
        value = self.text(key, empty=True)
        if value not in choices:
            self.fail(key, f"expected {expected}, got {quote(value or '')}")
        return value

    def flag(self, key: str) -> bool:
        value = self.values[key]
        if not isinstance(value, bool):
            self.mismatch(key, "true or false")
        return value

    def whole(self, key: str, least: int, most: int) -> int:
        value = self.values[key]
        if type(value) is not int:  # bool is an int to isinstance
            self.mismatch(key, "a whole number")
        return int(self._within(key, value, least, most, str))

    def number(self, key: str, least: float, most: float) -> float:
        value = self.values[key]
        if type(value) not in (int, float):
            self.mismatch(key, "a number")
        if isinstance(value, float) and not math.isfinite(value):  # any whole number is
            self.fail(key, f"expected a number, got {value}")
        return float(self._within(key, value, least, most, str))

    def seconds(self, key: str, least: float = 0.0) -> float:
        value = self.values[key]
        if isinstance(value, str):
            value = self._quantity(key, parse_duration)
        elif type(value) not in (int, float):
            self.mismatch(key, DURATION_FORMS)
        if isinstance(value, float) and not math.isfinite(value):  # any whole number is
            self.fail(key, f"expected {DURATION_FORMS}, got {value}")
        self._within(key, value, least, _CENTURY, format_duration)
        return float(value)

    def size(self, key: str, least: int) -> int:
        value = self.values[key]
        if isinstance(value, str):
            value = self._quantity(key, parse_size)
        elif type(value) is not int:
            self.mismatch(key, SIZE_FORMS)
        return int(self._within(key, value, least, _MOST_BYTES, format_size))

    def path(self, key: str, default: Path | None = None) -> Path | None:
        """A path, ``~`` expanded; a relative one starts at the file's directory."""
        value = self.text(key)
        if value is None:
            return default
        try:
            return self.file.parent / Path(value).expanduser()
        except RuntimeError:
            self.fail(key, f"no home directory for {quote(value)}: write the whole path")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings, none of them empty."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            self.mismatch(key, "a list of strings")
        items = []
        for index, item in enumerate(value):
            item = self._expanded(f"{key}[{index}]", item)
            if not item:
                self.fail(f"{key}[{index}]", "is empty: remove it")
            items.append(item)
        return tuple(items)

    def environment(self, key: str, taken: Collection[str], each: str) -> dict[str, str]:
        """Variables, none of those that runctld sets for ``each`` itself."""
        env, names = self.mapping(key), self.table(key)
        for name in env:
            if not name or "=" in name or "\0" in name:
                names.fail(name, 'an environment variable\'s name is not empty and holds no "="')
            if name in taken:
                names.fail(name, f"is set by runctld for each {each}: remove it")
        return env

    def mapping(self, key: str) -> dict[str, str]:
        """A table of strings (environment variables)."""
        table = self.table(key)
        return {name: table._expanded(name, value) for name, value in table.values.items()}

    def _quantity(self, key: str, parse: Any) -> Any:
        value = self.text(key)
        try:
            return parse(value)
        except ValueError as error:
            self.fail(key, f"{error}, got {quote(value or '')}")

    def _within(self, key: str, value: float, least: float, most: float, show: Any) -> float:
        if value < least:
            # A negative number has no form with a unit.
            shown = show(value) if value >= 0 else kind_of(value).removeprefix("the number ")
            self.fail(key, f"expected at least {show(least)}, got {shown}")
        if value > most:
            self.fail(key, f"expected at most {show(most)}")
        return value

    def _expanded(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            self.fail(key, f"expected a string, got {kind_of(value)}")

        def replace(match: re.Match[str]) -> str:
            if match["escape"]:
                return "$"
            name = match["name"]
            if name is None or not re.fullmatch(_VARIABLE_NAME, name):
                self.fail(
                    key, 'malformed variable: write "${NAME}", or "$${" for the characters "${"'
                )
            return self._variable(key, name)

        text = VARIABLE.sub(replace, value)
        if "\0" in text:
            self.fail(key, "holds a NUL character: remove it")
        return text

    def _variable(self, key: str, name: str) -> str:
        value = os.environ.get(name)
        if value is None:
            fix = EXECUTOR_ID_FIX if key == "executor_id" else "set it where runctld is started"
            self.fail(key, f"the environment variable {name} is not set: {fix}")
        if not _is_unicode(value):
            self.fail(key, f"the environment variable {name} is not UTF-8 text: correct it")
        return value


def _is_unicode(text: str) -> bool:
    """False if ``text`` holds surrogates, which is how os.environ shows stray bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: object) -> str:
    """What ``value`` is, in TOML's words. Strings are not quoted: they may be secrets."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            # Digits only up to a length: one line, and Python refuses to print huge ones.
            return f"the number {value}" if abs(value) < 1e18 else "a very large number"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "a table"
        case _:
            return "a date or time"


def check_url(
    table: Table,
    key: str,
    url: str,
    schemes: tuple[str, ...],
    otherwise: str = "",
    *,
    host_needed: bool = True,
) -> str:
    """The scheme of ``url``. The message never shows the URL: it may hold a password."""
    known = [f"{scheme}://" for scheme in schemes]
    expected = " or ".join([otherwise, *known] if otherwise else known)
    scheme, mark, _ = url.partition("://")
    if not mark or scheme.lower() not in schemes:
        got = f"{scheme}://" if mark and scheme.isalnum() else "something else"
        table.fail(key, f"expected {expected}, got {got}")
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        table.fail(key, "is not a valid URL: check its host, port and brackets")
    if any(character.isspace() for character in url):
        table.fail(key, 'is not a valid URL: it holds a space (write it as "%20")')
    if host_needed and not host:
        table.fail(key, f"names no host: write {scheme}://HOST:PORT")
    return scheme.lower()


def xdg_dir(variable: str, below_home: str) -> Path:
    """An XDG base directory; a relative value is ignored, as the XDG specification says."""
    named = os.environ.get(variable, "")
    if os.path.isabs(named):
        return Path(named)
    try:
        return Path.home() / below_home
    except RuntimeError as error:
        raise ConfigError(f"no home directory: set HOME or {variable}") from error


def quote(text: str) -> str:
    """``text`` as a TOML string: JSON's, with whatever cannot be printed escaped, such as
    DEL, line ends of Unicode, and what changes the direction of writing."""
    shown = json.dumps(text, ensure_ascii=False)
    return shown if shown.isprintable() else "".join(map(_escaped, shown))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
