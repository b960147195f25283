"""What docs/agents.md says: how an agent is run, and what a kill costs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/agents.md"
BEGIN, END = "<!-- figures: made by `make agents`; not by hand -->", "<!-- figures end -->"
#: The keys of a runner that hold a command.
COMMANDS = ("argv", "next_argv", "resume_argv")


def read_recipes(page: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name, the runners in its blocks of TOML."""
    found = {}
    for text in re.findall(r"(?ms)^```toml\n(.*?)^```$", page):
        for name, table in tomllib.loads(text).get("runners", {}).items():
            found[table["kind"], name] = table
    return found


def place(recipe: Mapping[str, Any], commands: Path, cwd: Path) -> dict[str, Any]:
    """The same with programs from the directory ``commands``, working in ``cwd``."""
    table = {**recipe, "cwd": str(cwd)}
    for key in COMMANDS:
        if key in table:
            program, *words = table[key]
            table[key] = [str(commands / program), *words]
    return table


Figures = tuple[int, int]


def read_figures(page: str) -> dict[tuple[str, str], Figures]:
    """Generations and effects by agent and moment, as they stand in the page's table."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    found = {}
    if rows:
        for row in rows[2:]:
            for moment, cell in zip(rows[0][1:], row[1:], strict=True):
                generations, effects = map(int, cell.split(", "))
                found[row[0].split()[0], moment] = generations, effects
    return found


def write_figures(page: str, lines: list[str]) -> str:
    """The page with these lines for a table."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page has no {BEGIN}")
    return before + "\n".join([BEGIN, "", *lines, "", END]) + after
