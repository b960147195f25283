"""Whether what a command has left behind is a filter that will end by itself.

``exec > >(filter)``, ``command | tee log &``: the command has ended, and what it wrote last is
on its way through a process that reads from a pipe and writes to the command's output. A
background job or daemon reads from the null device.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection

from ...processes.proctable import LINUX, scan

#: Device and inode of an open file, alike in each process that has it.
Identity = tuple[int, int]


def identity(fd: int) -> Identity:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def filters_left(session: int, outputs: Collection[Identity], stdin: Identity | None) -> bool:
    """Whether a process of ``session`` has one of ``outputs`` open and reads from a pipe or
    socket other than ``stdin``, the command's. One look at all processes: takes milliseconds.
    Without /proc nothing is known, and the answer is no."""
    if not LINUX:
        return False
    with contextlib.suppress(OSError):
        return any(
            row.session == session and not row.zombie and _is_filter(pid, outputs, stdin)
            for pid, row in scan().items()
        )
    return False


def _is_filter(pid: int, outputs: Collection[Identity], stdin: Identity | None) -> bool:
    """No for one that is gone, or that another user's is by now."""
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        found = os.stat(f"{folder}/0")
        piped = stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode)
        if piped and (found.st_dev, found.st_ino) != stdin:
            return any(_seen(f"{folder}/{name}") in outputs for name in os.listdir(folder))
    return False


def _seen(path: str) -> Identity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
