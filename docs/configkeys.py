"""Write the key list of docs/configuration.md from the schema: ``python docs/configkeys.py``.

With the name of a file, the whole page to that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from runctl.config import keys
from runctl.config.read_keys import RUNNER_KINDS
from runctl.config.schema import Config
from runctl.config.units import format_duration, format_size

PAGE = Path(__file__).with_name("configuration.md")
BEGIN = "<!-- The rest is written by `make keys`. -->"
HEAD = "| Key | Value | Default | SIGHUP | Meaning |\n|---|---|---|---|---|"


def main(file: Path) -> None:
    written, found, _ = PAGE.read_text().partition(BEGIN)
    assert found, f"{PAGE} has lost its mark"
    file.write_text(f"{written}{BEGIN}\n\n" + "\n".join(lines()) + "\n")


def lines() -> Iterator[str]:
    yield "## At the top"
    yield from table(Config)
    for part in keys.entries(Config):
        if part.part is not None:
            yield f"\n## [{part.name}]"
            yield from table(part.part)
    live = next(entry.key for entry in keys.entries(Config) if entry.name == "runners")
    assert live is not None
    for kind, section in RUNNER_KINDS.items():
        yield f'\n## [runners.NAME], kind = "{kind}"'
        yield from table(section, live.live)


def table(section: type[keys.Section], live: bool = False) -> Iterator[str]:
    """``live``: all of its keys are, whatever they say themselves."""
    yield f"\n{HEAD}"
    yield from rows(section, live, "")


def rows(section: type[keys.Section], live: bool, above: str) -> Iterator[str]:
    for entry in keys.entries(section):
        if entry.key is not None:
            default = show_default(entry, entry.key)
            reload = "live" if live or entry.key.live else "restart"
            value = show_value(entry, entry.key)
            yield f"| `{above}{entry.name}` | {value} | {default} | {reload} | {entry.key.doc} |"
        elif entry.part is not None and section is not Config:
            yield from rows(entry.part, live, f"{above}{entry.name}.")


def show_value(entry: keys.Entry, key: keys.Key) -> str:
    match key:
        case keys.Own(form=form):
            return form
        case keys.Url(schemes=schemes, form=form):
            return form or "a URL with " + " or ".join(f"`{scheme}://`" for scheme in schemes)
        case keys.Flag():
            return "`true` or `false`"
        case keys.Choice():
            return " or ".join(f'`"{choice}"`' for choice in entry.choices)
        case keys.Whole(least=least, most=most) | keys.Number(least=least, most=most):
            what = "a whole number" if isinstance(key, keys.Whole) else "a number"
            return f"{what}, {least:,} to {most:,}"
        case keys.Seconds(least=least):
            return f"a duration, at least `{format_duration(least)}`" if least else "a duration"
        case keys.Size(least=least):
            return f"a size, at least `{format_size(least)}`" if least else "a size"
        case keys.FilePath():
            return "a path"
        case keys.Argv():
            return "a list of strings"
        case keys.Environment():
            return "a table of strings"
    return "a string"


def show_default(entry: keys.Entry, key: keys.Key) -> str:
    if key.default:
        return key.default
    if key.example:
        return f'required, such as `"{key.example}"`'
    value: Any = entry.default
    assert value is not msgspec.NODEFAULT, entry.name
    match value:
        case None | () | "" | {}:
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case _ if isinstance(key, keys.Seconds):
            return f"`{format_duration(value)}`"
        case _ if isinstance(key, keys.Size):
            return f"`{format_size(value)}`"
        case str():
            return f'`"{value}"`'
        case tuple():
            return "all"
    return f"`{value}`"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE)
