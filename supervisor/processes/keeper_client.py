"""A run's process tree, from the daemon's side: spawn, wait, end.

All children belong to the keeper (``keeper.py``), which outlives a killed daemon just
long enough to end them. ``keeper.lock`` is held while any of them may be alive.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import trio

from ...config.run_limits import Plan
from ...config.schema import Account
from ...protocol.errors import RunFailed, Unavailable, shortened
from ...protocol.model import one_line
from ..host.private_files import Inherited, inherited
from ..host.stop_times import CLOSE_WAIT
from .cgroups import Groups
from .keeper import (
    HEADER,
    PR_SET_CHILD_SUBREAPER,
    Table,
    descent,
    described,
    doomed,
    environment,
    hindrance,
    prctl,
    scan,
    status_of,
    strike,
)

log = logging.getLogger("runctld.processes")

#: What an interpreter may need to start.
_NEEDED = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES")

#: Processes that a message names.
MOST_NAMED = 5
#: Keepers that stay on after us, with what cannot be ended: nobody waits for them.
_LEFT: list[subprocess.Popen[bytes]] = []
#: Between two looks whether the keeper answers, seconds; after so many of silence it is ended.
ASK, SILENCE = 2.0, 10.0
#: Names are worth so long a wait, seconds.
NAMED_WITHIN = 2.0
_TICK = 0.5
#: So long a start waits for what an earlier daemon left before it says so, seconds: the keeper
#: of one that was killed is done sooner.
PATIENCE = 1.0
#: What a command may take until it is executed, seconds. A directory on a server that is gone,
#: or a virus scanner that does not answer, may hold it for ever.
SPAWN_LIMIT = 30.0


class KeeperLost(Unavailable):
    """The keeper is gone, and with it all knowledge of its processes."""

    def __init__(self, why: str | None = None) -> None:
        gone = "the process keeper is gone; restart runctld, which clears up after it"
        super().__init__(why or gone)


class Left(NamedTuple):
    """What a root left behind: each as "name (pid)", ``MOST_NAMED`` at most and then "...".
    ``ended``: what was ended with its tree; ``kept``: what goes on."""

    ended: list[str]
    kept: list[str]


class Process:
    """The root of a tree. ``pid``: its process id, which is also its session."""

    def __init__(self, keeper: Keeper, tree: int, pid: int) -> None:
        self._keeper = keeper
        self._tree = tree
        self.pid = pid
        self._status: int | None = None
        self._exited = trio.Event()
        #: Once it has ended: "limit", if it was killed since its tree had all the memory that
        #: it may have; "machine", if it was killed since there was none left; else "".
        self.starved = ""

    async def wait(self) -> int:
        """Exit code of the root, or minus the signal that ended it. Raises KeeperLost."""
        await self._exited.wait()
        if self._status is None:
            raise KeeperLost(self._keeper.stopped)
        return self._status

    async def end(self, grace: float, *, keep: bool = False) -> Left:
        """TERM the whole tree, KILL it after ``grace`` seconds; returns when it is
        verified empty, however long that takes. May be called again, also at the same
        time: a shorter grace then hastens all. Cancelling the call does not cancel what
        it began. With ``keep`` what has left the root's session goes on, until it is ended
        by another call, by ``end_kept``, or with the keeper. Raises KeeperLost."""
        return await self._keeper._end(self, self._tree, grace, keep)


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
    ) -> None:
        self.inherited = given
        self.stopped: str | None = None
        self.cgroups = cgroups
        self.users = frozenset(users)
        self._state = state
        self._sock = sock
        self._nursery = nursery
        self._lock = trio.Lock()
        self._gone = False
        self._next = 0
        self._waiting: dict[int, trio.Event] = {}
        self._replies: dict[int, dict[str, Any]] = {}
        self._processes: dict[int, Process] = {}
        self._ending: Counter[Process] = Counter()
        self._buffer = bytearray()
        #: Of trees: their marks, and what says why processes of them cannot be ended.
        self._marks: dict[int, str] = {}
        self._kept: set[int] = set()
        self._held: dict[int, list[str]] = {}
        self._hasty = False
        #: Since when an answer is owed, in seconds in which we ourselves ran.
        self.silent = 0.0
        self.dead = trio.Event()

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
    ) -> Process:
        """Start ``argv`` in a session of its own; ``mark`` becomes RUNCTL_RUN. ``cwd`` None: the
        home directory of its user, or / where that is none, or our state's. With ``tty``
        ``stdout``, a terminal, controls that session. ``umask``: None for ours.
        ``group``: what its cgroup is called, where there are cgroups. ``account``: whom it runs
        as, None for us. What a cancelled spawn has started is killed, and gone when this returns.

        Raises: RunFailed when it cannot be executed within SPAWN_LIMIT, KeeperLost."""
        message: dict[str, Any] = {
            "op": "spawn",
            "argv": [_portable(part) for part in argv],
            "mark": _portable(mark),
            "env": {_portable(k): _portable(v) for k, v in env.items()},
            "cwd": _portable(self._home(account) if cwd is None else cwd),
            "otherwise": "/" if cwd is None else None,
            "tty": tty,
            "umask": umask,
            "group": group,
            "account": None,
            "limits": None,
        }
        if account is not None:
            ids = {"uid": account.uid, "gid": account.gid, "groups": account.groups}
            message["account"] = ids
        if limits is not None:
            message["limits"] = {"files": limits.files, "each": limits.each}
        number = self._number()
        self._marks[number] = mark
        answered = await self._post(number, message, (stdin, stdout, stderr))
        try:
            with trio.move_on_after(SPAWN_LIMIT):
                await answered.wait()
            if not answered.is_set():
                await self._end_tree(number, 0)  # the keeper answers both
            reply = self._answer(number)
        except trio.Cancelled:
            with trio.CancelScope(shield=True), contextlib.suppress(KeeperLost):
                await self._end_tree(number, 0)
            raise
        finally:
            self._forget(number)
        if "pid" not in reply:
            self._marks.pop(number, None)
            raise _failure(argv[0], cwd, env.get("PATH"), reply, account)
        process: Process = reply["process"]
        return process

    def _home(self, account: Account | None) -> str:
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
            self._nursery.start_soon(_discard, process)

    async def end_kept(self, grace: float) -> None:
        """End what goes on of runs that have ended."""
        async with trio.open_nursery() as nursery:
            for tree in list(self._kept):
                nursery.start_soon(self._end_one_kept, tree, grace)

    async def _end_one_kept(self, tree: int, grace: float) -> None:
        with contextlib.suppress(KeeperLost):
            await self._end_tree(tree, grace)

    async def _end(self, process: Process, tree: int, grace: float, keep: bool) -> Left:
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
        number = self._number()
        message = {"op": "end", "tree": tree, "grace": grace, "keep": keep}
        try:
            await (await self._post(number, message)).wait()
            reply = self._answer(number)
            self._held.pop(tree, None)
            if kept := reply.get("kept"):
                self._kept.add(tree)
            else:
                self._kept.discard(tree)
                self._marks.pop(tree, None)
            return Left(_names(reply.get("ended", [])), _names(kept or []))
        finally:
            self._forget(number)

    def _number(self) -> int:
        self._next += 1
        return self._next

    async def _post(
        self, number: int, message: dict[str, Any], fds: tuple[int, ...] = ()
    ) -> trio.Event:
        """Send ``message``; what is set when its answer is there. When this is cancelled
        nothing was sent. Raises KeeperLost."""
        data = json.dumps({**message, "id": number}).encode()
        event = self._waiting[number] = trio.Event()
        try:
            async with self._lock:
                with trio.CancelScope(shield=True):  # half a message would garble the next
                    await self._send(HEADER.pack(len(data)) + data, fds)
        except BaseException:
            self._forget(number)
            raise
        return event

    def _answer(self, number: int) -> dict[str, Any]:
        """Raises KeeperLost."""
        if number not in self._replies:
            raise KeeperLost(self.stopped)
        return self._replies[number]

    def _forget(self, number: int) -> None:
        self._waiting.pop(number, None)
        self._replies.pop(number, None)

    async def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            while True:
                if self._gone:
                    raise KeeperLost(self.stopped)
                try:
                    sent = await self._sock.sendmsg([data], rights)
                    break
                except OSError as error:
                    if error.errno != errno.ETOOMANYREFS:
                        raise
                    await trio.sleep(0.005)  # too many descriptors under way: let it take some
            while sent < len(data):
                sent += await self._sock.send(data[sent:])
        except (BrokenPipeError, ConnectionError, trio.ClosedResourceError) as error:
            raise KeeperLost(self.stopped) from error

    async def _read(self, scope: trio.CancelScope) -> None:
        """Dispatch what the keeper says, until it is gone, or ``scope`` is cancelled."""
        with scope:
            while (messages := await self._hear()) is not None:
                for message in messages:
                    self._handle(message)
            self.dead.set()
            self._lose()

    async def _ping(self) -> None:
        """Ask it whether it is there, every so often."""
        with contextlib.suppress(KeeperLost):
            while True:
                await trio.sleep(ASK)
                number = self._number()
                self.silent = _TICK
                try:
                    await (await self._post(number, {"op": "ping"})).wait()
                    self._answer(number)
                finally:
                    self._forget(number)
                self.silent = 0.0

    async def _watch(self, popen: subprocess.Popen[bytes], scope: trio.CancelScope) -> None:
        """End one that does not answer: whoever may signal it may have stopped it, and with it
        all that is asked of it. What it has spawned ends with it."""
        with scope:
            while not self._gone:
                # Tick by tick: time in which we were stopped ourselves says nothing of it.
                await trio.sleep(_TICK)
                if self.silent:
                    self.silent += _TICK
                if self.silent > SILENCE and not self._gone:
                    self.stopped = (
                        f"the process keeper has not answered for {SILENCE:g} s, as when a run has"
                        " stopped it (SIGSTOP); it is killed with all its processes: start runctld"
                        " again"
                    )
                    log.error("%s", self.stopped)
                    popen.kill()
                    return

    async def _hear(self) -> list[dict[str, Any]] | None:
        """What has come since; None when the keeper is gone."""
        try:
            data = await self._sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        self._buffer += data
        messages = []
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            messages.append(json.loads(self._buffer[HEADER.size : end]))
            del self._buffer[:end]
        return messages

    async def _dismiss(self) -> list[str]:
        """Have it kill all; returns when it has, or with the words for what cannot be ended."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        while (messages := await self._hear()) is not None:
            for message in messages:
                if "left" in message:
                    return [_hindered(*words) for words in message["left"]]
        return []

    def _lose(self) -> None:
        """Let nobody wait for a keeper that is gone."""
        self._gone = True
        for event in self._waiting.values():
            event.set()
        for process in self._processes.values():
            process._exited.set()

    def _handle(self, message: dict[str, Any]) -> None:
        if "exit" in message:
            process = self._processes.pop(message["exit"], None)
            if process is not None:
                process._status = message["status"]
                process.starved = message.get("starved", "")
                process._exited.set()
            return
        if "held" in message:
            self._hold(message["held"], [_hindered(*words) for words in message["pids"]])
            return
        if "gone" in message:
            self._kept.discard(message["gone"])
            self._marks.pop(message["gone"], None)
            return
        number = message["id"]
        if "pid" in message:  # known before its exit can be reported
            process = Process(self, number, message["pid"])
            message["process"] = self._processes[number] = process
        if number in self._waiting:
            self._replies[number] = message
            self._waiting[number].set()

    def _hold(self, tree: int, words: list[str]) -> None:
        if tree not in self._marks:
            return
        for new in words:
            if new not in self._held.get(tree, ()):
                log.warning("run %s cannot be ended: %s", self._marks[tree], new)
        self._held[tree] = words


