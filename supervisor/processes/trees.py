"""Which process belongs to which run: the trees that the keeper has spawned. Standard library
only: the keeper imports it.
"""

import os
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .cgroups import Cgroup
from .environments import Answer
from .proctable import LINUX, Identity, Row, Table, walk_descendants

#: A process that never became its command and does not die within so many seconds of KILL
#: hangs in a system call. It is waited for no longer: the kernel ends it when that returns.
STUCK = 1.0


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
        #: What it is told to end with; by then, if that was not TERM, it hears TERM as well.
        self.stop_signal: int = signal.SIGTERM
        self.term_at = float("inf")
        self.kill_at = float("inf")
        self.killed = False
        self.termed: set[tuple[int, int]] = set()
        self.held: dict[int, str] = {}  # pids, and their hindrance
        #: Only its root's session is to be ended.
        self.keep = False
        #: What the end found, and its root not among it.
        self.leftovers: list[tuple[int, str, int, str]] = []
        #: Who was there then and may be of it as well.
        self.doubtful: set[Identity] = set()
        #: Descriptors that outlive the daemon, by name, and what the next one is told of it. With
        #: ``about`` it is known until it is forgotten, though nothing of it runs any more.
        self.files: dict[str, int] = {}
        self.about: dict[str, Any] | None = None
        #: It was ended, and what its root left behind goes on.
        self.kept = False
        #: How its root ended, and whether that was asked for before.
        self.status: int | None = None
        self.cut = False
        self.starved = ""

    @property
    def last_step(self) -> str:
        """What its root was about to do when it was last heard."""
        return self.said.decode().split()[-1] if self.said else "start"

    def drop_files(self, names: Iterable[str]) -> None:
        for name in names:
            if (fd := self.files.pop(name, -1)) >= 0:
                os.close(fd)

    def give_grace(self, seconds: float) -> None:
        """So long it may take to end, unless it has less already."""
        now = time.monotonic()
        self.kill_at = min(self.kill_at, now + seconds)
        if self.stop_signal != signal.SIGTERM:
            self.term_at = min(self.term_at, now + seconds / 2)

    def lingers(self, alive: Iterable[int]) -> bool:
        """Whether nothing of it is ``alive`` but a root that never was the command, and that
        KILL cannot reach."""
        return self.void and time.monotonic() >= self.kill_at + STUCK and set(alive) <= {self.pid}

    def is_occupied(self) -> bool:
        """Whether its cgroup says that something is alive of what is to be ended."""
        return self.group is not None and not self.keep and self.group.is_populated()

    def select_wanted(self, table: Table, pids: set[int]) -> set[int]:
        """Those of ``pids`` that are to be ended."""
        return {pid for pid in pids if table[pid].session == self.pid} if self.keep else pids

    def is_stray(self, table: Table, pid: int) -> bool:
        """Whether nobody that had TERM answers for ``pid``, which had none. What a handler
        starts to clean up has the grace, as long as the one that had TERM lives; what has
        come loose from it, or from its like, gets a TERM of its own."""
        me, at = os.getpid(), pid
        while at in table and not table[at].zombie:
            if (at, table[at].start) in self.termed:
                return False
            at = table[at].parent
            if at in (me, 1):  # who loses its parent is given to us
                return True
        return False  # it loses its parent just now: the next scan tells


class Look(NamedTuple):
    """What a scan says of the trees."""

    #: Whose those are of whom that is known.
    owners: dict[Identity, Tree]
    #: The pids of each, by its number.
    members: dict[int, set[int]]
    #: Whether absence from it proves that a tree is empty.
    proven: bool
    #: Whether only another scan can prove that.
    spoiled: bool
    #: Those of which nothing but their environment may say whose they are.
    unidentified: list[Identity]
    #: Members of trees that were taken for empty.
    late: list[int]


