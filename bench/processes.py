"""What a daemon's processes use, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Usage:
    """What a set of processes used while it was looked at."""

    #: Percent of one core.
    cpu: float
    #: Context switches of all their threads, per second, voluntary or not.
    wakeups: float
    rss_mib: float
    #: Memory that is shared counts in parts: the sum over processes says what they take.
    pss_mib: float


def usage(pids: Iterable[int], seconds: float) -> Usage:
    """What ``pids`` use in the next ``seconds``, all of which must live through them."""
    pids = list(pids)
    cpu, before = {pid: cpu_seconds(pid) for pid in pids}, switches(pids)
    began = time.monotonic()
    time.sleep(seconds)
    used = sum(cpu_seconds(pid) - was for pid, was in cpu.items())
    # A thread that is new has switched since; what one that is gone did is not known any more.
    switched = sum(n - before.get(thread, 0) for thread, n in switches(pids).items())
    wall = time.monotonic() - began
    return Usage(
        cpu=used / wall * 100,
        wakeups=switched / wall,
        rss_mib=sum(map(rss_mib, pids)),
        pss_mib=sum(map(pss_mib, pids)),
    )


def switches(pids: Iterable[int]) -> dict[str, int]:
    """Context switches so far, by thread."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                status = (task / "status").read_text()
            except OSError:
                continue  # it has just ended
            found[task.name] = sum(
                int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line
            )
    return found


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no Pss")


def peak_mib(pid: int) -> float:
    """The most that it ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmHWM")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