def _names(processes: list[Any]) -> list[str]:
    """Of what the keeper says of processes."""
    names = [f"{one_line(name)} ({pid})" for pid, name, *_ in processes]
    return [*names[:MOST_NAMED], *(["..."] if len(names) > MOST_NAMED else [])]


def _hindered(pid: int, name: str, user: int, why: str) -> str:
    """In words why a process cannot be ended, from what ``described`` says; that it is there,
    if nothing is known to be in the way."""
    what = f"process {pid} ({one_line(name)})"
    if not why:
        return what
    if why == "asleep":
        return f"{what} waits in the kernel, as for a disk that does not answer, and hears no KILL"
    if user in (-1, os.geteuid()):
        return f"{what} may not be signalled by this daemon: the system forbids it"
    owner = "root" if user == 0 else f"user id {user}"
    return f"{what} belongs to {owner}, and this daemon may not signal it"


async def _discard(process: Process) -> None:
    try:
        await process.end(0)
    except KeeperLost:
        log.debug("process %d went with its keeper", process.pid)


def _portable(text: str) -> str:
    """``text`` so that the keeper, which speaks UTF-8 in every locale, gives the child
    the very bytes that this process would. Raises RunFailed."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        data = b"\0"
    if b"\0" in data:
        raise RunFailed(
            f"{text[:40]!r} holds a character that no argument, variable or path can hold;"
            " leave it out, or pass the text on stdin",
            126,
        )
    return data.decode("utf-8", "surrogateescape")


def _failure(
    name: str,
    cwd: str | None,
    path: str | None,
    reply: Mapping[str, Any],
    account: Account | None = None,
) -> RunFailed:
    """Why a spawn failed, as the operator can understand it."""
    name, cwd, step = shortened(name, 200), shortened(cwd or "", 200), reply["step"]
    by = f" by user {account.name}" if account is not None else ""
    if reply.get("hung"):
        time = f"has hung for {SPAWN_LIMIT:g} s"
        if step == "chdir":
            return RunFailed(
                f"directory {cwd!r} cannot be entered: that {time};"
                " see whether its file system answers",
                126,
            )
        return RunFailed(
            f"{name!r} cannot be started: {step} {time}; see whether its file system answers,"
            " and whether a virus scanner holds it",
            126,
        )
    number = reply["errno"]
    why = os.strerror(number)
    if step == "chdir":
        if number == errno.ENOENT:
            return RunFailed(f"directory {cwd!r} does not exist; create it or change cwd", 126)
        if number == errno.ENOTDIR:
            return RunFailed(f"{cwd!r} is not a directory; change cwd", 126)
        return RunFailed(f"directory {cwd!r} cannot be entered{by}: {why}", 126)
    if step == "user":
        return RunFailed(f"{name!r} cannot be started{by}: {why}; see runctl doctor", 126)
    if step == "limits":
        return RunFailed(f"{name!r} is not started, since its limits cannot be set: {why}", 126)
    if step == "exec" and number == errno.EAGAIN:
        return RunFailed(
            f"{name!r} cannot be started{by}: that user has as many processes as its limit"
            " allows; raise limits.processes, or run less",
            126,
        )
    if step == "fork":
        return RunFailed(f"{name!r} cannot be started: {why}; raise the limit or run less", 126)
    if number == errno.ENOENT and os.path.isabs(name) and os.path.exists(name):
        return RunFailed(
            f"{name!r} cannot be started: the interpreter its #! line names does not exist", 126
        )
    if number in (errno.ENOENT, errno.ENOTDIR):
        return RunFailed(f"command not found: {name!r}{_looked(name, cwd, path)}", 127)
    if number == errno.EACCES and account is not None and "/" not in name:
        # A directory of the PATH that this user may not enter is one more possibility.
        looked = f"runctld looks in this PATH: {shortened(path or os.defpath, 500)}"
        return RunFailed(
            f"no command {name!r} that user {account.name} may execute; {looked}: write its whole"
            " path, or set PATH in the env of its runner",
            127,
        )
    if number in (errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.EISDIR):
        closed = f", and see that {account.name} may enter its directory" if account else ""
        return RunFailed(
            f"{name!r} is not executable{by}; chmod +x it, or give it a #! line{closed}", 126
        )
    if number == errno.E2BIG:
        return RunFailed(
            f"the arguments of {name!r} are too long for this system (one may have 128 KiB, with"
            " the environment they share 2 MiB or so); pass the prompt on stdin (an argv without"
            " {prompt}), or have the data in a file",
            126,
        )
    return RunFailed(f"{name!r} cannot be started: {why}", 126)


def _looked(name: str, cwd: str, path: str | None) -> str:
    """Where a command was looked for that is not there: mostly not where its submitter has it."""
    if "/" in name:
        return f" in directory {cwd!r}" if cwd and not name.startswith("/") else ""
    shown = shortened(path or os.defpath, 500)
    where = (
        f"runctld looks in its own PATH ({shown}), not in yours"
        if path == os.environ.get("PATH")
        else f"its runner's PATH is {shown}"
    )
    return f"; {where}: write its whole path, or set PATH in the env of its runner"


@asynccontextmanager
async def open_keeper(
    state_dir: Path,
    wait: float,
    given: Inherited | None = None,
    *,
    adopt: bool = False,
    held: Callable[[], None] | None = None,
    cgroups: Groups | None = None,
    users: Collection[int] = (),
) -> AsyncIterator[Keeper]:
    """Start the keeper once nothing of an earlier one is alive; kill all at the end.

    ``adopt``: this process has no other children, so whatever a killed keeper leaves
    behind is to come to it, and is ended by it. ``held`` is called before that: it does
    not return when the state directory, and what runs for it, is a successor's by now.
    ``cgroups``: what ``cgroups.prepare`` gave. ``users``: ids of others whom runs are of.

    Raises: Unavailable, when the earlier one is not gone after ``wait`` seconds."""
    state, lock = _open_lock(state_dir)
    if adopt:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        await _take(lock, state, wait)
        await _sweep(state, wait, users)
        given = given or inherited()
        popen, sock = _start(lock, state, given, "" if cgroups is None else cgroups.start)
    finally:
        os.close(lock)
    try:
        async with trio.open_nursery() as outer:
            # As long as somebody may wait for it: what is cancelled is sent to its end.
            watching = trio.CancelScope(shield=True)
            try:
                async with trio.open_nursery() as nursery:
                    ours = trio.socket.from_stdlib_socket(sock)
                    keeper = Keeper(ours, nursery, given, state, cgroups, users)
                    outer.start_soon(keeper._watch, popen, watching)
                    # Answers are read as long as somebody may wait for one: what is cancelled,
                    # as a spawn, still waits for the end of its tree.
                    reading = trio.CancelScope(shield=True)
                    nursery.start_soon(keeper._read, reading)
                    nursery.start_soon(keeper._ping)
                    try:
                        yield keeper
                    finally:
                        reading.cancel()
                        nursery.cancel_scope.cancel()
            finally:
                watching.cancel()
    finally:
        keeper._lose()
        with trio.CancelScope(shield=True), keeper._sock:
            left: list[str] = []
            with trio.move_on_after(CLOSE_WAIT):
                left = await keeper._dismiss()
            if left:
                _LEFT.append(popen)
                log.error("the next start waits until these are gone: %s", "; ".join(left))
            else:
                await _close(popen, state, adopt, held, keeper.users)


def _start(
    lock: int, state: str, given: Inherited, cgroups: str
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the keeper, which holds ``lock`` from now on; its process, and our socket."""
    ours, theirs = socket.socketpair()
    script = Path(__file__).with_name("keeper.py")
    with theirs:
        try:
            # -I -S: nothing of ours or of the environment is imported, so it starts fast
            # and cannot be broken by either.
            popen = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-X", "utf8", str(script)),
                    *(str(theirs.fileno()), str(lock), state, cgroups),
                ],
                pass_fds=(theirs.fileno(), lock),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                # Commands can look at it, also at what only a later configuration calls secret:
                # no more than it takes to start. RUNCTL_KEEPER: for who looks for it; not for
                # children.
                env={k: v for k, v in given.env.items() if k in _NEEDED} | {"RUNCTL_KEEPER": state},
            )
        except BaseException:
            ours.close()
            raise
    ours.setblocking(False)
    return popen, ours


