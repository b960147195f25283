"""Whether the executor of a silent run is still there, where NATS is not its child.

The embedded server goes with its daemon, and the broken connection tells. A server of
its own stays: then, while a run is silent, its executor is looked for. NATS answers for
a subject without subscribers at once; it has no event for a subscriber that goes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ...client import consumer
from ...client.link import LinkLost
from ...config.schema import Config
from ...protocol import subjects
from ...protocol.errors import Denied
from ..display.output import Output

#: Seconds of silence after which to look, and between two looks.
INTERVAL = 1.0


class Presence:
    """``executor`` None or "": any will do (the run is queued)."""

    def __init__(self, config: Config, output: Output, executor: str | None) -> None:
        self._wanted = not config.nats.embedded
        self._output = output
        self._executor = executor or None
        self._heard = False

    def note_event(self) -> None:
        """Something came."""
        self._heard = True

    def note_executor(self, executor: str) -> None:
        """The run is an attempt of ``executor``'s now."""
        self._executor = executor or None
        self._output.status("executor", None)

    @contextlib.asynccontextmanager
    async def watching(self, watcher: consumer.Watcher) -> AsyncIterator[None]:
        """Say on the status line when the executor is gone, and when it is back."""
        task = asyncio.create_task(self._keep_looking(watcher)) if self._wanted else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
            self._output.status("executor", None)

    async def _keep_looking(self, watcher: consumer.Watcher) -> None:
        while True:
            self._heard = False
            await asyncio.sleep(INTERVAL)
            if self._heard:
                self._output.status("executor", None)
                continue
            executor = self._executor
            gone = await self._is_gone(watcher, executor)
            if self._heard or executor != self._executor:
                continue
            who = "no runctld is there" if executor is None else f"executor {executor} is gone"
            text = f"runctl: {who}; waiting for it to come back (Ctrl-C detaches)"
            self._output.status("executor", text if gone else None)

    async def _is_gone(self, watcher: consumer.Watcher, executor: str | None) -> bool:
        from nats.errors import NoRespondersError

        link = watcher.link
        if link is None or link.closed.is_set():
            return False  # said elsewhere
        try:
            await link.request(subjects.control_subject("here", executor), b"", INTERVAL)
        except NoRespondersError:
            return True
        except (LinkLost, Denied, TimeoutError):
            return False
        return False
