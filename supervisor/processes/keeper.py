"""The keeper: a small process that spawns every child of the daemon and outlives it.

Started as ``python -I -S -X utf8 keeper.py SOCKET_FD LOCK_FD STATE CGROUPS``; standard
library only, one thread. It is the child subreaper of all it spawns, so every descendant, however
often forked, ends up below it. When its socket closes the daemon is dead: it kills all
that is below it and leaves, which releases the lock that the next daemon waits for.

Messages: 4 bytes length, JSON. ``spawn`` carries three descriptors (SCM_RIGHTS)::

    -> {op: spawn, id, argv, mark, env, cwd, otherwise, tty, umask, group, account, limits}
                                                <- {id, pid}  or  {id, step, errno}
    -> {op: ping, id}                           <- {id}
    -> {op: end, id, tree, grace, keep}         <- {id, ended, kept}  once the tree is empty
                                                <- {exit: tree, status, starved}
                                                <- {held: tree, pids}
                                                <- {gone: tree}
    (the daemon sends no more)                  <- {left: pids}

A spawn is answered when the child has executed ``argv``, or cannot. An ``end`` may come
before: then its answer is ``{id, step, hung}``, with the step that did not end.
With ``keep`` only what is in the root's session is ended; the rest is ``kept``, and the tree
goes on until another ``end`` comes or, as ``gone`` says, all of it has ended. ``ended``: what was
there besides a root that had ended before. Both are ``[pid, name, ...]``, as in ``held``.
``held`` says, whenever that changes, which processes of a tree that is being ended cannot be:
``[pid, name, user id, why]``, as ``hindrance`` knows it. ``left``: the same at the end of all,
when nothing else is left; the keeper stays until they are gone.

``tree`` is the id of the spawn that made it: unlike a pid it is never used twice. With
``tty`` stdout is a terminal, which becomes the child's controlling one. ``CGROUPS`` is what
the paths of runs' cgroups begin with, "" for none (``cgroups.py``); ``group`` is added to it.
``otherwise``: where it runs when ``cwd`` cannot be entered, null for nowhere. ``account``:
{uid, gid, groups} that the command runs with, null for ours. ``limits``: {files, each}: what is
written to its cgroup's files, by their names, and [resource, value] of each of its processes.
``starved``: "limit", if the cgroup's memory limit had it killed; "machine", if the machine had no
memory left; else "".
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import termios
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING or __package__:
    from . import credentials
    from .cgroups import Cgroup
else:  # as the process that it is, it belongs to no package
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import credentials
    from cgroups import Cgroup

LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None, use_errno=True) if LINUX else None
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
#: A process that never became its command and does not die within so many seconds of KILL
#: hangs in a system call. It is waited for no longer: the kernel ends it when that returns.
STUCK = 1.0
TICK = 0.03  # while a tree is being ended: what no SIGCHLD announces is seen by then
PS_LIMIT = 5.0
MIN_PAUSE = 0.002  # between two scans, however many children die
HEADER = struct.Struct(">I")


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


def prctl(option: int, value: int) -> None:
    if LIBC is not None and LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


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


def descent(table: Table, root: int) -> Iterator[int]:
    """The descendants of ``root``, parents first."""
    children: dict[int, list[int]] = {}
    for pid, row in table.items():
        children.setdefault(row.parent, []).append(pid)
    todo = children.pop(root, [])
    while todo:
        pid = todo.pop()
        yield pid
        todo += children.pop(pid, ())


def environment(pid: int) -> list[bytes]:
    """What ``pid`` was started with; nothing if it is gone, dead or not ours to see. Who may
    become its user sees what that user does."""
    try:
        try:
            return read_environment(pid)
        except PermissionError:
            owner = os.stat(f"/proc/{pid}")
            if owner.st_uid in (0, os.geteuid()):
                return []
            with credentials.acting_as(owner.st_uid, owner.st_gid):
                return read_environment(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def read_environment(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
        return file.readall().split(b"\0")


def status_of(pid: int) -> dict[str, str]:
    """What the kernel says of ``pid``; nothing if it is gone. Needs no memory of that process,
    so it does not wait for one that hangs."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            text = file.readall().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.strip() for key, _, value in (x.partition(":") for x in text.splitlines())}


