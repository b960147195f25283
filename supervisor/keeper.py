"""The keeper: a small process that spawns every child of the daemon and outlives it.

Started as ``python -I -S keeper.py SOCKET_FD LOCK_FD STATE``; standard library only, one
thread. It is the child subreaper of all it spawns, so every descendant, however often
forked, ends up below it. When its socket closes the daemon is dead: it kills all that
is below it and leaves, which releases the lock that the next daemon waits for.

Messages: 4 bytes length, JSON. ``spawn`` carries three descriptors (SCM_RIGHTS).
"""

import array
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any

LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TICK = 0.03

#: pid: (parent, session, start time, state)
Table = dict[int, tuple[int, int, int, str]]


def prctl(option: int, value: int) -> None:
    if LIBC is not None:
        LIBC.prctl(option, value, 0, 0, 0)


LIBC = ctypes.CDLL(None, use_errno=True) if LINUX else None


def scan() -> Table:
    """{pid: (ppid, session, starttime, state)} of all processes."""
    table: Table = {}
    if LINUX:
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    with open(f"/proc/{name}/stat", "rb") as file:
                        f = file.read().rpartition(b")")[2].split()
                    table[int(name)] = (int(f[1]), int(f[3]), int(f[19]), f[0].decode())
    else:
        with os.popen("ps -A -o pid=,ppid=,sess=,stat=") as out:
            for line in out:
                pid, ppid, _, state = line.split()[:4]
                table[int(pid)] = (int(ppid), 0, 0, state[0])
    return table


def below(table: Table, roots: Iterable[int]) -> set[int]:
    """The pids of ``roots`` and of all their descendants."""
    children: dict[int, list[int]] = {}
    for pid, row in table.items():
        children.setdefault(row[0], []).append(pid)
    found: set[int] = set()
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid in table and pid not in found:
            found.add(pid)
            todo += children.get(pid, ())
    return found


def marked(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
    except OSError:
        return False


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


class Tree:
    """One spawned root, and all that came of it."""

    def __init__(self, pid: int, mark: str) -> None:
        self.pid = pid
        self.mark = b"RUNCTL_RUN=" + mark.encode()
        self.seen: dict[int, int] = {}
        self.ended = False
        self.waiting: list[int] = []
        self.kill_at: float | None = None
        self.termed: set[int] = set()

    def members(self, table: Table, mine: set[int]) -> set[int]:
        """Live members: by descent, by session, by mark, or seen before."""
        known = [p for p, start in self.seen.items() if p in table and table[p][2] == start]
        roots = [self.pid, *known]
        found = below(table, roots)
        for pid in mine - found:
            if table[pid][1] == self.pid or marked(pid, self.mark):
                found |= below(table, [pid])
        found = {p for p in found if p in mine and table[p][3] not in "ZX"}
        self.seen = {p: table[p][2] for p in found}
        return found


class Keeper:
    def __init__(self, sock: socket.socket, state: str) -> None:
        self.sock = sock
        self.state = state
        self.trees: dict[int, Tree] = {}
        self.buffer = b""
        self.fds: list[int] = []
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_w, False)
        os.set_blocking(wake_r, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.sock, selectors.EVENT_READ)
        self.selector.register(wake_r, selectors.EVENT_READ)
        try:
            while True:
                busy = any(tree.waiting for tree in self.trees.values())
                events = self.selector.select(TICK if busy else None)
                for key, _ in events:
                    if key.fileobj is self.sock:
                        self.receive()
                    else:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_r, 65536)
                self.reap()
                if any(tree.waiting for tree in self.trees.values()):
                    self.ladders()
        except (EOFError, OSError):
            pass
        self.kill_all()

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self.sock.sendall(struct.pack(">I", len(data)) + data)

    def receive(self) -> None:
        data, ancillary, _, _ = self.sock.recvmsg(1 << 20, socket.CMSG_SPACE(3 * 4))
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(body[: len(body) - len(body) % 4])
                for fd in fds:
                    os.set_inheritable(fd, False)
                self.fds += fds
        if not data:
            raise EOFError
        self.buffer += data
        while len(self.buffer) >= 4:
            (size,) = struct.unpack(">I", self.buffer[:4])
            if len(self.buffer) < 4 + size:
                break
            body, self.buffer = self.buffer[4 : 4 + size], self.buffer[4 + size :]
            self.handle(json.loads(body))

    def handle(self, message: dict[str, Any]) -> None:
        if message["op"] == "spawn":
            fds, self.fds = self.fds[:3], self.fds[3:]
            try:
                self.spawn(message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        elif message["op"] == "end":
            tree = self.trees.get(message["pid"])
            if tree is None:
                self.send({"id": message["id"]})
                return
            tree.waiting.append(message["id"])
            at = time.monotonic() + message["grace"]
            tree.kill_at = at if tree.kill_at is None else min(tree.kill_at, at)

    def spawn(self, message: dict[str, Any], fds: list[int]) -> None:
        report_r, report_w = os.pipe()
        env = {**message["env"], "RUNCTL_RUN": message["mark"], "RUNCTL_STATE": self.state}
        pid = os.fork()
        if pid == 0:
            step = "start"
            try:
                os.setsid()
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                signal.set_wakeup_fd(-1)
                for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                    signal.signal(name, signal.SIG_DFL)
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                if message["cwd"] is not None:
                    step = "chdir"
                    os.chdir(message["cwd"])
                step = "exec"
                for target, fd in enumerate(fds):
                    os.dup2(fd, target)
                os.execvpe(message["argv"][0], message["argv"], env)
            except BaseException as error:
                code = error.errno if isinstance(error, OSError) else 0
                os.write(report_w, f"{step} {code}".encode())
            finally:
                os._exit(127)
        os.close(report_w)
        failure = os.read(report_r, 100).decode()
        os.close(report_r)
        if failure:
            os.waitpid(pid, 0)
            step, text = failure.split()
            self.send({"id": message["id"], "step": step, "errno": int(text)})
        else:
            self.trees[pid] = Tree(pid, message["mark"])
            self.send({"id": message["id"], "pid": pid})

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            tree = self.trees.get(pid)
            if tree is not None and not tree.ended:
                tree.ended = True
                self.send({"exit": pid, "status": os.waitstatus_to_exitcode(status)})

    def ladders(self) -> None:
        table = scan()
        mine = below(table, [os.getpid()]) - {os.getpid()}
        for tree in [t for t in self.trees.values() if t.waiting]:
            members = tree.members(table, mine)
            if not members:
                for waiter in tree.waiting:
                    self.send({"id": waiter})
                tree.waiting, tree.kill_at = [], None
                if tree.ended:
                    del self.trees[tree.pid]
                continue
            if tree.kill_at is not None and time.monotonic() >= tree.kill_at:
                for pid in members:
                    kill(pid, signal.SIGKILL)
            else:
                for pid in members - tree.termed:
                    kill(pid, signal.SIGTERM)
                    kill(pid, signal.SIGCONT)
                tree.termed |= members

    def kill_all(self) -> None:
        """Kill whatever is below, until no child is left: orphans come to us."""
        while True:
            for pid in below(scan(), [os.getpid()]) - {os.getpid()}:
                kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.002)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(int(sys.argv[1]), False)
    os.set_inheritable(int(sys.argv[2]), False)
    Keeper(socket.socket(fileno=int(sys.argv[1])), sys.argv[3]).run()


if __name__ == "__main__":
    main()
