"""A cgroup for each run, where a service manager has delegated us a subtree (cgroup v2).

The daemon, its keeper and the embedded nats-server sit in the leaf ``supervisor``, since a
cgroup that is to hand out controllers may hold no processes itself. systemd 254 starts the daemon
in a leaf (DelegateSubgroup=); an older one starts it in the cgroup of its unit, and cannot while
that hands out controllers, which it does as long as runs have limits. A process cannot leave
its cgroup by forking, so ``cgroup.kill`` reaches what has left session, parent and
environment behind. Standard library only: the keeper imports it too.
"""

import contextlib
import hashlib
import os
import select
import sys
import time
from collections.abc import Collection, Mapping

LEAF = "supervisor"
#: The leaf in which systemd itself starts the daemon: DelegateSubgroup= of the units.
GIVEN_LEAF = "service"
#: In the environment of a unit that has Delegate=yes.
UNIT_SAYS = "RUNCTL_DELEGATED"
#: Files of a cgroup that not every kernel has: one without swap has no limit of it.
OPTIONAL = ("memory.swap.max",)
_ATTRIBUTES = ("user.delegate", "trusted.delegate")


class Cgroup:
    """One run's, at ``path``. Nothing here fails when the kernel says no: a run without a
    cgroup is ended as it is everywhere else."""

    def __init__(self, path: str) -> None:
        self.path = path

    def enter(self, limits: Mapping[str, str] | None = None) -> None:
        """Make it, and move this process there, if that can be. ``limits``: what to write to
        its files before. Raises OSError only when there are limits, which then do not hold."""
        try:
            os.makedirs(self.path, exist_ok=True)
            for name, text in (limits or {}).items():
                if name not in OPTIONAL or os.path.exists(os.path.join(self.path, name)):
                    _write(self.path, name, text)
            _write(self.path, "cgroup.procs", "0")
        except OSError:
            if limits:
                raise

    def find_starvation(self) -> str:
        """Why the kernel has killed something in it for memory: "limit", its own was reached;
        "machine", there was none left; "", it has not."""
        try:
            events = dict(x.split() for x in _read(self.path, "memory.events").splitlines())
        except (OSError, ValueError):
            return ""
        if not int(events.get("oom_kill", 0)):
            return ""
        return "limit" if int(events.get("oom", 0)) else "machine"

    def list_folders(self) -> list[str]:
        """It and those that were made below it, deepest first."""
        return [folder for folder, _, _ in os.walk(self.path, topdown=False)]

    def list_pids(self) -> set[int]:
        """Who is in it."""
        found: set[int] = set()
        for folder in self.list_folders():
            with contextlib.suppress(OSError, ValueError):
                found.update(map(int, _read(folder, "cgroup.procs").split()))
        return found

    def is_populated(self) -> bool:
        """Whether anything in it is alive. It is not when it is not there."""
        try:
            return "populated 1" in _read(self.path, "cgroup.events")
        except OSError:
            return False

    def kill(self) -> None:
        """KILL all in it at once, also what forks just now."""
        with contextlib.suppress(OSError):
            _write(self.path, "cgroup.kill", "1")

    def remove(self) -> bool:
        """Whether it is gone; it stays while anything is in it."""
        for folder in self.list_folders():
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        return not os.path.exists(self.path)

    def wait_empty(self, deadline: float) -> bool:
        """Wait for the kernel to say that it is empty, until the monotonic ``deadline``."""
        try:
            fd = os.open(os.path.join(self.path, "cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            while "populated 1" in os.pread(fd, 4096, 0).decode():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
        except OSError:  # removed meanwhile
            pass
        finally:
            os.close(fd)
        return True


class Groups:
    """Where runs get their cgroups: at ``start`` and the name of a run."""

    def __init__(self, start: str) -> None:
        self.start = start

    def clear(self, wait: float) -> None:
        """End what an earlier daemon has left. Blocking. Raises TimeoutError when some of it is
        still alive after ``wait`` seconds."""
        if left := clear(self.start, wait):
            raise TimeoutError(f"processes of an earlier daemon do not die; see {left[0]}")

    def hinder_restart(self) -> bool:
        """Whether what runs keeps systemd from starting another daemon beside it."""
        return hinder_restart(self.start)

    def enable(self, controllers: Collection[str]) -> frozenset[str]:
        """Have runs' cgroups limited by these; by which of them they are."""
        root = os.path.dirname(self.start)
        for controller in sorted(controllers):
            with contextlib.suppress(OSError):  # not handed over, or not of this kernel
                _write(root, "cgroup.subtree_control", f"+{controller}")
        try:
            return frozenset(_read(root, "cgroup.subtree_control").split()) & {*controllers}
        except OSError:
            return frozenset()


def make_prefix(state_dir: str) -> str:
    """How the cgroups of a state directory's runs begin."""
    return f"run-{hashlib.sha256(os.fsencode(os.path.realpath(state_dir))).hexdigest()[:8]}-"


def prepare(state_dir: str) -> Groups | None:
    """Move this process to its leaf. None: no cgroups are to be used."""
    root = find_delegated()
    if root is None:
        return None
    start = os.path.join(root, make_prefix(state_dir))
    try:
        if os.path.basename(find_own() or "") != GIVEN_LEAF:
            os.makedirs(os.path.join(root, LEAF), exist_ok=True)
            _write(os.path.join(root, LEAF), "cgroup.procs", str(os.getpid()))
    except OSError:
        return None
    return Groups(start)


def clear(start: str, wait: float) -> list[str]:
    """End and remove every cgroup whose path begins with ``start``; those that are not empty
    after ``wait`` seconds."""
    root, begin = os.path.split(start)
    left = [Cgroup(e.path) for e in os.scandir(root) if e.name.startswith(begin) and e.is_dir()]
    deadline = time.monotonic() + wait
    for group in left:
        group.kill()
    return [group.path for group in left if not group.wait_empty(deadline) or not group.remove()]


def hinder_restart(start: str) -> bool:
    """Whether no other daemon can be started, beside runs whose cgroups begin with ``start``: each
    start would end with status 219/CGROUP."""
    if not start or os.path.basename(find_own() or "") != LEAF:
        return False
    try:
        return bool(_read(os.path.dirname(start), "cgroup.subtree_control").split())
    except OSError:
        return False


def stop_hindering(start: str) -> None:
    """Once nothing of ``start`` is alive: have the next daemon be started."""
    if hinder_restart(start):
        root = os.path.dirname(start)
        with contextlib.suppress(OSError):
            given = _read(root, "cgroup.subtree_control").split()
            _write(root, "cgroup.subtree_control", " ".join(f"-{name}" for name in given))


def find_delegated() -> str | None:
    """The cgroup that was handed to this process to make others in, if one was."""
    path = find_own()
    if path is None:
        return None
    if os.path.basename(path) in (LEAF, GIVEN_LEAF):
        path = os.path.dirname(path)
    try:
        usable = (
            os.access(path, os.W_OK)
            and os.access(os.path.join(path, "cgroup.procs"), os.W_OK)
            and os.path.exists(os.path.join(path, "cgroup.kill"))
        )
        return path if usable and _handed_over(path) else None
    except OSError:
        return None


def find_own() -> str | None:
    """The directory of this process's cgroup."""
    if sys.platform != "linux":
        return None
    try:
        lines = _read("/proc/self", "cgroup").splitlines()
        place = next(line[3:] for line in lines if line.startswith("0::"))
        mounts = _read("/proc/self", "mountinfo").splitlines()
    except (OSError, StopIteration):
        return None
    if "/.." in place:  # beyond the cgroup namespace
        return None
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, mounted = before.split()[3:5]
        if after.startswith("cgroup2 ") and root == "/":
            return os.path.join(mounted.replace("\\040", " "), place.lstrip("/")).rstrip("/")
    return None


def _handed_over(path: str) -> bool:
    """systemd marks what it delegates (since 251 where its users can read it). Before that:
    what begins to be ours at this very directory. Writing alone says nothing: root may write
    everywhere, and a user's own manager owns the cgroups of all its units, and marks none.
    There the unit says it, to the process that systemd itself started."""
    for attribute in _ATTRIBUTES:
        with contextlib.suppress(OSError):
            if os.getxattr(path, attribute) == b"1":
                return True
    if os.environ.get(UNIT_SAYS) and os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()):
        return True
    me, above = os.geteuid(), os.path.dirname(path)
    return me != 0 and os.stat(path).st_uid == me != os.stat(above).st_uid


def _read(folder: str, name: str) -> str:
    with open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _write(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)