class Forest:
    """The trees, and which process belongs to which."""

    def __init__(self) -> None:
        self.trees: dict[int, Tree] = {}
        #: Those of which nothing runs any more, until they are forgotten.
        self.over: dict[int, Tree] = {}
        self.roots: dict[int, Tree] = {}  # by pid; the latest, should a pid come again
        #: Children that are of no tree: roots that lingered on when their trees were over, and
        #: readers of environments.
        self.untracked: set[int] = set()
        #: Marks of trees that were over while some process did not say whose it is.
        self.unsure: set[bytes] = set()

    def add(self, tree: Tree) -> None:
        self.trees[tree.number] = self.roots[tree.pid] = tree

    def remove(self, tree: Tree) -> None:
        del self.trees[tree.number]
        if self.roots.get(tree.pid) is tree:
            del self.roots[tree.pid]
        if tree.void and not tree.reaped:
            self.untracked.add(tree.pid)
        if tree.group is not None:
            tree.group.remove()
        if tree.about is not None and not tree.void:
            self.over[tree.number] = tree
        else:
            tree.drop_files(list(tree.files))

    def find(self, number: int) -> Tree | None:
        return self.trees.get(number) or self.over.get(number)

    def forget(self, number: int) -> None:
        """The end of its run is stored."""
        if (tree := self.find(number)) is not None:
            tree.drop_files(list(tree.files))
            tree.about = None
            self.over.pop(number, None)

    def list_all(self) -> list[Tree]:
        return [*self.trees.values(), *self.over.values()]

    def list_ending(self) -> list[Tree]:
        return [tree for tree in self.trees.values() if tree.waiting]

    def list_kept(self) -> list[Tree]:
        """Those whose root has ended, and whose rest goes on unasked."""
        return [t for t in self.trees.values() if t.reaped and not t.waiting and not t.void]

    def map_marks(self) -> dict[bytes, Tree]:
        marks = {tree.mark: tree for tree in self.trees.values()}
        marks.update({tree.mark: tree for tree in self.list_ending()})
        return marks

    def look(
        self, table: Table, seen: Mapping[Identity, Tree], answers: Mapping[Identity, Answer]
    ) -> Look:
        """``seen``: the owners of the look before. ``answers``: of those that were unidentified.

        A scan is no snapshot: a process may fork and vanish between the listing and the
        reading. But what vanishes was reaped by its parent, and we reap nothing during
        a scan: of every tree alive, some child of ours is still there, if only as a
        zombie. So zombies count as members, and one whose tree is not known spoils the
        scan; the next one finds it reaped and its children below us. One that has not been
        asked yet may be of any tree; one that does not answer is taken for nobody's.
        """
        marks = self.map_marks()
        inside = {
            p: t for t in self.list_ending() if t.group is not None for p in t.group.list_pids()
        }
        owners: dict[int, Tree] = {}
        members: dict[int, set[int]] = {}
        unidentified: list[Identity] = []
        late: list[int] = []
        spoiled = False
        me = os.getpid()
        for pid in self.list_below(table):
            row = table[pid]
            answer = answers.get((pid, row.start))
            tree = (
                seen.get((pid, row.start))
                or self.find_by_root(pid, row)
                or self.find_by_session(table, row.session)
                or inside.get(pid)
                or owners.get(row.parent)
                or (marks.get(answer.mark) if answer is not None else None)
            )
            if tree is not None:
                owners[pid] = tree
                members.setdefault(tree.number, set()).add(pid)
            elif row.zombie:
                spoiled = spoiled or row.parent == me
            elif LINUX:
                unidentified.append((pid, row.start))
                if answer is not None and answer.mark in self.unsure:
                    late.append(pid)
        proven = not spoiled and all(x in answers for x in unidentified)
        seen = {(pid, table[pid].start): tree for pid, tree in owners.items()}
        return Look(seen, members, proven, spoiled, unidentified, late)

    def list_below(self, table: Table) -> Iterable[int]:
        """All processes that may be a tree's, parents first."""
        pids = list(walk_descendants(table, os.getpid()))
        if not LINUX:  # orphans are not below us there; their group tells
            known = set(pids)
            pids += [p for p, row in table.items() if row.group in self.roots and p not in known]
        return pids

    def find_by_root(self, pid: int, row: Row) -> Tree | None:
        """The tree whose root it is: that is in our session until it makes its own."""
        tree = self.roots.get(pid)
        return tree if tree is not None and tree.start == row.start else None

    def find_by_session(self, table: Table, session: int) -> Tree | None:
        """The tree whose root made ``session``; not one whose root merely had that pid."""
        tree = self.roots.get(session)
        leader = table.get(session)
        if tree is None or (leader is not None and leader.start != tree.start):
            return None
        return tree
