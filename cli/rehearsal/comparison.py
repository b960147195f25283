"""What differs between two runs: outputs, how they ended, and directories."""

from __future__ import annotations

import difflib
import filecmp
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from .played_run import Played

#: Of a file, bytes that are looked at to say how it differs, and of a diff, lines that are shown.
MOST_BYTES, MOST_LINES = 16 * 1024 * 1024, 8
#: Lines around the first difference that a diff looks at: it is quadratic.
WINDOW = 60
#: What is said of lines that came once more, in a file and in output.
REPEATED, SAID_AGAIN = "its effects were repeated", "some came again"


class Difference(msgspec.Struct, frozen=True):
    """``where``: stdout, stderr, text, exit code, directory or watcher. ``path``: the file, in a
    directory. ``said``: in words. ``repeated``: it has the same lines, and some of them again.
    ``diff``: the first lines of a unified one."""

    where: str
    said: str
    path: str | None = None
    repeated: bool = False
    diff: list[str] = []


def list_parts(first: Played, second: Played, ignored: Sequence[str]) -> list[str]:
    """What is compared of them."""
    streams = sorted({*first.late, *second.late} - {*ignored})
    return [*streams, "exit code", "directory", "watcher"]


def compare(first: Played, second: Played, ignored: Sequence[str]) -> list[Difference]:
    """Of ``second``, against ``first``. ``ignored``: streams, and patterns of paths in the
    directory, that may differ."""
    found = []
    for name in sorted({*first.late, *second.late} - {*ignored}):
        was, now = first.late.get(name, b""), second.late.get(name, b"")
        if was != now:
            found.append(_explain(name, "it", was, now))
    if (said := _describe_end(second)) != (was_said := _describe_end(first)):
        found.append(Difference("exit code", f"{said}, not {was_said}"))
    found += _compare_folders(first.folder, second.folder, ignored)
    found += _compare_watchers(second)
    return found


def _compare_watchers(run: Played) -> Iterator[Difference]:
    """Who watched from the beginning against who came when it was over."""
    if run.missing:
        yield Difference("watcher", f"{run.missing} chunks never came")
    for name in sorted({*run.late, *run.early}):
        was, now = run.late.get(name, b""), run.early.get(name, b"")
        if was != now:
            yield _explain("watcher", name, was, now)


def _describe_end(run: Played) -> str:
    if run.exit_code is not None and run.status in ("succeeded", "failed"):
        return str(run.exit_code)
    return f"{run.status} ({run.error})" if run.error else run.status


def _compare_folders(first: Path, second: Path, ignored: Sequence[str]) -> Iterator[Difference]:
    was, now = _list_entries(first, ignored), _list_entries(second, ignored)
    for path in sorted({*was, *now}):
        if path not in now or path not in was:
            word = "missing" if path not in now else "new"
            yield _differ(path, (was | now)[path], f"is {word}")
            continue
        old, new = was[path], now[path]
        if stat.S_IFMT(old.st_mode) != stat.S_IFMT(new.st_mode):
            yield _differ(path, old, f"is a {_kind(new)}")
            continue
        if old.st_mode != new.st_mode:
            modes = f"has mode {stat.S_IMODE(new.st_mode):o}, not {stat.S_IMODE(old.st_mode):o}"
            yield _differ(path, old, modes)
        if stat.S_ISLNK(old.st_mode):
            old_to, new_to = os.readlink(first / path), os.readlink(second / path)
            if old_to != new_to:
                yield _differ(path, old, f"leads to {new_to}, not {old_to}")
        elif stat.S_ISREG(old.st_mode) and not filecmp.cmp(
            first / path, second / path, shallow=False
        ):
            contents = _read(first / path), _read(second / path)
            yield _explain("directory", f"the file {path}", *contents, path=path)


def _differ(path: str, entry: os.stat_result, said: str) -> Difference:
    return Difference("directory", f"the {_kind(entry)} {path} {said}", path)


def _list_entries(folder: Path, ignored: Sequence[str]) -> dict[str, os.stat_result]:
    """By paths in it; a directory that is ignored is not looked into."""
    found: dict[str, os.stat_result] = {}
    todo = [""]
    while todo:
        below = todo.pop()
        for entry in os.scandir(folder / below):
            path = os.path.join(below, entry.name)
            if any(fnmatchcase(path, pattern.removeprefix("./")) for pattern in ignored):
                continue
            found[path] = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                todo.append(path)
    return found


def _kind(entry: os.stat_result) -> str:
    names = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "symbolic link"))
    return next((name for test, name in names if test(entry.st_mode)), "special file")


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(MOST_BYTES)


def _explain(
    where: str, subject: str, was: bytes, now: bytes, path: str | None = None
) -> Difference:
    """How ``now`` differs, in a sentence about ``subject``."""
    try:
        old, new = (_split(x) for x in (was, now))
    except UnicodeDecodeError:
        number = _find_first(was, now) + 1
        return Difference(where, f"{subject} has another byte {number}", path)
    more, at = len(new) - len(old), _find_first(old, new)
    added, gone = Counter(new) - Counter(old), Counter(old) - Counter(new)
    repeated = bool(added) and not gone and not set(added) - set(old)
    lines = f"{abs(more)} line{'s' * (abs(more) > 1)} {'more' if more > 0 else 'less'}"
    if repeated:
        said = f"{subject} has {lines}: {REPEATED if path else SAID_AGAIN}"
    elif more:
        said = f"{subject} has {lines}, from line {at + 1} on"
    else:
        said = f"{subject} has another line {at + 1}"
    return Difference(where, said, path, repeated, _diff(old, new, at))


def _find_first(old: Sequence[object], new: Sequence[object]) -> int:
    """Where they begin to differ."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(old), len(new)))


def _split(data: bytes) -> list[str]:
    if b"\0" in data:
        raise UnicodeDecodeError("utf-8", data, 0, 1, "it is no text")
    return data.decode().split("\n")


def _diff(old: Sequence[str], new: Sequence[str], at: int) -> list[str]:
    """Its first lines. ``at``: the first that differs, counted from 0."""
    before = [f" {line}" for line in old[max(0, at - 1) : at]]
    window = slice(at, at + WINDOW)
    lines = difflib.unified_diff(old[window], new[window], n=1, lineterm="")
    changes = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return [*before, *changes][:MOST_LINES]
