"""What an earlier daemon of a state directory has left behind: found, named, ended."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Iterable
from functools import partial

import trio

from ...protocol.errors import Unavailable
from .environments import read_environment
from .process_words import MOST_NAMED, explain_hindrance
from .proctable import (
    Table,
    describe_processes,
    find_hindrance,
    is_doomed,
    read_status,
    scan,
    walk_descendants,
)
from .signalling import signal_process

#: Names are worth so long a wait, seconds.
NAMED_WITHIN = 2.0


async def describe_leftovers(state: str) -> str:
    """What lives below the keeper of an earlier daemon of ``state``, in words; "" when the kernel
    does not answer what a process is."""
    with trio.move_on_after(NAMED_WITHIN):
        look = partial(_list_leftovers, os.fsencode(state))
        return await trio.to_thread.run_sync(look, abandon_on_cancel=True)
    return ""


def _list_leftovers(state: bytes) -> str:
    table, me = scan(), os.geteuid()
    keepers = [pid for pid in table if _find_owner(pid) == me and _is_keeper(pid, state)]
    below = {pid for keeper in keepers for pid in walk_descendants(table, keeper)}
    return _describe(table, [pid for pid in below if not table[pid].zombie])


def _describe(table: Table, pids: Iterable[int]) -> str:
    """Who these are, which do not die, and why."""
    found = describe_processes(
        {pid: find_hindrance(pid, table[pid].state, killed=True) for pid in pids}
    )
    words = [explain_hindrance(*one) for one in found[:MOST_NAMED]]
    return "; ".join([*words, *(["..."] if len(found) > MOST_NAMED else [])])


async def sweep_leftovers(
    state: str, wait: float, users: Collection[int] = (), *, adopt: bool = False
) -> None:
    """Kill what a keeper that was itself killed left behind, ours or one of ``users``', found
    by its mark, or with ``adopt`` by being our child. And a keeper that is still there with
    all it has, though its lock is not: its daemon was stopped, and somebody has removed the lock.
    Raises Unavailable."""
    if sys.platform != "linux":
        return
    deadline = trio.current_time() + wait
    clear = 0
    # Twice: a process may fork and exit between the listing and the reading.
    while clear < 2:
        at = [0]
        with trio.move_on_at(max(deadline, trio.current_time() + 1)) as looking:
            left = await trio.to_thread.run_sync(
                partial(_kill_leftovers, os.fsencode(state), adopt, at, frozenset(users)),
                abandon_on_cancel=True,
            )
        if looking.cancelled_caught:
            raise Unavailable(
                f"process {at[0]} may be of an earlier daemon and cannot be looked at, since the"
                " kernel does not answer what its environment is; end it"
            )
        clear = 0 if left else clear + 1
        if left:
            if trio.current_time() >= deadline:
                raise Unavailable(f"processes {left} of an earlier daemon do not die; kill them")
            await trio.sleep(0.01)


def _kill_leftovers(
    state: bytes, adopt: bool, at: list[int], users: frozenset[int] = frozenset()
) -> list[int]:
    """KILL every process of our user, or one of ``users``, that has the mark of ``state`` in its
    environment, and all that is below a keeper of it, and lastly that: their pids. ``at[0]`` is
    the one that is looked at: that hangs while a page of its memory does not come."""
    if adopt:
        _reap_children()
    table, me = scan(), os.geteuid()
    marked, keepers = set(), set()
    for pid, row in table.items():
        if pid == os.getpid() or row.zombie or _find_owner(pid) not in users | {me}:
            continue
        at[0] = pid
        found = read_environment(pid)
        if b"RUNCTL_STATE=" + state in found:
            marked.add(pid)
        # A child of it that hangs on the way to its command looks like it.
        elif _is_keeper(pid, state) and not is_doomed(pid):
            keepers.add(pid)
    roots = keepers | ({os.getpid()} if adopt else set())
    below = {
        pid for root in roots for pid in walk_descendants(table, root) if not table[pid].zombie
    }
    # Last, so that nothing comes out from below it unseen.
    _kill(table, (marked | below) or keepers)
    return sorted(marked | below | keepers)


def _kill(table: Table, pids: Iterable[int]) -> None:
    for pid in pids:
        signal_process(pid, table[pid].start, signal.SIGKILL)


def _reap_children() -> None:
    """Collect the children that a killed keeper left to us."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _find_owner(pid: int) -> int | None:
    """The effective id of its user; None if it is gone. (The owner of a keeper's files in /proc
    is root.)"""
    users = read_status(pid).get("Uid", "").split()
    return int(users[1]) if len(users) > 1 else None


def _is_keeper(pid: int, state: bytes) -> bool:
    """Whether it is a keeper of ``state``, by its command line: its environment it shows to
    nobody."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            argv = file.readall().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return (
        len(argv) > 8
        and argv[1:5] == [b"-I", b"-S", b"-X", b"utf8"]
        and os.path.basename(argv[5]) == b"keeper.py"
        and argv[8] == state
    )
