"""What the work of a round noted down of itself (``work.Journal`` writes it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .work import stream_of, text


@dataclass(frozen=True)
class Line:
    """``label``: the attempt of a command, "c" and a number for a call of a chat endpoint.
    ``writer``: executor and pid of a process, or a call. ``what``: begin, part, alive, cut (the
    caller went away), saved (``part`` is in a checkpoint), fed (``part`` bytes came as stdin, the
    right ones if ``size``) or end. ``at``: seconds on the machine's monotonic clock."""

    run: str
    label: str
    writer: str
    what: str
    part: int
    size: int
    at: float


@dataclass
class Try:
    """One attempt, as its own work saw it."""

    run: str
    label: str
    first: float
    last: float = 0.0
    writers: set[str] = field(default_factory=set)
    parts: list[tuple[int, int]] = field(default_factory=list)
    ends: int = 0
    begins: int = 0
    saved: int = 0

    @property
    def executor(self) -> str:
        """Who ran it; "" of a chat."""
        return min(self.writers).rpartition("/")[0]

    def content(self, kind: str) -> dict[str, str]:
        """What it wrote, by stream. ``kind``: its runner."""
        found: dict[str, str] = {}
        for part, size in self.parts:
            name = {"chat": "text", "terminal": "stdout"}.get(kind) or stream_of(part)
            found[name] = found.get(name, "") + text(self.run, self.label, part, size)
        return found


def read(path: Path) -> list[Line]:
    """All whole lines; what the disk did not take is missing."""
    found = []
    for raw in path.read_text().splitlines() if path.exists() else []:
        run, label, writer, what, part, size, at = raw.split(" ")
        found.append(Line(run, label, writer, what, int(part), int(size), float(at)))
    return found


def tries(lines: list[Line]) -> dict[str, list[Try]]:
    """run -> its attempts, in the order in which they began."""
    found: dict[tuple[str, str], Try] = {}
    for line in lines:
        this = found.setdefault((line.run, line.label), Try(line.run, line.label, line.at))
        this.first = min(this.first, line.at)
        if line.what != "cut":  # only noticed then
            this.last = max(this.last, line.at)
        this.writers.add(line.writer)
        if line.what == "part":
            this.parts.append((line.part, line.size))
        elif line.what == "saved":
            this.saved = line.part
        elif line.what == "begin":
            this.begins += 1
        elif line.what == "end":
            this.ends += 1
    grouped: dict[str, list[Try]] = {}
    for this in sorted(found.values(), key=lambda x: x.first):
        grouped.setdefault(this.run, []).append(this)
    return grouped
