"""The keys of a section, read from its table as the schema says."""

from __future__ import annotations

from typing import Any

from .keys import (
    Argv,
    Choice,
    Entry,
    Environment,
    FilePath,
    Flag,
    Number,
    Own,
    Seconds,
    Section,
    Size,
    Text,
    Url,
    Whole,
    entries,
    names_of,
)
from .schema import AcpRunner, ChatRunner, CommandRunner, Config, PushRunner
from .typed_table import Table, check_url

#: The class for each ``kind`` of runner.
RUNNER_KINDS: dict[str, type[CommandRunner] | type[ChatRunner] | type[PushRunner]] = {
    "command": CommandRunner,
    "acp": AcpRunner,
    "chat": ChatRunner,
    "push": PushRunner,
}


def all_names() -> list[str]:
    """Every key by its full name, runners' as ``runners.NAME.key``."""
    names = names_of(Config)
    for entry in entries(Config):
        if entry.part is not None:
            names += [f"{entry.name}.{key}" for key in names_of(entry.part)]
    for key in dict.fromkeys(key for kind in RUNNER_KINDS.values() for key in names_of(kind)):
        names.append(f"runners.NAME.{key}")
    return names


def read_keys(section: type[Section], table: Table) -> dict[str, Any]:
    """The values in ``table`` of the keys of ``section``, but for those of kind ``Own``, which
    its own rules read, and for tables in it. What is not there is left out, so that the section
    has its default. Raises ConfigError, also for a key that the section does not have."""
    table.only(names_of(section))
    found = {}
    for entry in entries(section):
        if entry.key is None or isinstance(entry.key, Own):
            continue
        if entry.name in table.values:
            found[entry.name] = _read(entry, table)
        elif entry.key.example:
            table.required(entry.name, entry.key.example)
    return found


def _read(entry: Entry, table: Table) -> Any:
    name = entry.name
    match entry.key:
        case Text(empty=empty):
            return table.text(name, empty=empty)
        case Url(schemes=schemes):
            url = table.text(name) or ""
            if schemes:
                check_url(table, name, url, schemes)
            return url
        case Flag():
            return table.flag(name)
        case Whole(least=least, most=most):
            return table.whole(name, least, most)
        case Number(least=least, most=most):
            return table.number(name, least, most)
        case Seconds(least=least):
            return table.seconds(name, least)
        case Size(least=least):
            return table.size(name, least)
        case Choice():
            return table.choice(name, entry.choices)
        case FilePath():
            return table.path(name)
        case Argv():
            return table.texts(name)
        case Environment(each=each, taken=taken):
            return table.environment(name, taken, each)
        case _:
            raise TypeError(f"{entry.key!r} has no rule to read it")