def doomed(pid: int) -> bool:
    """Whether KILL is on its way to ``pid``: it executes nothing of its own any more."""
    status = status_of(pid)
    pending = int(status.get("SigPnd", "0"), 16) | int(status.get("ShdPnd", "0"), 16)
    return not status or bool(pending >> (signal.SIGKILL - 1) & 1)


def hindrance(pid: int, state: str, *, killed: bool) -> str:
    """Why ``pid`` cannot be ended: "forbidden", to us, or "asleep" in the kernel, where not even
    KILL reaches it, if it was ``killed`` a while ago; "" when nothing is known to be in the way."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "forbidden"
    except ProcessLookupError:
        return ""
    return "asleep" if killed and state == "D" else ""


def described(found: dict[int, str]) -> list[tuple[int, str, int, str]]:
    """(pid, name, user id, why) of each of ``found``, pids with a ``hindrance``."""
    said = []
    for pid, why in sorted(found.items()):
        status = status_of(pid)
        users = status.get("Uid", "-1 -1").split()
        said.append((pid, status.get("Name", "?"), int(users[1]), why))
    return said


def strike(pid: int, start: int, number: int) -> None:
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


def kill_rows(table: Table, pids: Iterable[int]) -> None:
    """KILL these and their process groups. A group is hit at once, so that a process
    which forks and exits all the time does not outrun us. No group reaches beyond its
    session, and every session below us was made there."""
    groups = set()
    for pid in pids:
        strike(pid, table[pid].start, signal.SIGKILL)
        groups.add(table[pid].group)
    for group in groups - {os.getpgrp(), 0}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def term_rows(table: Table, pids: Iterable[int]) -> None:
    """TERM these by their process groups: what one of them forks just now gets it as well,
    and nothing that it forks on hearing it. Stopped ones do not hear it before CONT."""
    pids = list(pids)
    groups = {table[pid].group for pid in pids} - {os.getpgrp(), 0}
    for number in (signal.SIGTERM, signal.SIGCONT):
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        for pid in pids:
            if table[pid].group not in groups:
                strike(pid, table[pid].start, number)


class Tree:
    """One spawned root, and all that came of it."""

    def __init__(
        self, number: int, pid: int, start: int, mark: bytes, group: Cgroup | None = None
    ) -> None:
        self.group = group
        self.number = number
        self.pid = pid
        self.start = start
        self.mark = mark
        #: Where its root says how it starts; -1 once that is known.
        self.report = -1
        self.said = b""
        #: Its root never became the command: that failed, or was given up.
        self.void = False
        self.reaped = False
        self.waiting: list[int] = []
        self.kill_at = float("inf")
        self.killed = False
        self.termed: set[tuple[int, int]] = set()
        self.held: dict[int, str] = {}  # pids, and their hindrance
        #: Only its root's session is to be ended.
        self.keep = False
        #: What the end found, and its root not among it.
        self.leftovers: list[tuple[int, str, int, str]] = []

    @property
    def step(self) -> str:
        """What its root was about to do when it was last heard."""
        return self.said.decode().split()[-1] if self.said else "start"

    def lingers(self, alive: Iterable[int]) -> bool:
        """Whether nothing of it is ``alive`` but a root that never was the command, and that
        KILL cannot reach."""
        return self.void and time.monotonic() >= self.kill_at + STUCK and set(alive) <= {self.pid}

    def occupied(self) -> bool:
        """Whether its cgroup says that something is alive of what is to be ended."""
        return self.group is not None and not self.keep and self.group.populated()

    def wanted(self, table: Table, pids: set[int]) -> set[int]:
        """Those of ``pids`` that are to be ended."""
        return {pid for pid in pids if table[pid].session == self.pid} if self.keep else pids


class Forest:
    """The trees, and which process belongs to which."""

    def __init__(self) -> None:
        self.trees: dict[int, Tree] = {}
        self.roots: dict[int, Tree] = {}  # by pid; the latest, should a pid come again
        self.seen: dict[tuple[int, int], Tree] = {}
        #: Roots that lingered on when their trees were over.
        self.lost: set[int] = set()

    def add(self, tree: Tree) -> None:
        self.trees[tree.number] = self.roots[tree.pid] = tree

    def remove(self, tree: Tree) -> None:
        del self.trees[tree.number]
        if self.roots.get(tree.pid) is tree:
            del self.roots[tree.pid]
        if tree.void and not tree.reaped:
            self.lost.add(tree.pid)
        if tree.group is not None:
            tree.group.remove()

    def ending(self) -> list[Tree]:
        return [tree for tree in self.trees.values() if tree.waiting]

    def kept(self) -> list[Tree]:
        """Those whose root has ended, and whose rest goes on unasked."""
        return [t for t in self.trees.values() if t.reaped and not t.waiting and not t.void]

    def look(self, table: Table) -> tuple[dict[int, set[int]], bool]:
        """({tree number: its pids}, whether absence from it proves that a tree is empty).

        A scan is no snapshot: a process may fork and vanish between the listing and the
        reading. But what vanishes was reaped by its parent, and we reap nothing during
        a scan: of every tree alive, some child of ours is still there, if only as a
        zombie. So zombies count as members, and one whose tree is not known spoils the
        scan; the next one finds it reaped and its children below us.
        """
        marks = {tree.mark: tree for tree in self.trees.values()}
        marks.update({tree.mark: tree for tree in self.ending()})
        inside = {p: t for t in self.ending() if t.group is not None for p in t.group.pids()}
        owners: dict[int, Tree] = {}
        members: dict[int, set[int]] = {}
        proven = True
        me = os.getpid()
        for pid in self.below(table):
            row = table[pid]
            if pid in self.lost:
                continue
            tree = (
                self.seen.get((pid, row.start))
                or self.by_root(pid, row)
                or self.by_session(table, row.session)
                or inside.get(pid)
                or owners.get(row.parent)
                or next((marks[e] for e in environment(pid) if e in marks), None)
            )
            if tree is not None:
                owners[pid] = tree
                members.setdefault(tree.number, set()).add(pid)
            elif row.zombie and row.parent == me:
                proven = False
        self.seen = {(pid, table[pid].start): tree for pid, tree in owners.items()}
        return members, proven

    def below(self, table: Table) -> Iterable[int]:
        """All processes that may be a tree's, parents first."""
        pids = list(descent(table, os.getpid()))
        if not LINUX:  # orphans are not below us there; their group tells
            known = set(pids)
            pids += [p for p, row in table.items() if row.group in self.roots and p not in known]
        return pids

    def by_root(self, pid: int, row: Row) -> Tree | None:
        """The tree whose root it is: that is in our session until it makes its own."""
        tree = self.roots.get(pid)
        return tree if tree is not None and tree.start == row.start else None

    def by_session(self, table: Table, session: int) -> Tree | None:
        """The tree whose root made ``session``; not one whose root merely had that pid."""
        tree = self.roots.get(session)
        leader = table.get(session)
        if tree is None or (leader is not None and leader.start != tree.start):
            return None
        return tree


