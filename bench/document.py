"""Writes docs/performance.md and its charts from what was measured."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .report import Kind, Row, Table, machine, number

DOCS = Path(__file__).parent.parent / "docs"
CHARTS = DOCS / "charts"
COLOURS: dict[Kind, str] = {
    "ours": "#2563eb",
    "peer": "#d97706",
    "floor": "#9ca3af",
    "count": "#0d9488",
}

HEAD = """# Performance

Written by `make bench`, which measures all of this anew in about {minutes} minutes and
writes this file: each figure stands beside a floor (what cannot be beaten, such as the spawn
of a process) or another program, measured in the same run on the same machine.

Measured on {date}: {machine}.

* *ratio*: our median by that of the floor it is compared with.
* In the charts runctl is blue, other programs are orange, floors grey; a bar's line ends at p99.
* p99 of few samples is the worst of them. All clients and servers ran on this one machine.
* Rows in italics are counted, not timed: they are much the same on any machine.
"""


def write(tables: list[Table], seconds: float) -> None:
    CHARTS.mkdir(exist_ok=True)
    for old in CHARTS.glob("*.svg"):
        old.unlink()
    parts = [
        HEAD.format(
            minutes=max(1, round(seconds / 60)),
            date=time.strftime("%Y-%m-%d"),
            machine="; ".join(machine()),
        ),
        *(_summary(tables)),
    ]
    for table in tables:
        parts.append(_section(table))
    text = "\n".join(parts)
    (DOCS / "performance.md").write_text(text.rstrip() + "\n")
    print(f"written: {DOCS / 'performance.md'}")


def _summary(tables: list[Table]) -> list[str]:
    lines = ["## Aims", "", "| What | met | not met |", "|---|---|---|"]
    for table in tables:
        if table.verdicts:
            met, missed = (
                "; ".join(what for what, is_met in table.verdicts if is_met is wanted)
                for wanted in (True, False)
            )
            lines.append(f"| [{table.title}](#{_anchor(table.title)}) | {met} | {missed} |")
    lines += ["", "Why an aim is not met, and what the floor is, stands in the table's section."]
    return ["\n".join(lines) + "\n"]


def _anchor(title: str) -> str:
    """As GitHub makes it."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _section(table: Table) -> str:
    lines = [f"## {table.title}", ""]
    if table.aim:
        lines += [f"Aim: {table.aim}.", ""]
    if _draw(table):
        lines += [f"![{table.title}](charts/{table.key}.svg)", ""]
    lines += ["| | n | median | p99 | ratio |", "|---|---:|---:|---:|---:|"]
    lines += [_line(row) for row in table.rows]
    lines.append("")
    lines += [f"* {note}" for note in table.notes]
    return "\n".join(lines) + ("\n" if table.notes else "")


def _line(row: Row) -> str:
    name = f"**{row.name}**" if row.kind == "ours" else row.name
    if row.kind == "count":
        name = f"*{row.name}*"
    p99 = f"{number(row.p99)} {row.unit}" if len(row.samples) > 1 else ""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return f"| {name} | {len(row.samples)} | {number(row.median)} {row.unit} | {p99} | {ratio} |"


def _draw(table: Table) -> bool:
    """A bar for each timed row, a line from its median to its p99."""
    rows = [row for row in table.rows if row.kind != "count"]
    if len(rows) < 2 or len({row.unit for row in rows}) > 1:
        return False
    matplotlib.rcParams["svg.hashsalt"] = "runctl"  # the same figures, the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(8, 0.6 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row.median for row in rows], color=[COLOURS[row.kind] for row in rows])
    for place, row in enumerate(rows):
        axes.plot([row.median, row.p99], [place, place], color="#374151", linewidth=1)
        axes.annotate(
            f" {number(row.median)}",
            (row.p99, place),
            va="center",
            fontsize=8,
        )
    axes.set_yticks(list(places), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    medians = [row.median for row in rows if row.median > 0]
    if medians and max(medians) / min(medians) > 30:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(rows[0].unit, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(CHARTS / f"{table.key}.svg", metadata={"Date": None})
    return True
