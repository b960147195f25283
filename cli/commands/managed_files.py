"""Files that are put where a service manager, or a user, finds them; and taken away again.

Each file of ours ends with a line that holds its own checksum: so it is known whether
anybody has changed it since. What was changed is somebody's work: it is replaced, or
removed, only when that is wished for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: What became of a file that somebody has changed.
LEFT = "left"
#: The last line of a file that was written here.
_MARK = "# written by runctl install-service; sha256 of the lines above: "
_MARKED = re.compile(rb"(?s)(.*)^" + re.escape(_MARK.encode()) + rb"([0-9a-f]{64})\n\Z", re.M)


@dataclass(frozen=True)
class File:
    """``text`` is what it is to hold. ``keep``: it is the user's from its first byte on, so
    it is never replaced or removed. ``mode``: permissions. ``closed``: its directory is for its
    owner alone if it has to be made."""

    path: Path
    text: str
    mode: int = 0o644
    keep: bool = False
    closed: bool = False

    @property
    def content(self) -> bytes:
        body = self.text.encode()
        return body if self.keep else body + _mark(body)

    def state(self) -> str:
        """ "missing", "same", "ours" (an earlier version, as it was written) or "changed"."""
        try:
            found = self.path.read_bytes()
        except FileNotFoundError:
            return "missing"
        if found == self.content:
            return "same"
        if self.keep:
            return "changed"
        return "ours" if untouched(found) else "changed"


def _mark(body: bytes) -> bytes:
    return f"{_MARK}{hashlib.sha256(body).hexdigest()}\n".encode()


def untouched(found: bytes) -> bool:
    """Whether ``found`` is as we have written it once."""
    match = _MARKED.fullmatch(found)
    return match is not None and found == match[1] + _mark(match[1])


def put(files: list[File], *, dry: bool, may: Callable[[Path], bool]) -> Iterator[tuple[str, Path]]:
    """Write what is to be written; (what was done, where), in order. ``may``: whether a
    file that somebody has changed is to be replaced. Raises OSError."""
    for file in files:
        state = file.state()
        if state == "same":
            yield "unchanged", file.path
        elif state == "changed" and (file.keep or not may(file.path)):
            yield ("kept" if file.keep else LEFT), file.path
        else:
            if not dry:
                _write(file)
            yield {"missing": "created", "ours": "updated", "changed": "replaced"}[state], file.path


def take(
    files: list[File], *, dry: bool, may: Callable[[Path], bool]
) -> Iterator[tuple[str, Path]]:
    """Remove what ``put`` has written; (what was done, where). Raises OSError."""
    for file in files:
        state = file.state()
        if state == "missing":
            continue
        if file.keep:
            yield "kept", file.path
        elif state == "changed" and not may(file.path):
            yield LEFT, file.path
        else:
            if not dry:
                file.path.unlink()
            yield "removed", file.path


def _write(file: File) -> None:
    """In one step, so that nobody reads half of it, after a power cut neither; with its mode
    from the first byte."""
    file.path.parent.parent.mkdir(parents=True, exist_ok=True)
    file.path.parent.mkdir(mode=0o700 if file.closed else 0o777, exist_ok=True)
    temporary = file.path.with_name(f".{file.path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(file.content)
        os.fchmod(out.fileno(), file.mode)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file.path)
    folder = os.open(file.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # not every file system can
        os.fsync(folder)
    os.close(folder)