class Keeper:
    def __init__(self, sock: socket.socket, state: str, groups: str = "") -> None:
        self.sock = sock
        self.state = state
        self.groups = groups
        self.forest = Forest()
        self.buffer = bytearray()
        self.out = bytearray()  # what the daemon has not taken yet
        self.selector = selectors.DefaultSelector()
        self.fds: deque[list[int]] = deque()  # what came with spawn messages, in their order
        self.dirty = False  # something happened since the last scan
        self.scanned = 0.0  # when that was over
        self.rested = 0.0  # when the next may be

    def run(self) -> None:
        """Serve until the daemon is gone, then kill all."""
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_r, False)
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.sock.setblocking(False)
        self.selector.register(self.sock, selectors.EVENT_READ)
        self.selector.register(wake_r, selectors.EVENT_READ)
        fault = ""
        try:
            while True:
                due = self.due()
                pause = None if due == math.inf else max(0.0, due - time.monotonic())
                for key, events in self.selector.select(pause):
                    if key.fileobj is self.sock:
                        if events & selectors.EVENT_READ:
                            self.receive()
                        self.flush()
                    elif key.fileobj == wake_r:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_r, 65536)
                        self.dirty = True
                    else:
                        self.hear(key.data)
                self.reap()
                if time.monotonic() >= self.due():
                    self.step()
        except EOFError:
            pass
        except Exception:
            fault = traceback.format_exc()
        finally:
            for tree in list(self.forest.trees.values()):
                with contextlib.suppress(EOFError):  # of each: its answer reaches nobody
                    self.hear(tree)
            kill_all(self.forest, self.leave)
        if fault:  # last: stderr may be a pipe that nobody reads
            sys.stderr.write(fault)

    def due(self) -> float:
        """When to scan next; never, unless a tree is being ended."""
        ending = self.forest.ending()
        if not ending:
            return math.inf
        if self.dirty:
            return self.rested
        kills = [tree.kill_at for tree in ending if not tree.killed]
        return max(self.rested, min([self.scanned + TICK, *kills]))

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self.out += HEADER.pack(len(data)) + data
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes. The daemon may be stopped: the rest waits."""
        try:
            while self.out:
                del self.out[: self.sock.send(self.out)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise EOFError from error
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.out else 0)
        if self.selector.get_key(self.sock).events != events:
            self.selector.modify(self.sock, events)

    def receive(self) -> None:
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(1 << 20, socket.CMSG_SPACE(3 * 4))
        except BlockingIOError:
            return
        except OSError as error:
            raise EOFError from error
        # The kernel ends a receive at the first bytes that carry descriptors: one set at most.
        fds = array.array("i")
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
        if fds or flags & socket.MSG_CTRUNC:  # truncated: we had no room for all of them
            self.fds.append(list(fds))
        if not data:
            raise EOFError
        self.buffer += data
        while len(self.buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self.buffer)[0]
            if len(self.buffer) < end:
                break
            message = json.loads(self.buffer[HEADER.size : end])
            del self.buffer[:end]
            self.handle(message)

    def handle(self, message: dict[str, Any]) -> None:
        if message["op"] == "spawn":
            fds = self.fds.popleft()
            try:
                self.spawn(message, fds)
            except OSError as error:
                self.send({"id": message["id"], "step": "fork", "errno": error.errno})
            finally:
                for fd in fds:
                    os.close(fd)
        elif message["op"] == "ping":
            self.send({"id": message["id"]})
        else:
            self.end(message)

    def spawn(self, message: dict[str, Any], fds: list[int]) -> None:
        """Fork. The tree is known from here on; ``hear`` answers. Raises OSError."""
        if len(fds) != 3:
            raise OSError(errno.EMFILE, "descriptors were lost on the way")
        env = {**message["env"], "RUNCTL_RUN": message["mark"], "RUNCTL_STATE": self.state}
        group = None
        if self.groups and message["group"] is not None:
            group = Cgroup(self.groups + message["group"])
        report_r, report_w = os.pipe()
        try:
            os.set_blocking(report_r, False)
            keeper = os.getpid()
            pid = os.fork()
            if pid == 0:
                become(message, env, fds, report_w, keeper, group)
        except OSError:
            os.close(report_r)
            raise
        finally:
            os.close(report_w)
        try:
            row = read_row(pid) if LINUX else None  # not reaped yet, hence still there
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.close(report_r)
            raise
        mark = b"RUNCTL_RUN=" + os.fsencode(message["mark"])
        tree = Tree(message["id"], pid, row.start if row else 0, mark, group)
        tree.report = report_r
        self.forest.add(tree)
        self.selector.register(report_r, selectors.EVENT_READ, tree)

    def hear(self, tree: Tree) -> None:
        """How its root starts: the steps that it begins, "!" and the error that ended them.
        A successful exec closes the pipe."""
        while tree.report >= 0:
            try:
                data = os.read(tree.report, 100)
            except BlockingIOError:
                return
            if data:
                tree.said += data
                continue
            steps, failed, number = tree.said.partition(b"!")
            tree.said, tree.void = steps, bool(failed)
            if failed:
                self.answer(tree, {"step": tree.step, "errno": int(number)})
            else:
                self.answer(tree, {"pid": tree.pid})

    def answer(self, tree: Tree, what: dict[str, Any]) -> None:
        """Answer its spawn."""
        self.selector.unregister(tree.report)
        os.close(tree.report)
        tree.report = -1
        self.send({"id": tree.number, **what})

    def end(self, message: dict[str, Any]) -> None:
        tree = self.forest.trees.get(message["tree"])
        if tree is None:
            self.send({"id": message["id"]})
            return
        self.hear(tree)
        if tree.report >= 0:
            tree.void = True
            if not tree.reaped:
                os.kill(tree.pid, signal.SIGKILL)
            self.answer(tree, {"step": tree.step, "hung": True})
        tree.keep = message["keep"] and (tree.keep or not tree.waiting)
        tree.waiting.append(message["id"])
        # Before its exec it ignores TERM, as we do.
        grace = 0 if tree.void else message["grace"]
        tree.kill_at = min(tree.kill_at, time.monotonic() + grace)
        self.dirty = True

    def reap(self) -> None:
        """Collect the dead, orphans among them; report roots."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.forest.lost.discard(pid)
            tree = self.forest.roots.get(pid)
            if tree is None or tree.reaped:
                continue
            tree.reaped = True
            self.hear(tree)
            if not tree.void:
                code = os.waitstatus_to_exitcode(status)
                starved = "" if tree.group is None else tree.group.starved()
                self.send({"exit": tree.number, "status": code, "starved": starved})
            elif not tree.waiting:
                self.forest.remove(tree)

    def step(self) -> None:
        """One scan, and what follows from it for each tree that is being ended."""
        began = time.monotonic()
        self.dirty = False
        with contextlib.suppress(OSError):  # no descriptor left: nothing is concluded
            table = scan()
            members, proven = self.forest.look(table)
            self.dirty = not proven
            for tree in self.forest.ending():
                mine = members.get(tree.number, set())
                pids = tree.wanted(table, mine)
                over = proven and tree.reaped and not pids and not tree.occupied()
                if over or tree.lingers(pid for pid in pids if not table[pid].zombie):
                    self.finish(tree, table, mine - pids)
                elif pids or tree.occupied():
                    self.press(tree, table, pids)
                    self.hold(tree, table, pids)
            for tree in self.forest.kept():
                if proven and tree.number not in members and not tree.occupied():
                    self.forest.remove(tree)
                    self.send({"gone": tree.number})
        self.scanned = time.monotonic()
        # Many deaths must not mean as many scans.
        self.rested = self.scanned + max(MIN_PAUSE, self.scanned - began)

    def finish(self, tree: Tree, table: Table, rest: set[int]) -> None:
        """What was to be ended of it is gone; ``rest`` goes on."""
        kept = {pid: "" for pid in rest if not table[pid].zombie}
        if kept:
            waiters, tree.waiting = tree.waiting, []
            tree.kill_at, tree.killed, tree.keep = math.inf, False, False
            tree.termed.clear()
            tree.held = {}  # the daemon has forgotten it as well
        else:
            waiters = tree.waiting
            self.forest.remove(tree)
        for waiter in waiters:
            self.send({"id": waiter, "ended": tree.leftovers, "kept": described(kept)})
        tree.leftovers = []

    def press(self, tree: Tree, table: Table, pids: set[int]) -> None:
        """TERM who is to hear it, or KILL all."""
        alive = [pid for pid in pids if not table[pid].zombie]
        if time.monotonic() >= tree.kill_at:
            tree.killed = True
            if tree.group is not None and not tree.keep:
                tree.group.kill()
            kill_rows(table, alive)
        elif not tree.termed:
            if tree.reaped:
                tree.leftovers = described(dict.fromkeys(alive, ""))
            term_rows(table, alive)
            tree.termed.update((pid, table[pid].start) for pid in alive)
        else:
            for pid in [pid for pid in alive if self.strays(tree, table, pid)]:
                identity = (pid, table[pid].start)
                tree.termed.add(identity)
                strike(*identity, signal.SIGTERM)
                strike(*identity, signal.SIGCONT)  # a stopped process does not hear TERM

    def hold(self, tree: Tree, table: Table, pids: set[int]) -> None:
        """Say who of it cannot be ended, if that is news."""
        killed = time.monotonic() >= tree.kill_at + STUCK
        alive = [pid for pid in pids if not table[pid].zombie and not tree.void]
        why = {pid: hindrance(pid, table[pid].state, killed=killed) for pid in alive}
        held = {pid: reason for pid, reason in why.items() if reason}
        if held != tree.held:
            tree.held = held
            self.send({"held": tree.number, "pids": described(held)})

    def leave(self, held: dict[int, str]) -> None:
        """At the end of all: nothing but these is left, and they cannot be ended."""
        with contextlib.suppress(EOFError):
            self.send({"left": described(held)})

    def strays(self, tree: Tree, table: Table, pid: int) -> bool:
        """Whether nobody that had TERM answers for ``pid``, which had none. What a handler
        starts to clean up has the grace, as long as the one that had TERM lives; what has
        come loose from it, or from its like, gets a TERM of its own."""
        me, at = os.getpid(), pid
        while at in table and not table[at].zombie:
            if (at, table[at].start) in tree.termed:
                return False
            at = table[at].parent
            if at in (me, 1):  # who loses its parent is given to us
                return True
        return False  # it loses its parent just now: the next scan tells