async def _close(
    popen: subprocess.Popen[bytes],
    state: str,
    adopt: bool,
    held: Callable[[], None] | None,
    users: Collection[int],
) -> None:
    """Wait until the keeper has killed all; do it ourselves if it could not."""
    try:
        code = await trio.to_thread.run_sync(popen.wait, CLOSE_WAIT)
    except subprocess.TimeoutExpired:
        popen.kill()
        code = await trio.to_thread.run_sync(popen.wait)
    if code != 0:
        if held is not None:
            held()
        try:
            await _sweep(state, CLOSE_WAIT, users, adopt=adopt)
        except Unavailable as error:
            log.error("%s", error)


def _open_lock(state_dir: Path) -> tuple[str, int]:
    """(real path of the state directory, descriptor of its keeper.lock)"""
    state = os.path.realpath(state_dir)
    lock = os.path.join(state, "keeper.lock")
    return state, os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


async def _take(lock: int, state: str, wait: float) -> None:
    """Lock ``lock``. Raises Unavailable."""
    if await _flock(lock, min(wait, PATIENCE)):
        return
    if wait > PATIENCE:
        left = await _left(state)
        log.warning("the start waits for processes of an earlier daemon%s", left and f": {left}")
        if await _flock(lock, wait - PATIENCE):
            return
    left = await _left(state)
    raise Unavailable(
        f"processes of an earlier daemon are still alive after {wait:g} s"
        f"{left and f': {left}'}; end them, or that daemon, and start again"
    )


