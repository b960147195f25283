"""What may change while the daemon runs: whoever needs it asks it each time. A run keeps what it
was dispatched with."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

from ...config.access import access_problems
from ...config.schema import Config, Queue, Runner
from ...config.submitters import warnings
from ...config.transport import transport_problems
from .runners import protocol

log = logging.getLogger("runctld.reload")

Make = Callable[[Runner, Queue], protocol.Runner]


class Settings:
    """The runners and the queue's limits as they are now. ``make`` makes a runner."""

    def __init__(self, config: Config, make: Make) -> None:
        self._make = make
        #: The longest that a live run may have been dispatched with.
        self.longest_grace = 0.0
        self._runners: dict[str, protocol.Runner] = {}
        self._config = Config(state_dir=config.state_dir)
        self.replace(config)

    @property
    def config(self) -> Config:
        """Of it only what is said above may be taken for what holds."""
        return self._config

    @property
    def runners(self) -> Mapping[str, Runner]:
        return self._config.runners

    @property
    def queue(self) -> Queue:
        return self._config.queue

    def runner(self, name: str) -> tuple[Runner, protocol.Runner] | None:
        """A runner's settings and the runner itself, which belong together."""
        made = self._runners.get(name)
        return None if made is None else (self._config.runners[name], made)

    def make_runner(self, runner: Runner) -> protocol.Runner:
        """One that is not configured."""
        return self._make(runner, self._config.queue)

    def replace(self, config: Config) -> None:
        for name, said, fix in warnings(config, os.geteuid()):
            log.warning("runner %s: %s; %s", name, said, fix)
        for key, said, fix in (*access_problems(config), *transport_problems(config)):
            log.warning("%s: %s; %s", key, said, fix)
        self._runners = {n: self._make(r, config.queue) for n, r in config.runners.items()}
        self._config = config
        self.longest_grace = max(self.longest_grace, config.queue.stop_grace)