def become(
    message: dict[str, Any],
    env: dict[str, str],
    fds: list[int],
    report: int,
    keeper: int,
    group: Cgroup | None,
) -> None:
    """In the child: turn into what ``message`` asks for. Never returns; each step, and what
    went wrong, goes to ``report``."""
    try:
        if message["umask"] is not None:
            os.umask(message["umask"])
        os.setsid()
        die_with(keeper)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError):  # libc keeps some for itself
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if message["tty"]:
            # At the command's end the kernel would send it to the rest of its group, and a
            # filter would lose what it has not written yet.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            fcntl.ioctl(fds[1], termios.TIOCSCTTY, 0)
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        # Before whatever may hang: the lock that the next daemon waits for is among them.
        os.closerange(3, report)
        os.closerange(report + 1, os.sysconf("SC_OPEN_MAX"))
        limits = message.get("limits") or {"files": {}, "each": []}
        if limits["files"]:
            os.write(report, b" limits")
        if group is not None:  # nothing of it is ever outside
            group.enter(limits["files"])
        if message.get("account") is None:
            credentials.shed()
        else:
            os.write(report, b" user")
            credentials.become(**message["account"])
            die_with(keeper)  # the kernel forgets it when the user changes
        if message["cwd"] is not None:
            os.write(report, b" chdir")
            enter(message["cwd"], message.get("otherwise"))
        if limits["each"]:
            os.write(report, b" limits")
            for what, value in limits["each"]:
                lower(what, value)
        os.write(report, b" exec")
        os.execvpe(message["argv"][0], message["argv"], env)
    except OSError as error:
        os.write(report, b"!%d" % (error.errno or 0))
    except BaseException:
        os.write(report, b"!%d" % errno.EINVAL)
    finally:
        os._exit(127)


