"""What a daemon's processes use, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

from .harness import Daemon


def process_tree(daemon: Daemon) -> dict[int, str]:
    """pid -> name of the daemon, what descends from it, and what names its directory."""
    parents, names, ours = {}, {}, set()
    folder = os.fsencode(daemon.folder)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid] = int(stat.rpartition(")")[2].split()[1])
        names[pid] = "keeper"
        if pid == daemon.process.pid:
            names[pid] = "daemon"
        elif b"nats-server" in command.split(b"\0")[0]:
            names[pid] = "nats-server"
        if folder in command or pid == daemon.process.pid:
            ours.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return {pid: names[pid] for pid in sorted(ours)}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024**2
