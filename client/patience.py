"""Waiting for a daemon that restarts: whoever asks meanwhile gets an answer, a little later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..config.schema import Config
from ..protocol.endpoint import LOCK_FILE
from ..protocol.errors import Unavailable
from .link import read_own_file
from .requests import NobodyAnswers

#: How long a request waits in all, unless it is told otherwise, seconds.
WAIT = 5.0
#: Servers of a cluster do not know of each other's listeners at once, seconds.
CLUSTER = 1.0
PAUSE, LONGEST_PAUSE = 0.03, 0.25


def is_daemon_expected(config: Config) -> bool:
    """Whether a daemon has the state directory, or had it and did not stop in order."""
    try:
        return bool(read_own_file(config.state_dir / LOCK_FILE).strip())
    except (OSError, Unavailable):  # none has run here, or it is another user's
        return False


class Patience:
    """Of one client: each of its requests waits ``seconds`` at most for a daemon that is away.
    ``notice`` hears whether one is waited for."""

    def __init__(
        self, config: Config, seconds: float, notice: Callable[[bool], None] = lambda _: None
    ) -> None:
        self.config = config
        self.seconds = seconds
        self._notice = notice
        self._waiting: set[Outage] = set()

    def begin(self, outage: Outage) -> None:
        if not self._waiting:
            self._notice(True)
        self._waiting.add(outage)

    def end(self, outage: Outage) -> None:
        if outage in self._waiting:
            self._waiting.discard(outage)
            if not self._waiting:
                self._notice(False)


class Outage:
    """What one request meets until it is answered or given up. It begins with the first error, and
    an attempt that takes long, as one at a server that hangs, is part of it."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._began: float | None = None
        self._pause = PAUSE
        self._expected = False

    async def wait(self, error: Exception, *, met: bool = False) -> None:
        """A moment, before whoever met ``error`` tries again. Raises it when patience is over.
        ``met``: there was a connection before."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        left = self._began + self._find_limit(error, met) - now
        if left <= 0:
            raise error
        self._patience.begin(self)
        await asyncio.sleep(min(self._pause, left))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def end(self) -> None:
        """Somebody answered, or nobody asks any more."""
        self._patience.end(self)

    def _find_limit(self, error: Exception, met: bool) -> float:
        config, seconds = self._patience.config, self._patience.seconds
        if is_daemon_expected(config):
            return seconds
        if config.nats.embedded:
            return 0
        if isinstance(error, NobodyAnswers):
            self._expected |= error.expected  # NATS forgets, sooner perhaps than we lose patience
            return seconds if self._expected else min(seconds, CLUSTER)
        return seconds if met else 0
