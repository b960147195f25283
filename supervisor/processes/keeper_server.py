"""The keeper's side of what it and the daemon tell each other (``keeper_messages.py``): it spawns,
looks, ends, holds what is to outlive the daemon, and says what became of it. One thread, and
nothing in it waits. Standard library only.
"""

import contextlib
import math
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from typing import Any

from . import cgroups
from .boot_timer import measure_sleep, open_boot_timer
from .environments import Environments, Reader
from .keeper_door import PROTOCOL, Door, offer_trees
from .message_socket import TOO_MANY, MessageSocket, close_all
from .proctable import describe_processes
from .signalling import kill_all
from .spawned_child import spawn_tree
from .tree_ender import TreeEnder
from .trees import Forest, Tree

MOST_SLEEP = 5.0  # of the machine, with a lease and without a daemon, seconds


class Leave(Exception):
    """All is to be killed, and nothing is left to do."""


class Keeper:
    def __init__(
        self,
        sock: socket.socket,
        state: str,
        groups: str = "",
        outlive: float = 0.0,
        version: str = "",
    ) -> None:
        """``outlive``: so many seconds what runs waits for another daemon when one is gone
        without a word. ``version``: of the daemon that started us."""
        self.state = state
        self.groups = groups
        self.outlive = outlive
        self.version = version
        self.forest = Forest()
        self.selector = selectors.DefaultSelector()
        self.daemon: MessageSocket | None = MessageSocket(sock, self.selector)
        self.door: Door | None = None
        self.shut = ""  # why no other daemon can come in
        if outlive > 0:
            try:
                self.door = Door(state, self.selector)
            except OSError as error:
                self.shut = error.strerror or str(error)
        self.timer = -1  # while there is no daemon
        self.expired = False  # the time is over, and a daemon has not taken yet what is here
        self.lease = -1  # a descriptor that goes on holding the daemon's lease
        self.leased = False  # whether there ever was one
        self.token: socket.socket | None = None  # ends when nobody starts a daemon any more
        self.woke = 0.0  # how much longer the machine has slept than we know of
        self.left = False  # the daemon said that it goes, and another one comes
        self.last = 0  # number of a message of the daemon
        self.environments = Environments(self.selector, self.forest.untracked)
        self.ender = TreeEnder(self.forest, self.environments, self.send)

    def run(self) -> None:
        """Serve until the daemon is gone for good, then kill all."""
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_r, False)
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(wake_r, selectors.EVENT_READ)
        fault = ""
        try:
            if self.shut:
                self.send({"shut": self.shut})
            while True:
                due = self.next_due()
                pause = None if due == math.inf else max(0.0, due - time.monotonic())
                for key, _ in self.selector.select(pause):
                    if key.fileobj == wake_r:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_r, 65536)
                        self.ender.dirty = True
                    elif isinstance(key.data, Reader):
                        self.environments.hear_reader(key.data)
                    elif isinstance(key.data, Tree):
                        self.hear_child(key.data)
                    else:
                        self.hear_daemons(key.data)
                if self.daemon is not None and self.daemon.again:
                    self.daemon.flush()
                if self.door is not None and time.monotonic() >= self.door.next_deadline():
                    self.door.keep_time()
                if self.has_overslept():
                    raise Leave  # the lease may be another's by now
                self.reap_children()
                self.environments.give_up()
                self.ender.report_silent()
                if time.monotonic() >= self.ender.next_scan():
                    self.ender.scan_trees()
        except Leave:
            pass
        except Exception:
            fault = traceback.format_exc()
        finally:
            self.daemon_left_for_good()
        if fault:  # last: stderr may be a pipe that nobody reads
            sys.stderr.write(fault)

    def daemon_left_for_good(self) -> None:
        if self.door is not None:
            self.door.close()
        for tree in list(self.forest.trees.values()):
            self.hear_child(tree)
        kill_all(self.forest, self.report_left)
        cgroups.stop_hindering(self.groups)

    def has_overslept(self) -> bool:
        alone = self.daemon is None and self.lease >= 0
        return alone and measure_sleep() - self.woke > MOST_SLEEP

    def next_due(self) -> float:
        due = min(self.ender.next_scan(), self.environments.next_deadline())
        if self.door is not None:
            due = min(due, self.door.next_deadline())
        if self.daemon is not None and self.daemon.again:
            due = min(due, time.monotonic() + TOO_MANY)
        if self.daemon is None and self.lease >= 0:  # nobody tells of a machine that has slept
            due = min(due, time.monotonic() + 1.0)
        return due

    # ---- daemons ----------------------------------------------------------------------------

    def hear_daemons(self, who: object) -> None:
        """Raises Leave."""
        if who is self.daemon and self.daemon is not None:
            self.hear_daemon(self.daemon)
        elif isinstance(who, Door):
            who.knock(occupied=self.daemon is not None)
        elif who == "lease":
            self.hear_lease()
        elif who == "timer":
            self.hear_timer()
        elif who == "token":
            self.hear_token()
        elif self.door is not None and (come := self.door.hear(who)) is not None:
            self.receive_daemon(*come)

    def hear_timer(self) -> None:
        """Raises Leave, unless a daemon came at the last moment; it may still take all."""
        if self.timer < 0:
            return
        self.close_timer()
        if self.daemon is None:
            raise Leave
        self.expired = True

    def close_timer(self) -> None:
        if self.timer >= 0:
            self.selector.unregister(self.timer)
            os.close(self.timer)
            self.timer = -1

    def hear_lease(self) -> None:
        """What comes there is the answer to what the dead daemon had asked, or the news of the
        lease's end, which its connection's follows. Raises Leave."""
        if self.lease < 0 or self.daemon is not None:  # a daemon has come at the same moment
            return
        try:
            if os.read(self.lease, 1 << 16):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        raise Leave

    def hear_daemon(self, daemon: MessageSocket) -> None:
        """Raises Leave."""
        try:
            for message, fds in daemon.receive():
                self.handle_message(message, fds)
        except EOFError:
            self.lose_daemon()
        else:
            daemon.flush()

    def lose_daemon(self) -> None:
        """It is gone without a word: another one may come. Raises Leave, if none will."""
        assert self.daemon is not None
        self.daemon.close()
        self.daemon = None
        if self.door is None or self.expired or (self.leased and self.lease < 0):
            raise Leave
        if not self.left and cgroups.hinder_restart(self.groups):
            raise Leave
        if self.lease >= 0:  # nothing comes there but the news that it is lost
            self.selector.register(self.lease, selectors.EVENT_READ, "lease")
            self.woke = measure_sleep()
        if self.timer < 0:  # else it came and took nothing: the time goes on
            self.timer = open_boot_timer(self.outlive)
            self.selector.register(self.timer, selectors.EVENT_READ, "timer")

    def receive_daemon(self, guest: MessageSocket, hello: dict[str, Any]) -> None:
        """Show it what is here. Until it has ``taken`` that, all stays as it is. Raises Leave."""
        if hello["op"] == "bye":
            raise Leave
        for tree in self.forest.list_all():
            self.hear_child(tree)
        self.daemon = guest
        assert self.door is not None
        self.door.send_all_away()
        if self.lease >= 0:
            self.selector.unregister(self.lease)
        trees = [tree for tree in self.forest.list_all() if not tree.void and tree.report < 0]
        beginning = [tree for tree in self.forest.list_all() if tree.report >= 0]
        greeting = {
            "protocol": PROTOCOL,
            "pid": os.getpid(),
            "trees": len(trees),
            "last": self.last,
            "groups": self.groups,
            "version": self.version,
            "left": self.left,
        }
        offer_trees(guest, greeting, trees)
        for tree in beginning:  # it may still fail to begin, of which nobody would be told
            self.end_tree({"tree": tree.number, "id": -1, "grace": 0, "keep": False})

    def be_taken(self, message: dict[str, Any]) -> None:
        """The daemon has all that was shown to it: it is ours from here on."""
        self.outlive = message["outlive"]
        self.close_timer()
        self.expired = self.left = False

    def hold_lease(self, fds: list[int]) -> None:
        """In place of the one before. While nobody holds it the daemon must not die: then we
        would not know whether what we have is ours."""
        if self.lease >= 0:
            os.close(self.lease)
        self.lease = fds[0] if fds else -1
        self.leased = True
        if fds:
            os.set_blocking(self.lease, False)
        close_all(fds[1:])

    def hold_token(self, fds: list[int]) -> None:
        """In place of the one before, which the service manager lets go of then."""
        self.drop_token()
        if fds:
            self.token = socket.socket(fileno=fds[0])
            self.token.setblocking(False)
            self.selector.register(self.token, selectors.EVENT_READ, "token")
        close_all(fds[1:])

    def hear_token(self) -> None:
        """The service manager has closed its end: when the daemon is gone, no other one comes. It
        does that last, so one that is there says that this manager keeps nothing, and that nothing
        is known. Raises Leave."""
        if self.token is None:  # let go of at the same moment
            return
        with contextlib.suppress(BlockingIOError, ConnectionError):
            if self.token.recv(1, socket.MSG_PEEK):
                return
            if self.daemon is None or self.daemon.is_hung_up():
                raise Leave
            self.drop_token()

    def drop_token(self) -> None:
        if self.token is not None:
            self.selector.unregister(self.token)
            self.token.close()
            self.token = None

    def send(self, message: dict[str, Any]) -> None:
        """To the daemon, if there is one."""
        if self.daemon is not None:
            self.daemon.send(message)

    def handle_message(self, message: dict[str, Any], fds: list[int]) -> None:
        """Raises Leave."""
        op = message["op"]
        self.last = max(self.last, message.get("id", 0))
        if op == "spawn":
            kept = False
            try:
                begun = spawn_tree(message, fds, self.state, self.groups)
                kept = True
                self.forest.add(begun)  # it is known from here on; ``hear_child`` answers
                self.selector.register(begun.report, selectors.EVENT_READ, begun)
            except OSError as error:
                self.send({"id": message["id"], "step": "fork", "errno": error.errno})
            finally:
                close_all(fds[: 3 if kept else None])
            return
        if op in ("hold", "token"):
            (self.hold_lease if op == "hold" else self.hold_token)(fds)
            return
        close_all(fds)
        if op == "ping":
            self.send({"id": message["id"]})
        elif op == "end":
            self.end_tree(message)
        elif op == "drop":
            if (tree := self.forest.find(message["tree"])) is not None:
                tree.drop_files(message["names"])
        elif op == "about":
            if (tree := self.forest.find(message["tree"])) is not None:
                tree.about = message["about"]
        elif op == "forget":
            self.forest.forget(message["tree"])
        elif op == "release":
            held = self.lease >= 0
            self.hold_lease([])
            self.send({"id": message["id"], "let_go": held})
        elif op == "leave":
            self.left = True
        elif op == "taken":
            self.be_taken(message)
        elif op == "bye":
            raise Leave

    def hear_child(self, tree: Tree) -> None:
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
                self.answer_spawn(tree, {"step": tree.last_step, "errno": int(number)})
            else:
                self.answer_spawn(tree, {"pid": tree.pid})

    def answer_spawn(self, tree: Tree, what: dict[str, Any]) -> None:
        """Answer its spawn."""
        self.selector.unregister(tree.report)
        os.close(tree.report)
        tree.report = -1
        self.send({"id": tree.number, **what})

    def end_tree(self, message: dict[str, Any]) -> None:
        tree = self.forest.trees.get(message["tree"])
        if tree is None:
            self.send({"id": message["id"]})
            return
        self.hear_child(tree)
        tree.cut |= not tree.reaped
        if tree.report >= 0:
            tree.void = True
            if not tree.reaped:
                os.kill(tree.pid, signal.SIGKILL)
            self.answer_spawn(tree, {"step": tree.last_step, "hung": True})
        tree.keep = message["keep"] and (tree.keep or not tree.waiting)
        tree.waiting.append(message["id"])
        # Before its exec it ignores TERM, as we do.
        tree.give_grace(0 if tree.void else message["grace"])
        self.ender.dirty = True

    def reap_children(self) -> None:
        """Collect the dead, orphans among them; report roots."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.forest.untracked.discard(pid)
            tree = self.forest.roots.get(pid)
            if tree is None or tree.reaped:
                continue
            tree.reaped = True
            self.hear_child(tree)
            if not tree.void:
                tree.status = os.waitstatus_to_exitcode(status)
                tree.starved = "" if tree.group is None else tree.group.find_starvation()
                self.send({"exit": tree.number, "status": tree.status, "starved": tree.starved})
            elif not tree.waiting:
                self.forest.remove(tree)

    def report_left(self, held: dict[int, str]) -> None:
        """At the end of all: nothing but these is left, and they cannot be ended."""
        self.send({"left": describe_processes(held)})
