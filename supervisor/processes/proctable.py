"""What the kernel says of processes: all of them at a look, and each in its state, by which is
known why it cannot be ended. Standard library only: the keeper imports it.

Nothing here needs the memory of another process, so nothing waits for one whose memory hangs.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple

LINUX = sys.platform == "linux"
PS_LIMIT = 5.0


class Row(NamedTuple):
    """What a scan says of a process."""

    parent: int
    group: int
    session: int
    start: int
    state: str
    threads: int

    @property
    def zombie(self) -> bool:
        """Dead as a whole. A leader that left its threads running says "Z" as well."""
        return self.state in "ZX" and self.threads <= 1


Table = dict[int, Row]
#: pid and start of a process: no other ever has both.
Identity = tuple[int, int]


def has_process(table: Table, identity: Identity) -> bool:
    pid, start = identity
    return pid in table and table[pid].start == start


def read_row(pid: int) -> Row | None:
    """None: there is no such process. Other errors are raised, for "cannot look" must
    not be taken for "gone"."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            f = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Row(int(f[1]), int(f[2]), int(f[3]), int(f[19]), f[0].decode(), int(f[17]))


def scan() -> Table:
    """All processes."""
    if not LINUX:
        return scan_ps()
    rows = ((int(name), read_row(int(name))) for name in os.listdir("/proc") if name.isdigit())
    return {pid: row for pid, row in rows if row is not None}


def scan_ps() -> Table:
    """All processes where there is no /proc: groups stand for sessions."""
    import subprocess

    ps = subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], stdout=subprocess.PIPE)
    table: Table = {}
    try:
        listed = ps.communicate(timeout=PS_LIMIT)[0]
    except subprocess.TimeoutExpired as error:
        ps.kill()  # reaped with all others
        raise OSError(errno.ETIMEDOUT, "ps does not answer") from error
    for line in listed.splitlines():
        pid, parent, group, state = line.split()[:4]
        if int(pid) != ps.pid:
            table[int(pid)] = Row(int(parent), int(group), int(group), 0, chr(state[0]), 1)
    return table


def walk_descendants(table: Table, root: int) -> Iterator[int]:
    """The descendants of ``root``, parents first."""
    children: dict[int, list[int]] = {}
    for pid, row in table.items():
        children.setdefault(row.parent, []).append(pid)
    todo = children.pop(root, [])
    while todo:
        pid = todo.pop()
        yield pid
        todo += children.pop(pid, ())


def read_status(pid: int) -> dict[str, str]:
    """What the kernel says of ``pid``; nothing if it is gone. Needs no memory of that process,
    so it does not wait for one that hangs."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            text = file.readall().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.strip() for key, _, value in (x.partition(":") for x in text.splitlines())}


def is_doomed(pid: int) -> bool:
    """Whether KILL is on its way to ``pid``: it executes nothing of its own any more."""
    status = read_status(pid)
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    return not status or bool(pending >> (signal.SIGKILL - 1) & 1)


def find_hindrance(pid: int, state: str, *, killed: bool) -> str:
    """Why ``pid`` cannot be ended: "forbidden", to us, or "asleep" in the kernel, where not even
    KILL reaches it, if it was ``killed`` a while ago; "" when nothing is known to be in the way."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "forbidden"
    except ProcessLookupError:
        return ""
    return "asleep" if killed and state == "D" else ""


def describe_processes(found: dict[int, str]) -> list[tuple[int, str, int, str]]:
    """(pid, name, user id, why) of each of ``found``, pids with what ``find_hindrance`` gave."""
    said = []
    for pid, why in sorted(found.items()):
        status = read_status(pid)
        users = status.get("Uid", "-1 -1").split()
        said.append((pid, status.get("Name", "?"), int(users[1]), why))
    return said