async def _flock(lock: int, wait: float) -> bool:
    """Whether it was ours to have within ``wait`` seconds."""
    with trio.move_on_after(wait):
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                await trio.sleep(0.005)  # flock has no event that can be cancelled
    return False


async def _left(state: str) -> str:
    """What lives below the keeper of an earlier daemon of ``state``, in words; "" when the kernel
    does not answer what a process is."""
    with trio.move_on_after(NAMED_WITHIN):
        look = partial(_named_left, os.fsencode(state))
        return await trio.to_thread.run_sync(look, abandon_on_cancel=True)
    return ""


def _named_left(state: bytes) -> str:
    table, me = scan(), os.geteuid()
    keepers = [pid for pid in table if _owner(pid) == me and _keeps(pid, state)]
    below = {pid for keeper in keepers for pid in descent(table, keeper)}
    return _words(table, [pid for pid in below if not table[pid].zombie])


def _words(table: Table, pids: Iterable[int]) -> str:
    """Who these are, which do not die, and why."""
    found = described({pid: hindrance(pid, table[pid].state, killed=True) for pid in pids})
    words = [_hindered(*one) for one in found[:MOST_NAMED]]
    return "; ".join([*words, *(["..."] if len(found) > MOST_NAMED else [])])


async def _sweep(
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
                partial(_strike_left, os.fsencode(state), adopt, at, frozenset(users)),
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


def _strike_left(
    state: bytes, adopt: bool, at: list[int], users: frozenset[int] = frozenset()
) -> list[int]:
    """KILL every process of our user, or one of ``users``, that has the mark of ``state`` in its
    environment, and all that is below a keeper of it, and lastly that: their pids. ``at[0]`` is
    the one that is looked at: that hangs while a page of its memory does not come."""
    if adopt:
        _reap()
    table, me = scan(), os.geteuid()
    marked, keepers = set(), set()
    for pid, row in table.items():
        if pid == os.getpid() or row.zombie or _owner(pid) not in users | {me}:
            continue
        at[0] = pid
        found = environment(pid)
        if b"RUNCTL_STATE=" + state in found:
            marked.add(pid)
        # A child of it that hangs on the way to its command looks like it.
        elif _keeps(pid, state) and not doomed(pid):
            keepers.add(pid)
    roots = keepers | ({os.getpid()} if adopt else set())
    below = {pid for root in roots for pid in descent(table, root) if not table[pid].zombie}
    # Last, so that nothing comes out from below it unseen.
    _strike(table, (marked | below) or keepers)
    return sorted(marked | below | keepers)


def _strike(table: Table, pids: Iterable[int]) -> None:
    for pid in pids:
        strike(pid, table[pid].start, signal.SIGKILL)


def _reap() -> None:
    """Collect the children that a killed keeper left to us."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _owner(pid: int) -> int | None:
    """The effective id of its user; None if it is gone. (The owner of a keeper's files in /proc
    is root.)"""
    users = status_of(pid).get("Uid", "").split()
    return int(users[1]) if len(users) > 1 else None


def _keeps(pid: int, state: bytes) -> bool:
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
