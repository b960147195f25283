"""The keeper's start, once nothing of an earlier one is alive, and its end with all it has.

``keeper.lock`` is held while any process of a keeper may be alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from ...protocol import __version__
from ...protocol.errors import Unavailable
from ..host.private_files import Inherited, inherited
from ..host.stop_times import CLOSE_WAIT
from .cgroups import Groups
from .keeper_client import Keeper
from .keeper_link import Origin
from .keeper_visit import Refused, Visit, visit_keeper
from .leftovers import describe_leftovers, sweep_leftovers
from .prctl import PR_SET_CHILD_SUBREAPER, prctl

log = logging.getLogger("runctld.processes")

#: What an interpreter may need to start.
_NEEDED = ("PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES")
#: Keepers that stay on after us, with what cannot be ended: nobody waits for them.
_STAYING: list[OwnKeeper | FoundKeeper] = []
#: So long a start waits for what an earlier daemon left before it says so, seconds: the keeper
#: of one that was killed is done sooner.
PATIENCE = 1.0


@asynccontextmanager
async def open_keeper(
    state_dir: Path,
    wait: float,
    given: Inherited | None = None,
    *,
    adopt: bool = False,
    lease: int = -1,
    outlive: float = 0.0,
    held: Callable[[], None] | None = None,
    cgroups: Groups | None = None,
    users: Collection[int] = (),
) -> AsyncIterator[Keeper]:
    """Start the keeper once nothing of an earlier one is alive; kill all at the end.

    ``adopt``: this process has no other children, so whatever a killed keeper leaves
    behind is to come to it, and is ended by it. ``held`` is called before that: it does
    not return when the state directory, and what runs for it, is a successor's by now.
    ``cgroups``: what ``cgroups.prepare`` gave. ``users``: ids of others whom runs are of.
    ``outlive``: so many seconds what it has goes on without us, when we end without a word; what
    an earlier daemon has left so is ``found`` then. ``lease``: a descriptor that holds the state
    directory's lock.

    Raises: Unavailable, when the earlier one is not gone after ``wait`` seconds, or cannot hand
    over what it has."""
    state, lock = _open_lock(state_dir)
    given = given or inherited()
    if adopt:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    visit = await _visit(Path(state), lease, outlive) if lease >= 0 else None
    if visit is not None and visit.is_idle:
        # It keeps the program, the environment and the limits that it began with: a new one has
        # those of today.
        visit.dismiss()
        visit = None
    process: OwnKeeper | FoundKeeper
    if visit is None:
        try:
            await _take_lock(lock, state, wait)
            if cgroups is not None:
                await _clear(cgroups, wait)
            await sweep_leftovers(state, wait, users)
            groups = "" if cgroups is None else cgroups.start
            popen, sock = _start(lock, state, given, groups, outlive)
        finally:
            os.close(lock)
        process, origin = OwnKeeper(popen), Origin(popen.pid, __version__, 0)
    else:
        sock, process = visit.sock, FoundKeeper(visit.pid, lock)
        origin = Origin(visit.pid, visit.version, visit.last)
        sock.setblocking(False)
    try:
        async with trio.open_nursery() as outer:
            # As long as somebody may wait for it: what is cancelled is sent to its end.
            watching = trio.CancelScope(shield=True)
            try:
                async with trio.open_nursery() as nursery:
                    ours = trio.socket.from_stdlib_socket(sock)
                    keeper = Keeper(ours, nursery, given, state, cgroups, users, origin)
                    if visit is not None:
                        keeper.adopt(visit)
                    outer.start_soon(keeper.end_when_silent, process.kill, watching)
                    # Answers are read as long as somebody may wait for one: what is cancelled,
                    # as a spawn, still waits for the end of its tree.
                    reading = trio.CancelScope(shield=True)
                    nursery.start_soon(keeper.read_messages, reading)
                    nursery.start_soon(keeper.ping)
                    try:
                        yield keeper
                    finally:
                        reading.cancel()
                        nursery.cancel_scope.cancel()
            finally:
                watching.cancel()
    finally:
        keeper.mark_lost()
        with trio.CancelScope(shield=True), contextlib.closing(keeper):
            if keeper.broken_off and not keeper.dead.is_set():
                _STAYING.append(process)
                log.warning("what runs goes on for %g s, for the next daemon to adopt", outlive)
            else:
                await _dismiss(keeper, process, state, adopt, held)


async def _dismiss(
    keeper: Keeper,
    process: OwnKeeper | FoundKeeper,
    state: str,
    adopt: bool,
    held: Callable[[], None] | None,
) -> None:
    """Have the keeper kill all, and wait for that."""
    left: list[str] = []
    with trio.move_on_after(CLOSE_WAIT):
        left = await keeper.dismiss()
    if left:
        _STAYING.append(process)
        log.error("the next start waits until these are gone: %s", "; ".join(left))
    else:
        await _await_end(process, state, adopt, held, keeper.users)


class OwnKeeper:
    """A keeper that we have started."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen

    @property
    def pid(self) -> int:
        return self._popen.pid

    def kill(self) -> None:
        self._popen.kill()

    async def wait(self, seconds: float | None = None) -> bool | None:
        """Whether it has ended all in order; None when it has not ended within ``seconds``."""
        try:
            return await trio.to_thread.run_sync(self._popen.wait, seconds) == 0
        except subprocess.TimeoutExpired:
            return None


