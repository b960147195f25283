"""What a service manager is told while we live: systemd's notify protocol, a datagram of
``KEY=value`` lines to $NOTIFY_SOCKET. Without that variable all of this does nothing.

It is also given a descriptor to keep, one end of a pair: while it may start another daemon, after
a crash or for a restart, it holds that, and when it starts none any more it closes it.

Every message is sent by the event loop, so a loop that is stuck is silent: systemd then
lets the start or the stop time out, or misses the watchdog, and starts us again.
"""

from __future__ import annotations

import array
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager

import trio

from ...protocol.service_manager import read_notify_address, read_watchdog

log = logging.getLogger("runctld.notify")

#: Asked for again and again while starting and stopping, seconds.
EXTENSION = 10.0
#: Between two reports of what is running, seconds, however much changes.
PAUSE = 1.0
#: What the descriptor is called among those that the service manager keeps.
TOKEN = "keeper"
#: The first one that it passes to a program (sd_listen_fds(3)).
_FIRST_FD = 3
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Notifier:
    """``address``: of its socket. ``watchdog``: seconds within which it is to hear of us, None for
    never. ``end``: the longest that the daemon's end may take by the configuration in force,
    seconds."""

    def __init__(self, address: str | None, watchdog: float | None, end: float) -> None:
        self._address = address
        self._watchdog = watchdog
        self.end = end
        #: Whether a descriptor was given to it to keep.
        self.keeps = False
        self._socket: trio.socket.SocketType | None = None
        self._ready = trio.Event()

    async def tell(self, *lines: str) -> None:
        """Send one message. A manager that is not there, or does not read, is no fault of
        ours: what it misses is logged and forgotten."""
        await self._send(lines)

    async def store_token(self) -> socket.socket | None:
        """Have one end of a pair kept; the other one. That closes when no daemon is started any
        more, or at once, where the manager keeps nothing (FileDescriptorStoreMax=0). None when
        there is no manager.

        What it keeps of an earlier keeper it lets go of once the other end of that is closed: it
        watches what it keeps, unless told not to."""
        if self._address is None:
            return None
        ours, theirs = socket.socketpair()
        with theirs:
            self.keeps = await self._send(("FDSTORE=1", f"FDNAME={TOKEN}"), (theirs.fileno(),))
        if self.keeps:
            return ours
        ours.close()
        return None

    async def _send(self, lines: tuple[str, ...], fds: tuple[int, ...] = ()) -> bool:
        """Whether it was sent."""
        if self._address is None:
            return False
        if self._socket is None:
            self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            await self._socket.sendmsg(["\n".join(lines).encode()], rights, 0, self._address)
        except OSError as error:
            log.debug("%s: %s", lines[0], error)
            return False
        return True

    async def ready(self, words: str) -> None:
        """Everything is up. ``words``: what is going on, told in the same message, so that
        whoever waited for the start finds them there."""
        self._ready.set()
        await self.tell("READY=1", f"STATUS={words}")

    @asynccontextmanager
    async def reloading(self) -> AsyncIterator[None]:
        """Around a reload, whether it succeeds or not: what was in force then goes on."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        await self.tell("RELOADING=1", f"MONOTONIC_USEC={microseconds}")
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self.tell("READY=1")

    async def show(
        self, changed: Callable[[], trio.Event], words: Callable[[], Awaitable[str]]
    ) -> None:
        """STATUS= is ``words()``, anew when the event that ``changed()`` gave was set."""
        while self._address is not None:
            change = changed()
            await self.tell(f"STATUS={await words()}")
            await change.wait()
            await trio.sleep(PAUSE)

    async def _beat(self) -> None:
        while self._watchdog is not None:
            await self.tell("WATCHDOG=1")
            await trio.sleep(self._watchdog / 2)

    async def _patience(
        self, stop: trio.Event, start: float, again: Callable[[], bool], leaves: Callable[[], bool]
    ) -> None:
        """Have the manager wait ``start`` seconds for ``ready``, and ``end`` seconds for our
        end once ``stop`` is set, as long as the loop turns. ``again``: that is no end; ``leaves``:
        it is one, but what runs goes on."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._extend, start)
            nursery.start_soon(_set_either, self._ready, stop, nursery.cancel_scope)
        await stop.wait()
        if again():
            await self.tell("STATUS=starting again")
            return
        left = "leaving; what runs goes on"
        words = left if leaves() else "stopping; unfinished runs will be replayed"
        await self.tell("STOPPING=1", f"STATUS={words}")
        await self._extend(self.end)

    async def _extend(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            while self._address is not None:
                await self.tell(f"EXTEND_TIMEOUT_USEC={int(EXTENSION * 1e6)}")
                await trio.sleep(EXTENSION / 3)


@asynccontextmanager
async def open_notifier(
    stop: trio.Event,
    start: float,
    end: float,
    env: Mapping[str, str] = os.environ,
    *,
    again: Callable[[], bool] = lambda: False,
    leaves: Callable[[], bool] = lambda: False,
) -> AsyncIterator[Notifier]:
    """``stop`` is set when the daemon is to end, ``again`` says whether its process goes on as
    another one, ``leaves`` whether what runs goes on. ``start`` and ``end``: the longest that it
    may take to begin and to end, seconds."""
    notifier = Notifier(read_notify_address(env), read_watchdog(env), end)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier._beat)
        nursery.start_soon(notifier._patience, stop, start, again, leaves)
        try:
            yield notifier
        finally:
            nursery.cancel_scope.cancel()
            if notifier._socket is not None:
                notifier._socket.close()


def close_kept(env: MutableMapping[str, str] = os.environ) -> None:
    """Close our copies of what the manager keeps: it has its own, and nobody else is to have one.
    ``env`` loses what says that they are there."""
    said = [env.pop(name, "") for name in _LISTEN]
    if said[0] == str(os.getpid()) and said[1].isdecimal():
        os.closerange(_FIRST_FD, _FIRST_FD + int(said[1]))


async def _set_either(one: trio.Event, other: trio.Event, scope: trio.CancelScope) -> None:
    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, other)
    scope.cancel()
