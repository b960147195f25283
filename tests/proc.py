"""Processes as /proc has them: one that goes while it is looked at is not there."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether ``pid`` is a process that is not a zombie."""
    return read_proc(pid, "stat").rpartition(b")")[2].split()[:1] not in ([], [b"Z"])


def read_proc(pid: int, name: str) -> bytes:
    """``/proc/PID/name``; empty once the process has gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def open_files(pid: int) -> dict[int, str]:
    """What the descriptors of ``pid`` lead to; without those that it closes meanwhile."""
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


def is_stopped(pid: int) -> bool:
    """Whether no thread of ``pid`` runs, some time after a SIGSTOP."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        stats = [read_proc(pid, f"task/{x}/stat") for x in os.listdir(f"/proc/{pid}/task")]
        return all(stat.rpartition(b")")[2].split()[:1] in ([], [b"T"]) for stat in stats)
    return False


def direct_children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, read_proc(pid, f"task/{task}/children").split())
    return found


def children(pid: int, name: str) -> list[int]:
    """Descendants of ``pid`` whose executable is called ``name``."""
    found, todo = [], [pid]
    while todo:
        for child in direct_children(todo.pop()):
            todo.append(child)
            if read_proc(child, "comm").decode().strip() == name:
                found.append(child)
    return found


def find_keeper(daemon: int) -> int:
    """Its pid."""
    (keeper,) = (x for x in direct_children(daemon) if b"keeper.py" in read_proc(x, "cmdline"))
    return keeper


def end_all_of(state: Path) -> None:
    """End what outlived the daemons of a state directory: keepers first, which would wait for
    another daemon."""
    path = os.fsencode(os.path.realpath(state))
    for mark in (b"RUNCTL_KEEPER=" + path, b"RUNCTL_STATE=" + path):
        for name in os.listdir("/proc"):
            if name.isdigit() and mark in read_proc(int(name), "environ").split(b"\0"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(name), signal.SIGKILL)
