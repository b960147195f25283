"""The events of one run until its end, through restarts of the daemon and of nats-server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from ..config.schema import Config
from ..protocol import subjects
from ..protocol.model import check_run_id, check_thread
from .cancellation import end_tasks
from .consumer import Watcher
from .events import (
    CaughtUp,
    Chunk,
    Connection,
    Continue,
    End,
    Event,
    Gap,
    Lost,
    Malformed,
    Reset,
)
from .link import Link
from .locate import Target, locate
from .run_end import RECORD_TIMEOUT, make_end, push_lost_end, wait_until_recorded
from .shared_link import SharedLink

logger = logging.getLogger(__name__)

RunEvent = Reset | Continue | Chunk | Gap | End


class Attachment:
    """Events of ``target``'s run in batches; with ``follow_thread`` also of the runs after it.

    The run's ``End`` comes in any case: when its record is not stored any more, behind a
    ``Lost``. ``dial``, ``shared``: see Watcher.
    """

    def __init__(
        self,
        config: Config,
        dial: Callable[[], Awaitable[Link]],
        target: Target,
        *,
        follow_thread: bool = False,
        shared: bool = False,
    ) -> None:
        self._config = config
        self._run = target.run
        self._found = target.found
        self._follow_thread = follow_thread
        subject = (
            subjects.thread_subjects(target.thread)
            if follow_thread
            else subjects.out_subject(target.thread, target.run)
        )
        self.watcher = Watcher(dial, subject, start=target.start, shared=shared)
        #: Without the daemon nobody has told whether the run is over: its end may be purged.
        self._reconnected = target.found is None
        self._caught_up = False
        self._ended = False
        self._settling: asyncio.Task[None] | None = None
        #: Whether the end is seen as it happens.
        self.live = target.found is None or not target.found.status.terminal

    async def __aenter__(self) -> Attachment:
        await self.watcher.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            if self._settling is not None:
                await end_tasks([self._settling])
        finally:
            await self.watcher.__aexit__(*error)

    def __aiter__(self) -> Attachment:
        return self

    async def __anext__(self) -> list[Event]:
        """Raises Unavailable when watching cannot begin; later troubles are waited out."""
        batch: list[Event] = []
        for event in await anext(self.watcher):
            batch.append(event)
            if isinstance(event, Connection):
                self._reconnected = event.up
            elif isinstance(event, End):
                self._ended = self._ended or event.run == self._run
            elif isinstance(event, CaughtUp) and not self._follow_thread:
                self._settle(batch)
        return batch

    def _settle(self, batch: list[Event]) -> None:
        """All that is stored was read, and the end may not be stored."""
        found, self._found = self._found, None
        if found is not None and found.status.terminal and not self._ended:
            batch += [Lost(self._run), make_end(found)]
            self._ended = True
        # A consumer that is not the first: the stream may be another one.
        again = self._reconnected or self._caught_up
        self._reconnected, self._caught_up = False, True
        if again and (self._settling is None or self._settling.done()):
            work = push_lost_end(self._config, self._run, self.watcher)
            self._settling = asyncio.create_task(work)

    async def confirm_end(self) -> None:
        """Wait, briefly, until the daemon has recorded the end that was seen as it happened, so
        that the next request finds the run ended. When it goes on there is nothing to wait for."""
        if self.live and self._ended:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECORD_TIMEOUT):
                    await wait_until_recorded(self._config, self.watcher, self._run)


class RunEvents:
    """What ``Client.attach`` gives: an async iterator of ``Reset``, ``Continue``, ``Chunk``,
    ``Gap`` and ``End``. It is over after the ``End``. Whoever leaves it earlier calls ``aclose``,
    or leaves that to the end of the client."""

    def __init__(self, config: Config, links: SharedLink, thread: str, run: str | None) -> None:
        self._config = config
        self._links = links
        self._thread = check_thread(thread)
        self._name = None if run is None else check_run_id(run)
        self._attachment: Attachment | None = None
        self._ready: deque[RunEvent] = deque()
        self.closed = False

    def __aiter__(self) -> RunEvents:
        return self

    async def __anext__(self) -> RunEvent:
        """Raises, before the first event: NotFound, no such thread or run; Unavailable, NATS
        cannot be reached; Refused, NATS does not allow it. Restarts later on are waited out."""
        while not self._ready:
            if self.closed:
                raise StopAsyncIteration
            if self._attachment is None:
                self._attachment = await self._open()
            for event in await anext(self._attachment):
                if isinstance(event, RunEvent):
                    self._ready.append(event)
                elif isinstance(event, Malformed):
                    logger.warning("%s", event.why)
        event = self._ready.popleft()
        if isinstance(event, End):
            if self._attachment is not None:
                await self._attachment.confirm_end()
            await self.aclose()
        return event

    async def _open(self) -> Attachment:
        target = await locate(self._links, self._thread, self._name)
        attachment = Attachment(self._config, self._links.dial, target, shared=True)
        return await attachment.__aenter__()

    async def aclose(self) -> None:
        """Stop watching; the run goes on. May be called again."""
        self.closed = True
        self._ready.clear()
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            await attachment.__aexit__()
