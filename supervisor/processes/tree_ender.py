"""How trees are ended, and how it is known that they have: scans of the process table, and what
follows from each. Nothing in it waits. Standard library only: the keeper imports it.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .environments import Environments
from .proctable import Identity, Table, describe_processes, find_hindrance, scan
from .signalling import kill_processes, signal_process, terminate_processes
from .trees import STUCK, Forest, Look, Tree

TICK = 0.03  # while a tree is being ended: what no SIGCHLD announces is seen by then
MIN_PAUSE = 0.002  # between two scans, however many children die


class Waiting(NamedTuple):
    """A scan with somebody in it who has not answered yet; whose the others are; and the trees
    whose roots had been reaped before it. Of these, one that was empty then stays so."""

    table: Table
    seen: dict[Identity, Tree]
    over: set[int]


class TreeEnder:
    """Ends those trees of ``forest`` that are to be, and tells the daemon, by ``send``, of all that
    is over. ``dirty``: something has happened since the last scan, as whoever sets it knows."""

    def __init__(
        self,
        forest: Forest,
        environments: Environments,
        send: Callable[[dict[str, Any]], None],
    ) -> None:
        self.dirty = False
        self.forest = forest
        self.environments = environments
        self.send = send
        self.waiting: Waiting | None = None
        self.seen: dict[Identity, Tree] = {}  # by the last scan
        self.scanned = 0.0  # when that was over
        self.rested = 0.0  # when the next may be

    def next_scan(self) -> float:
        """When to scan next; never, unless a tree is being ended, or somebody is to be asked."""
        ending = self.forest.list_ending()
        if not ending:
            return max(self.rested, self.scanned + TICK, self.environments.next_ask())
        if self.dirty or self.environments.changed:
            return self.rested
        kills = [tree.kill_at for tree in ending if not tree.killed]
        return max(self.rested, min([self.scanned + TICK, *kills]))

    def scan_trees(self) -> None:
        """One scan, and what follows from it for each tree that is being ended."""
        began = time.monotonic()
        self.dirty = self.environments.changed = False
        self.settle_waiting_scan()
        with contextlib.suppress(OSError):  # no descriptor left: nothing is concluded
            over = {tree.number for tree in self.forest.trees.values() if tree.reaped}
            table = {x: row for x, row in scan().items() if x not in self.forest.untracked}
            look = self.forest.look(table, self.seen, self.environments.answers)
            self.seen = look.owners
            self.dirty = look.spoiled
            self.environments.forget_gone(table, {} if self.waiting is None else self.waiting.table)
            self.ask_unidentified(look)
            if look.proven:
                self.settle_scan(table, look, over)
            elif not look.spoiled and self.waiting is None and self.forest.list_ending():
                self.waiting = Waiting(table, look.owners, over)
            kill_processes(table, look.late)
            for tree in self.forest.list_ending():
                pids = tree.select_wanted(table, look.members.get(tree.number, set()))
                if tree.lingers(pid for pid in pids if not table[pid].zombie):
                    self.finish_tree(tree, table, set())
                elif pids or tree.is_occupied():
                    self.signal_tree(tree, table, pids, look.unidentified)
                    self.report_held(tree, table, pids)
        self.scanned = time.monotonic()
        # Many deaths must not mean as many scans.
        self.rested = self.scanned + max(MIN_PAUSE, self.scanned - began)

    def ask_unidentified(self, look: Look) -> None:
        """Have those read whom nothing else identifies; when no tree is being ended, those of
        whom an answer is missing since the last one was. Raises OSError."""
        answers = self.environments.answers
        silent = [x for x in look.unidentified if x in answers and answers[x].silent]
        marks = {*self.forest.map_marks(), *self.forest.unsure}
        self.environments.ask(look.unidentified if self.forest.list_ending() else silent, marks)
        if not silent and not look.late:
            self.forest.unsure.clear()

    def settle_waiting_scan(self) -> None:
        """Conclude from the scan that was waiting for answers, if they have all come. Another one
        would have its own to wait for, without end when somebody forks and exits all the time."""
        if self.waiting is not None:
            table, seen, over = self.waiting
            look = self.forest.look(table, seen, self.environments.answers)
            if look.proven:
                self.settle_scan(table, look, over)
            if look.proven or look.spoiled:
                self.waiting = None

    def settle_scan(self, table: Table, look: Look, over: set[int]) -> None:
        """What follows from a scan by which absence is proven. ``over``: the trees whose roots had
        been reaped before it."""
        for tree in self.forest.list_ending():
            mine = look.members.get(tree.number, set())
            pids = tree.select_wanted(table, mine)
            if tree.number in over and not pids and not tree.is_occupied():
                self.finish_tree(tree, table, mine)
        for tree in self.forest.list_kept():
            if tree.number in over - look.members.keys() and not tree.is_occupied():
                self.forest.remove(tree)
                self.send({"gone": tree.number})

    def report_silent(self) -> None:
        """Say who does not tell whose it is."""
        if silent := self.environments.silenced:
            self.send({"unidentified": describe_processes(dict.fromkeys(silent, ""))})
            silent.clear()

    def finish_tree(self, tree: Tree, table: Table, rest: set[int]) -> None:
        """What was to be ended of it is gone; ``rest`` goes on."""
        kept = {pid: "" for pid in rest if not table[pid].zombie}
        if kept:
            waiters, tree.waiting = tree.waiting, []
            tree.kill_at, tree.killed, tree.keep = math.inf, False, False
            tree.kept = True
            tree.termed.clear()
            tree.held = {}  # the daemon has forgotten it as well
        else:
            waiters = tree.waiting
            if not tree.keep and any(x.silent for x in self.environments.answers.values()):
                self.forest.unsure.add(tree.mark)
            self.forest.remove(tree)
        for waiter in waiters:
            self.send(
                {"id": waiter, "ended": sorted(tree.leftovers), "kept": describe_processes(kept)}
            )
        tree.leftovers = []
        tree.doubtful.clear()

    def signal_tree(
        self, tree: Tree, table: Table, pids: set[int], unidentified: list[Identity]
    ) -> None:
        """Tell who is to hear it to end, or KILL all. ``unidentified``: who may be of it too."""
        alive = [pid for pid in pids if not table[pid].zombie]
        found = {pid: "" for pid in alive if (pid, table[pid].start) in tree.doubtful}
        tree.leftovers += describe_processes(found)
        tree.doubtful -= {(pid, table[pid].start) for pid in found}
        if time.monotonic() >= tree.kill_at:
            tree.killed = True
            if tree.group is not None and not tree.keep:
                tree.group.kill()
            kill_processes(table, alive)
        elif not tree.termed:
            if tree.reaped:
                tree.leftovers = describe_processes(dict.fromkeys(alive, ""))
                tree.doubtful = set(unidentified)
            # What a command has left behind knows nothing of the command's own signal.
            terminate_processes(table, alive, signal.SIGTERM if tree.reaped else tree.stop_signal)
            tree.termed.update((pid, table[pid].start) for pid in alive)
        else:
            if time.monotonic() >= tree.term_at:
                tree.term_at = math.inf
                for identity in tree.termed:
                    signal_process(*identity, signal.SIGTERM)
            for pid in [pid for pid in alive if tree.is_stray(table, pid)]:
                identity = (pid, table[pid].start)
                tree.termed.add(identity)
                signal_process(*identity, signal.SIGTERM)
                signal_process(*identity, signal.SIGCONT)  # a stopped process does not hear TERM

    def report_held(self, tree: Tree, table: Table, pids: set[int]) -> None:
        """Say who of it cannot be ended, if that is news."""
        killed = time.monotonic() >= tree.kill_at + STUCK
        alive = [pid for pid in pids if not table[pid].zombie and not tree.void]
        why = {pid: find_hindrance(pid, table[pid].state, killed=killed) for pid in alive}
        held = {pid: reason for pid, reason in why.items() if reason}
        if held != tree.held:
            tree.held = held
            self.send({"held": tree.number, "pids": describe_processes(held)})
