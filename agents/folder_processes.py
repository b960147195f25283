"""Processes that belong to a private daemon, known by its folder's name. None where there is no
/proc."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def find_processes(folder: Path, *, environments: bool = False) -> dict[int, str]:
    """Those that name ``folder`` in their command line, or with ``environments`` in a variable:
    pid -> command line. Ourselves are not among them."""
    name, found = os.fsencode(folder), {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            said = words + (entry / "environ").read_bytes() if environments else words
        except OSError:
            continue
        pid = int(entry.name)
        if name in said and words and pid != os.getpid():
            found[pid] = words.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def kill_processes(folder: Path, patience: float, *, environments: bool = False) -> dict[int, str]:
    """Wait ``patience`` seconds for them to end by themselves, then kill those that are there. Who
    they were."""
    deadline = time.monotonic() + patience
    while found := find_processes(folder, environments=environments):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    left = found
    while left:  # what one of them has forked meanwhile is found by the next look
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in left:
                try:
                    os.kill(pid, number)
                except (ProcessLookupError, PermissionError):
                    pass
        left = find_processes(folder, environments=environments)
        found = {**left, **found}
    return found
