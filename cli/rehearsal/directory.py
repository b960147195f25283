"""What is in a directory, and how two of them differ."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

#: Of a file's beginning; of what is larger only that and its size are compared.
MOST = 16 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """``kind``: "file", "directory", "link" or "other"; ``content``: of a file, or where a link
    leads to."""

    kind: str
    mode: int
    size: int = 0
    content: bytes = b""


def read_directory(root: Path) -> dict[str, Entry]:
    """By path below ``root``. What goes away meanwhile is left out."""
    found: dict[str, Entry] = {}
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(folder, name)
            try:
                found[str(path.relative_to(root))] = _read_entry(path)
            except OSError:
                continue
    return found


def _read_entry(path: Path) -> Entry:
    info = path.lstat()
    mode = stat.S_IMODE(info.st_mode)
    if stat.S_ISLNK(info.st_mode):
        return Entry("link", 0, content=os.fsencode(os.readlink(path)))
    if stat.S_ISDIR(info.st_mode):
        return Entry("directory", mode)
    if not stat.S_ISREG(info.st_mode):
        return Entry("other", mode)
    with path.open("rb") as file:
        return Entry("file", mode, info.st_size, file.read(MOST))


def compare_directories(wanted: Mapping[str, Entry], found: Mapping[str, Entry]) -> list[str]:
    """In words, a line each; none when they are equal."""
    lines = []
    for name in sorted({*wanted, *found}):
        a, b = wanted.get(name), found.get(name)
        if a is None:
            lines.append(f"{name}: there only after the kill")
        elif b is None:
            lines.append(f"{name}: missing after the kill")
        elif a.kind != b.kind:
            lines.append(f"{name}: a {b.kind} after the kill, a {a.kind} without")
        elif a.content != b.content or a.size != b.size:
            lines.append(f"{name}: {compare_texts(a.content, b.content)}")
        elif a.mode != b.mode:
            lines.append(f"{name}: its mode is {b.mode:o} after the kill, {a.mode:o} without")
    return lines


def compare_texts(wanted: bytes, found: bytes) -> str:
    """How ``found``, after a kill, differs from what is ``wanted``: in lines, and where first."""
    a, b = wanted.splitlines(keepends=True), found.splitlines(keepends=True)
    more = len(b) - len(a)
    said = []
    if more:
        count = abs(more)
        said.append(f"{count} line{'' if count == 1 else 's'} {'more' if more > 0 else 'fewer'}")
    for number, (x, y) in enumerate(zip_longest(a, b, fillvalue=b""), 1):
        if x.rstrip(b"\n") != y.rstrip(b"\n"):
            said.append(f"line {number} is {_quote(y)}, not {_quote(x)}")
            break
        if x != y:
            which = ("no end", "one") if x.endswith(b"\n") else ("an end", "none")
            said.append(f"line {number} has {which[0]}, and had {which[1]}")
            break
    return ", ".join(said)


def _quote(line: bytes) -> str:
    if not line:
        return "missing"
    text = line.decode(errors="replace").rstrip("\n")
    return repr(text if len(text) <= 50 else f"{text[:49]}…")
