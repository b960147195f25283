"""Signals that hit whom a look has seen, and all that is below the keeper. Standard library
only: the keeper imports it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable

from .proctable import LINUX, Table, find_hindrance, read_row, scan
from .trees import STUCK, Forest


def signal_process(pid: int, start: int, number: int) -> None:
    """Signal the process that a scan saw, and no other that has its pid by now."""
    fd = -1
    with contextlib.suppress(AttributeError, OSError):  # old system, no descriptor left, or gone
        fd = os.pidfd_open(pid)
    try:
        if LINUX:
            row = read_row(pid)  # with a pidfd held, what is verified here is what is hit
            if row is None or row.start != start:
                return
        if fd >= 0:
            signal.pidfd_send_signal(fd, number)
        else:
            os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
    finally:
        if fd >= 0:
            os.close(fd)


def kill_processes(table: Table, pids: Iterable[int]) -> None:
    """KILL these and their process groups. A group is hit at once, so that a process
    which forks and exits all the time does not outrun us. No group reaches beyond its
    session, and every session below us was made there."""
    groups = set()
    for pid in pids:
        signal_process(pid, table[pid].start, signal.SIGKILL)
        groups.add(table[pid].group)
    for group in groups - {os.getpgrp(), 0}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def terminate_processes(table: Table, pids: Iterable[int], first: int = signal.SIGTERM) -> None:
    """TERM these, or what they want to hear ``first``, by their process groups: what one of them
    forks just now gets it as well, and nothing that it forks on hearing it. Stopped ones do not
    hear it before CONT."""
    pids = list(pids)
    groups = {table[pid].group for pid in pids} - {os.getpgrp(), 0}
    for number in (first, signal.SIGCONT):
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        for pid in pids:
            if table[pid].group not in groups:
                signal_process(pid, table[pid].start, number)


def kill_all(forest: Forest, report_left: Callable[[dict[int, str]], None]) -> None:
    """Kill whatever is below, until no child is left: orphans come to us. A child that hangs
    on the way to its command, and that KILL does not reach, is left to the kernel. ``report_left``
    is told, once, when nothing is left but what cannot be ended."""
    rest, longest = 0.001, 0.05  # some may take long: in a system call, or another user's
    trees = list(forest.trees.values())
    groups = [tree.group for tree in trees if tree.group is not None]
    unborn = forest.untracked | {tree.pid for tree in trees if tree.void or tree.report >= 0}
    for group in groups:
        group.kill()
    kill_children()  # before the first scan, which takes long on a machine that they keep busy
    began = stuck = time.monotonic()
    while True:
        now = time.monotonic()
        alive: dict[int, str] = {}
        with contextlib.suppress(OSError):
            table = scan()
            below = list(forest.list_below(table))
            alive = {pid: table[pid].state for pid in below if not table[pid].zombie}
            kill_processes(table, below)
        if not alive or not alive.keys() <= unborn:
            stuck = now
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        if now >= stuck + STUCK:
            break
        if longest < STUCK <= now - began:
            rest_of_runs = alive.keys() - unborn
            why = {pid: find_hindrance(pid, alive[pid], killed=True) for pid in rest_of_runs}
            if why and all(why.values()):
                longest = STUCK
                report_left(why)
        kill_children()
        time.sleep(rest)
        rest = min(rest * 1.1, longest)
    for group in groups:
        group.remove()


def kill_children() -> None:
    """KILL our direct children. Far quicker than a scan, so it catches a process that
    forks into new sessions and exits faster than we scan. Nobody else has their pids
    until we reap them."""
    with contextlib.suppress(OSError):  # not every kernel lists them
        for _ in range(50):
            with open(f"/proc/self/task/{os.getpid()}/children", "rb", buffering=0) as file:
                pids = file.readall().split()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(PermissionError):
                    os.kill(int(pid), signal.SIGKILL)
