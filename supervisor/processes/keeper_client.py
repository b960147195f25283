"""A run's process tree, from the daemon's side: spawn, wait, end.

All children belong to the keeper (``keeper.py``), which outlives a killed daemon just
long enough to end them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
import trio

from ...config.run_limits import Plan
from ...config.schema import Account
from ..host.private_files import Inherited
from .cgroups import Groups
from .keeper_door import SOCKET_FILE
from .keeper_link import NOWHERE, KeeperLink, KeeperLost, Origin
from .keeper_messages import encode
from .keeper_visit import About, Found, Visit
from .process import Left, Process
from .process_words import explain_hindrance, explain_silence, name_processes
from .spawn_errors import SPAWN_LIMIT, explain_spawn_failure, make_portable

log = logging.getLogger("runctld.processes")

#: Between two looks whether the keeper answers, seconds; after so many of silence it is ended.
ASK, SILENCE = 2.0, 10.0
_TICK = 0.5


class Keeper:
    """The daemon's end of the keeper; see ``open_keeper``. ``dead`` is set when it went
    away though nobody closed it; ``stopped`` says why, when it was we who killed it.
    ``inherited``: what is for commands of our own. ``silent``: for how many seconds it owes an
    answer. ``cgroups``: where runs get theirs, if they do. ``users``: ids of all, besides our
    own, whom runs may be of."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        nursery: trio.Nursery,
        given: Inherited,
        state: str,
        cgroups: Groups | None = None,
        users: Collection[int] = (),
        origin: Origin = NOWHERE,
    ) -> None:
        self.origin = origin
        self.inherited = given
        self.cgroups = cgroups
        self.users = frozenset(users)
        self._state = state
        self._link = KeeperLink(sock, origin.last)
        self._nursery = nursery
        #: Runs of whose trees the next daemon would be told.
        self._told: dict[str, int] = {}
        #: What outlived an earlier daemon, and was not claimed or ended yet: by its number.
        self.found: dict[int, Found] = {}
        #: That daemon left it on purpose.
        self.found_left = False
        self._processes: dict[int, Process] = {}
        self._ending: Counter[Process] = Counter()
        #: Of trees: their marks, and what says why processes of them cannot be ended.
        self._marks: dict[int, str] = {}
        self._kept: set[int] = set()
        self._held: dict[int, list[str]] = {}
        self._hasty = False
        #: Since when an answer is owed, in seconds in which we ourselves ran.
        self.silent = 0.0
        self.dead = trio.Event()
        #: We end, and not in order: what runs is left to the next daemon.
        self.broken_off = False

    @property
    def gone(self) -> bool:
        """It is dead, or let go of at our end."""
        return self._link.gone

    @property
    def stopped(self) -> str | None:
        """Why, when it was we who killed it."""
        return self._link.stopped

    def close(self) -> None:
        self._link.sock.close()

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        mark: str,
        env: Mapping[str, str],
        cwd: str | None,
        stdin: int,
        stdout: int,
        stderr: int,
        tty: bool = False,
        umask: int | None = None,
        group: str | None = None,
        account: Account | None = None,
        limits: Plan | None = None,
        stop_signal: int = signal.SIGTERM,
        keep: Mapping[str, int] | None = None,
        tell: About | None = None,
    ) -> Process:
        """Start ``argv`` in a session of its own; ``mark`` becomes RUNCTL_RUN. ``cwd`` None: the
        home directory of its user, or / where that is none, or our state's. With ``tty``
        ``stdout``, a terminal, controls that session. ``umask``: None for ours.
        ``group``: what its cgroup is called, where there are cgroups. ``account``: whom it runs
        as, None for us. ``stop_signal``: what it is told to end with; in the middle of the grace
        it hears TERM. ``keep``: descriptors that outlive us, by name, and ``tell`` what the next
        daemon is told of the tree, until it is forgotten. What a cancelled spawn has started is
        killed, and gone when this returns.

        Raises: RunFailed when it cannot be executed within SPAWN_LIMIT, KeeperLost."""
        message: dict[str, Any] = {
            "op": "spawn",
            "argv": [make_portable(part) for part in argv],
            "mark": make_portable(mark),
            "env": {make_portable(k): make_portable(v) for k, v in env.items()},
            "cwd": make_portable(self._find_home(account) if cwd is None else cwd),
            "otherwise": "/" if cwd is None else None,
            "tty": tty,
            "umask": umask,
            "files": self.inherited.files,
            "group": group,
            "account": None,
            "limits": limits and {"files": limits.files, "each": limits.each},
            "stop_signal": stop_signal,
            "keep": list(keep or ()),
            "about": None if tell is None else msgspec.to_builtins(tell),
        }
        if account is not None:
            ids = {"uid": account.uid, "gid": account.gid, "groups": account.groups}
            message["account"] = ids
        number = self._link.next_number()
        self._marks[number] = mark
        if tell is not None and tell.run:
            self._told[tell.run] = number
        fds = (stdin, stdout, stderr, *(keep or {}).values())
        answered = await self._link.post(number, message, fds)
        try:
            with trio.move_on_after(SPAWN_LIMIT):
                await answered.wait()
            if not answered.is_set():
                await self._end_tree(number, 0)  # the keeper answers both
            reply = self._link.take_answer(number)
        except trio.Cancelled:
            with trio.CancelScope(shield=True), contextlib.suppress(KeeperLost):
                await self._end_tree(number, 0)
            raise
        finally:
            self._link.forget_request(number)
        if "pid" not in reply:
            self._marks.pop(number, None)
            raise explain_spawn_failure(argv[0], cwd, env.get("PATH"), reply, account)
        process: Process = reply["process"]
        return process

    def _find_home(self, account: Account | None) -> str:
        found = self.inherited.env.get("HOME", "") if account is None else account.home
        ours = not os.path.isabs(found) or os.path.realpath(found) == self._state
        return "/" if ours else found

    def held(self, mark: str) -> str | None:
        """Which processes of the trees with ``mark``, which are being ended, cannot be, and
        why, in words; None when nothing is known to be in the way."""
        trees = [tree for tree in self._held if self._marks.get(tree) == mark]
        return "; ".join(words for tree in trees for words in self._held[tree]) or None

    def hasten(self) -> None:
        """From here on no tree that is being ended has any grace."""
        self._hasty = True
        for process in self._ending:
            self._nursery.start_soon(_end_now, process)

    async def end_kept(self, grace: float) -> None:
        """End what goes on of runs that have ended."""
        async with trio.open_nursery() as nursery:
            for tree in list(self._kept):
                nursery.start_soon(self._end_one_kept, tree, grace)

    async def _end_one_kept(self, tree: int, grace: float) -> None:
        with contextlib.suppress(KeeperLost):
            await self._end_tree(tree, grace)

    async def end_process(self, process: Process, tree: int, grace: float, keep: bool) -> Left:
        self._ending[process] += 1
        try:
            grace = 0 if self._hasty else grace
            return await self._end_tree(tree, grace, keep=keep)
        finally:
            self._ending[process] -= 1
            if not self._ending[process]:
                del self._ending[process]

    async def _end_tree(self, tree: int, grace: float, *, keep: bool = False) -> Left:
        """Raises KeeperLost."""
        message = {"op": "end", "tree": tree, "grace": grace, "keep": keep}
        reply = await self._link.ask(message)
        self._held.pop(tree, None)
        if kept := reply.get("kept"):
            self._kept.add(tree)
        else:
            self._kept.discard(tree)
            self._marks.pop(tree, None)
        return Left(name_processes(reply.get("ended", [])), name_processes(kept or []))

    def adopt(self, visit: Visit) -> None:
        """Take over what an earlier daemon has left running. Before ``read_messages``."""
        self._link.note_received(visit.rest)
        self.found_left = visit.left
        for tree in visit.trees:
            self._marks[tree.number] = tree.mark
            self.found[tree.number] = tree
            if tree.kept:
                self._kept.add(tree.number)

    def claim_found(self, tree: Found) -> Process:
        """Its root, of a tree that goes on. Its descriptors are the caller's."""
        if tree.about is not None and tree.about.run:
            self._told[tree.about.run] = tree.number
        process = Process(self, tree.number, tree.pid)
        self.found.pop(tree.number, None)
        if tree.status is None:
            self._processes[tree.number] = process
        else:
            process.note_exit(tree.status, tree.starved)
        return process

    async def end_found(self, tree: Found, grace: float) -> None:
        """End a tree that does not go on, and forget it. Raises KeeperLost."""
        self._let_go(tree)
        await self._end_tree(tree.number, grace)
        await self.forget(tree.number)

    async def forget_found(self, tree: Found) -> None:
        """The end of its run is stored; what it left behind goes on."""
        self._let_go(tree)
        await self.forget(tree.number)

    def _let_go(self, tree: Found) -> None:
        self.found.pop(tree.number, None)
        for fd in tree.take_files().values():
            os.close(fd)

    async def leave(self) -> None:
        """We end on purpose, and what runs goes on."""
        await self._link.tell({"op": "leave"})
        self.broken_off = True

    async def hold_lease(self, fd: int) -> None:
        """Have it hold a copy of ``fd`` as well: who is connected through that stays so, for as
        long as what runs goes on without us."""
        await self._link.tell({"op": "hold", "fds": 1}, (fd,))

    async def give_token(self, fd: int) -> None:
        """Have it hold ``fd``, whose other end closes when no daemon is started any more: once we
        are gone it then ends all at once."""
        await self._link.tell({"op": "token", "fds": 1}, (fd,))

    async def release_lease(self) -> bool:
        """Let go of what an earlier daemon had it hold; whether it did. Raises KeeperLost."""
        return bool((await self._link.ask({"op": "release"})).get("let_go"))

    def list_runs(self) -> set[str]:
        """Those that another daemon could adopt."""
        found = {tree.about.run for tree in self.found.values() if tree.about is not None}
        return (found | self._told.keys()) - {""}

    async def forget_run(self, run: str) -> None:
        """Its end is stored: nobody is told of its tree any more."""
        if (tree := self._told.pop(run, None)) is not None:
            await self.forget(tree)

    async def forget(self, tree: int) -> None:
        """Nobody is told of it any more."""
        await self._link.tell({"op": "forget", "tree": tree})

    async def drop(self, tree: int, names: Sequence[str]) -> None:
        """Let go of descriptors that are kept of it."""
        await self._link.tell({"op": "drop", "tree": tree, "names": list(names)})

    async def describe(self, tree: int, about: About) -> None:
        """What the next daemon is told of it."""
        await self._link.tell({"op": "about", "tree": tree, "about": msgspec.to_builtins(about)})

    async def read_messages(self, scope: trio.CancelScope) -> None:
        """Dispatch what the keeper says, until it is gone, or ``scope`` is cancelled."""
        with scope:
            while (messages := await self._link.receive()) is not None:
                for message in messages:
                    self._handle_message(message)
            self.dead.set()
            self.mark_lost()

    async def ping(self) -> None:
        """Ask it whether it is there, every so often."""
        with contextlib.suppress(KeeperLost):
            while True:
                await trio.sleep(ASK)
                self.silent = _TICK
                await self._link.ask({"op": "ping"})
                self.silent = 0.0

    async def end_when_silent(self, kill: Callable[[], None], scope: trio.CancelScope) -> None:
        """End one that does not answer: whoever may signal it may have stopped it, and with it
        all that is asked of it. What it has spawned ends with it."""
        with scope:
            while not self.gone:
                # Tick by tick: time in which we were stopped ourselves says nothing of it.
                await trio.sleep(_TICK)
                if self.silent:
                    self.silent += _TICK
                if self.silent > SILENCE and not self.gone:
                    self._link.stopped = (
                        f"the process keeper has not answered for {SILENCE:g} s, as when a run has"
                        " stopped it (SIGSTOP); it is killed with all its processes: start runctld"
                        " again"
                    )
                    log.error("%s", self.stopped)
                    kill()
                    return

    async def say_bye(self) -> None:
        """Have it kill all, and end: ``dead`` says when it has."""
        with contextlib.suppress(OSError, trio.ClosedResourceError):
            await self._link.sock.send(encode({"op": "bye"}))

    async def dismiss(self) -> list[str]:
        """Have it kill all; returns when it has, or with the words for what cannot be ended."""
        await self.say_bye()
        while (messages := await self._link.receive()) is not None:
            for message in messages:
                if "left" in message:
                    return [explain_hindrance(*words) for words in message["left"]]
        return []

    def mark_lost(self) -> None:
        """Let nobody wait for a keeper that is gone."""
        self._link.mark_lost()
        for process in self._processes.values():
            process.note_lost()

    def _handle_message(self, message: dict[str, Any]) -> None:
        if "exit" in message:
            process = self._processes.pop(message["exit"], None)
            if process is not None:
                process.note_exit(message["status"], message.get("starved", ""))
            elif (tree := self.found.get(message["exit"])) is not None:
                tree.status, tree.starved = message["status"], message.get("starved", "")
            return
        if "held" in message:
            self._note_held(
                message["held"], [explain_hindrance(*words) for words in message["pids"]]
            )
            return
        if "shut" in message:
            log.warning(
                "commands end with this daemon, since no other one could adopt them: %s cannot be"
                " made in the state directory (%s)",
                *(SOCKET_FILE, message["shut"]),
            )
            return
        if "gone" in message:
            self._kept.discard(message["gone"])
            self._marks.pop(message["gone"], None)
            return
        if "unidentified" in message:
            for words in message["unidentified"]:
                log.warning("%s", explain_silence(*words))
            return
        number = message["id"]
        if "pid" in message:  # known before its exit can be reported
            process = Process(self, number, message["pid"])
            message["process"] = self._processes[number] = process
        self._link.answer(number, message)

    def _note_held(self, tree: int, words: list[str]) -> None:
        if tree not in self._marks:
            return
        for new in words:
            if new not in self._held.get(tree, ()):
                log.warning("run %s cannot be ended: %s", self._marks[tree], new)
        self._held[tree] = words


async def _end_now(process: Process) -> None:
    try:
        await process.end(0)
    except KeeperLost:
        log.debug("process %d went with its keeper", process.pid)