def enter(path: str, otherwise: str | None) -> None:
    """Change to directory ``path``, or to ``otherwise`` when that cannot be. Raises OSError."""
    try:
        os.chdir(path)
    except OSError:
        if otherwise is None:
            raise
        os.chdir(otherwise)


def die_with(keeper: int) -> None:
    """For the day the keeper itself is killed. Safe, as the keeper has one thread: the
    signal comes when the *thread* ends that forked."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(127)  # it was killed before we asked for the signal


def lower(what: int, value: int) -> None:
    """Bound a resource of this process and what it starts, never above what it is now."""
    _, most = resource.getrlimit(what)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(what, (value, value))


def kill_all(forest: Forest, leave: Callable[[dict[int, str]], None]) -> None:
    """Kill whatever is below, until no child is left: orphans come to us. A child that hangs
    on the way to its command, and that KILL does not reach, is left to the kernel. ``leave``
    is told, once, when nothing is left but what cannot be ended."""
    rest, longest = 0.001, 0.05  # some may take long: in a system call, or another user's
    trees = list(forest.trees.values())
    groups = [tree.group for tree in trees if tree.group is not None]
    unborn = forest.lost | {tree.pid for tree in trees if tree.void or tree.report >= 0}
    for group in groups:
        group.kill()
    kill_children()  # before the first scan, which takes long on a machine that they keep busy
    began = stuck = time.monotonic()
    while True:
        now = time.monotonic()
        alive: dict[int, str] = {}
        with contextlib.suppress(OSError):
            table = scan()
            below = list(forest.below(table))
            alive = {pid: table[pid].state for pid in below if not table[pid].zombie}
            kill_rows(table, below)
        if not alive or not alive.keys() <= unborn:
            stuck = now
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        if now >= stuck + STUCK:
            break
        if longest < STUCK <= now - began and alive.keys() - unborn:
            why = {pid: hindrance(pid, state, killed=True) for pid, state in alive.items()}
            if all(why.values()):
                longest = STUCK
                leave(why)
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


def main() -> None:
    # A terminal's Ctrl-C, or a service manager's TERM to all, is for the daemon to answer.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_DUMPABLE, 0)  # what it runs is of its user, and is not to steer it
    sock, lock = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(sock, False)
    os.set_inheritable(lock, False)
    Keeper(socket.socket(fileno=sock), sys.argv[3], sys.argv[4]).run()


if __name__ == "__main__":
    main()
