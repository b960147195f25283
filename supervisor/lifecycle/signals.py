"""What signals ask for: TERM or INT to stop, a second one to hurry, HUP to reload, USR1 to leave
what runs to the next daemon, USR2 to be that daemon.

``Wishes`` takes over from ``early.Early`` once there is an event loop.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from .early_signals import LEAVE, STOP, Early, has_terminal

log = logging.getLogger("runctld")


class Wishes:
    """``stop`` is set by the first TERM or INT, ``hurry`` by the next one. ``leave`` says that
    what runs is to go on then, and ``again`` that this process is to become the next daemon."""

    def __init__(self, *, reload: bool, terminal: bool) -> None:
        self.stop = trio.Event()
        self.hurry = trio.Event()
        self.leave = self.again = False
        #: systemd sends a TERM after the USR1 of its ExecStop=, which says nothing more.
        self._followed = False
        self._reload = trio.Event()
        self._terminal = terminal
        self._scopes: set[trio.CancelScope] = set()
        if reload:
            self._reload.set()

    @contextmanager
    def until_stop(self) -> Iterator[trio.CancelScope]:
        """A scope that ``stop`` cancels, unless it was let go by ``keep``."""
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            if self.stop.is_set():
                scope.cancel()
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    def keep(self, scope: trio.CancelScope) -> None:
        """From here on ``stop`` does not cancel ``scope``."""
        self._scopes.discard(scope)

    async def wait_reload(self) -> None:
        """Until a HUP came; several that came meanwhile are one."""
        await self._reload.wait()
        self._reload = trio.Event()

    async def listen(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if number == signal.SIGHUP and not (self._terminal and not has_terminal()):
                self._reload.set()
            elif not self.stop.is_set():
                self._end(name, leave=number in LEAVE, again=number == signal.SIGUSR2)
            elif number in STOP and self.again:
                log.info("%s: stopping", name)
                self.leave = self.again = False
            elif number in STOP and self._followed:
                self._followed = False
            elif number in STOP and not self.hurry.is_set():
                log.info("%s: runs get no more grace", name)
                self.hurry.set()

    def restart(self) -> None:
        """Become the next daemon, as SIGUSR2 asks for."""
        if not self.stop.is_set():
            self._end("restart", leave=True, again=True)

    def _end(self, why: str, *, leave: bool, again: bool) -> None:
        self.leave, self.again = leave, again
        self._followed = leave and not again
        what = "starting again" if again else "leaving" if leave else "stopping"
        log.info("%s: %s", why, what)
        self.stop.set()
        for scope in self._scopes:
            scope.cancel()


@asynccontextmanager
async def open_wishes(early: Early | None = None) -> AsyncIterator[Wishes]:
    """Listen from here on; what came before, ``early`` tells."""
    with trio.open_signal_receiver(*STOP, *LEAVE, signal.SIGHUP) as signals:
        reload = early is not None and early.reload
        wishes = Wishes(reload=reload, terminal=early is not None and early.terminal)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wishes.listen, signals)
            yield wishes
            nursery.cancel_scope.cancel()
