"""What was measured, beside what docs/agents.md has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .recipes import Figures
from .trial import MOMENTS, Result

HEAD = f"{'agent':<18} {'moment':<20} {'generations':>11} {'effects':>7} {'attempts':>8}  page"


def judge(result: Result, figures: Mapping[tuple[str, str], Figures]) -> list[str]:
    """What is wrong with it: of itself, and because it is worse than the page has it."""
    wrong = [*result.wrong]
    if wrong:
        return wrong
    if result.attempts != result.moment.attempts:
        wrong.append(f"{result.attempts} attempts, not {result.moment.attempts}")
    if (wanted := figures.get((result.agent, result.moment.name))) is not None and (
        result.generations > wanted[0] or result.effects > wanted[1]
    ):
        wrong.append("that is worse than docs/agents.md has it")
    if result.effects < 1 or result.generations < 2:
        wrong.append("it did less than its task")
    return wrong


def one_line(result: Result, figures: Mapping[tuple[str, str], Figures]) -> str:
    name = result.moment.name
    wanted = figures.get((result.agent, name))
    page = "-" if wanted is None else f"{wanted[0]}, {wanted[1]}"
    return (
        f"{result.agent:<18} {name:<20} {result.generations:>11} {result.effects:>7}"
        f" {result.attempts:>8}  {page}"
    )


def draw_table(results: Sequence[Result], versions: Mapping[str, str]) -> list[str]:
    """In Markdown: a row for each agent, generations and effects for each moment. ``versions``:
    by agent."""
    found = {(x.agent, x.moment.name): x for x in results}
    names = [x.name for x in MOMENTS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for agent in dict.fromkeys(x.agent for x in results):
        cells = [found[agent, name] for name in names]
        row = " | ".join(f"{x.generations}, {x.effects}" for x in cells)
        lines.append(f"| {agent} {versions[agent]} | {row} |")
    return lines
