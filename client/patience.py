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

#: How long a verb waits in all, unless it is told otherwise, seconds.
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
    """Of one client: ``seconds`` for each time that the daemon is away. ``notice`` hears
    whether it is waited for."""

    def __init__(
        self, config: Config, seconds: float, notice: Callable[[bool], None] = lambda _: None
    ) -> None:
        self._config = config
        self._seconds = seconds
        self._notice = notice
        self._began = 0.0
        self._pause = PAUSE
        self._waits = False
        self._expected = False

    async def wait(self, error: Exception, *, met: bool = False) -> None:
        """A moment, before whoever met ``error`` tries again. Raises it when that is over.
        ``met``: there was a connection before."""
        now = time.monotonic()
        if not self._waits or now > self._began + self._seconds + LONGEST_PAUSE:
            self._began, self._pause, self._expected = now, PAUSE, False
        left = self._began + self._find_limit(error, met) - now
        if left <= 0:
            self._notice(False)
            raise error
        self._waits = True
        self._notice(True)
        await asyncio.sleep(min(self._pause, left))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def end(self) -> None:
        """Somebody answered."""
        if self._waits:
            self._waits = False
            self._notice(False)

    def _find_limit(self, error: Exception, met: bool) -> float:
        if is_daemon_expected(self._config):
            return self._seconds
        if self._config.nats.embedded:
            return 0
        if isinstance(error, NobodyAnswers):
            self._expected |= error.expected  # NATS forgets, sooner perhaps than we lose patience
            return self._seconds if self._expected else min(self._seconds, CLUSTER)
        return self._seconds if met else 0
