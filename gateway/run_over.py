"""A run that has ended while its end is not stored any more: the daemon says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..client.cancellation import end_tasks
from ..client.events import End
from ..client.link import NotReady
from ..client.run_end import make_end
from ..client.shared_link import SharedLink
from ..protocol import messages
from ..protocol.errors import BadRequest, Denied, NotFound, RequestError, Unavailable
from ..protocol.model import Run
from .tail import read_tail

log = logging.getLogger("runctl.gateway")

#: Between two questions while nobody answers, seconds: at first, at most.
PAUSE, LONGEST = 0.1, 2.0
#: The record of an end may come so much later than the daemon's word, seconds.
LATE = 1.0


class RunOver:
    """Of ``run``. ``end``: in place of its record, once it is known that there is none. ``links``:
    a connection over which nobody waits for a daemon that restarts."""

    def __init__(self, links: SharedLink, run: str, subject: str) -> None:
        self._links = links
        self._run = run
        self._subject = subject
        self._task: asyncio.Task[None] | None = None
        self.end: End | None = None
        #: Where the run's last record is, as far as it was looked at.
        self.last = 0

    def look(self, notice: Callable[[], None]) -> None:
        """Ask, unless somebody does already; ``notice`` when ``end`` is there."""
        if self.end is None and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._look(notice))

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])

    async def _look(self, notice: Callable[[], None]) -> None:
        pause = PAUSE
        while True:
            try:
                found = (await self._links.ask(messages.Show(self._run), messages.RunDetails)).run
                await self._conclude(found)
                break
            except NotFound:  # its row is gone as well, or it was never a run of ours
                break
            except (BadRequest, Denied) as problem:
                log.warning("run %s: %s", self._run, problem)
                break
            except (Unavailable, RequestError, NotReady) as problem:
                log.debug("run %s: %s", self._run, problem)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST)
        if self.end is not None:
            notice()

    async def _conclude(self, found: Run) -> None:
        if not found.status.terminal or await self._is_end_stored():
            return
        await asyncio.sleep(LATE)
        if not await self._is_end_stored():
            self.end = make_end(found)

    async def _is_end_stored(self) -> bool:
        """As the leader has it. Raises Unavailable."""
        tail = await read_tail(await self._links.dial(), self._subject)
        if tail is None:
            return False
        self.last = tail.sequence
        return tail.ended
