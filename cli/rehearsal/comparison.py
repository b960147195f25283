"""How one performance differs from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .directory import compare_directories, compare_texts
from .performance import Performance


@dataclass(frozen=True)
class Difference:
    """In words, a line each; nothing where they are equal."""

    output: list[str] = field(default_factory=list)
    end: list[str] = field(default_factory=list)
    directory: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.output or self.end or self.directory)


def compare(wanted: Performance, found: Performance) -> Difference:
    end = []
    if _end_of(wanted) != _end_of(found):
        end.append(f"{describe_end(found)} after the kill, {describe_end(wanted)} without")
    output = _compare_output(wanted.output, found.output)
    if found.early != found.output:
        differs = _compare_output(found.output, found.early)
        output += [f"who watched from the beginning: {line}" for line in differs]
    return Difference(output, end, compare_directories(wanted.files, found.files))


def _end_of(done: Performance) -> tuple[str, int | None]:
    return done.status, done.exit_code


def describe_end(done: Performance) -> str:
    code = "" if done.exit_code is None else f", exit code {done.exit_code}"
    why = "" if done.error is None or done.exit_code is not None else f" ({done.error})"
    return f"{done.status}{code}{why}"


def _compare_output(wanted: Mapping[str, bytes], found: Mapping[str, bytes]) -> list[str]:
    lines = []
    for stream in sorted({*wanted, *found}):
        a, b = wanted.get(stream, b""), found.get(stream, b"")
        if a != b:
            lines.append(f"{stream}: {compare_texts(a, b)}")
    return lines