class FoundKeeper:
    """A keeper that an earlier daemon has started. Its ``lock`` is free once it has ended."""

    def __init__(self, pid: int, lock: int) -> None:
        self.pid = pid
        self._lock = lock

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def wait(self, seconds: float | None = None) -> bool | None:
        """As ``OwnKeeper.wait``; it is not told how it has ended, so that is looked for."""
        if not await _try_lock(self._lock, math.inf if seconds is None else seconds):
            return None
        os.close(self._lock)
        return False


async def _clear(cgroups: Groups, wait: float) -> None:
    """Raises Unavailable."""
    try:
        await trio.to_thread.run_sync(cgroups.clear, wait)
    except TimeoutError as error:
        raise Unavailable(str(error)) from None


async def _visit(state: Path, lease: int, outlive: float) -> Visit | None:
    """Raises Unavailable."""
    try:
        return await trio.to_thread.run_sync(visit_keeper, state, lease, outlive)
    except Refused as error:
        log.warning("what an earlier daemon has left running cannot be taken over (%s)", error)
        return None
    except OSError as error:
        raise Unavailable(
            f"what an earlier daemon has left running cannot be taken over: {error}"
        ) from None


def _start(
    lock: int, state: str, given: Inherited, cgroups: str, outlive: float = 0.0
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
                    *(str(theirs.fileno()), str(lock), state, cgroups, str(outlive), __version__),
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


async def _await_end(
    process: OwnKeeper | FoundKeeper,
    state: str,
    adopt: bool,
    held: Callable[[], None] | None,
    users: Collection[int],
) -> None:
    """Wait until the keeper has killed all; do it ourselves if it could not."""
    orderly = await process.wait(CLOSE_WAIT)
    if orderly is None:
        process.kill()
        orderly = await process.wait()
    if not orderly:
        if held is not None:
            held()
        try:
            await sweep_leftovers(state, CLOSE_WAIT, users, adopt=adopt)
        except Unavailable as error:
            log.error("%s", error)


def _open_lock(state_dir: Path) -> tuple[str, int]:
    """(real path of the state directory, descriptor of its keeper.lock)"""
    state = os.path.realpath(state_dir)
    lock = os.path.join(state, "keeper.lock")
    return state, os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


async def _take_lock(lock: int, state: str, wait: float) -> None:
    """Lock ``lock``. Raises Unavailable."""
    if await _try_lock(lock, min(wait, PATIENCE)):
        return
    if wait > PATIENCE:
        left = await describe_leftovers(state)
        log.warning("the start waits for processes of an earlier daemon%s", left and f": {left}")
        if await _try_lock(lock, wait - PATIENCE):
            return
    left = await describe_leftovers(state)
    raise Unavailable(
        f"processes of an earlier daemon are still alive after {wait:g} s"
        f"{left and f': {left}'}; end them, or that daemon, and start again"
    )


async def _try_lock(lock: int, wait: float) -> bool:
    """Whether it was ours to have within ``wait`` seconds."""
    with trio.move_on_after(wait):
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                await trio.sleep(0.005)  # flock has no event that can be cancelled
    return False
