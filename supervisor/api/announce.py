"""News that nobody depends on: what was done is done, heard or not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio_asyncio

from ...protocol import subjects
from ..execution.registry import Registry
from ..execution.settings import Settings

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("runctld.control")
aio = trio_asyncio.aio_as_trio


class Announcer:
    def __init__(self, client: Client, registry: Registry, settings: Settings) -> None:
        self._nc = client
        self._registry = registry
        self._settings = settings

    async def tell_others(self) -> None:
        """There is work for any executor that has room."""
        await self._tell(subjects.KICK_SUBJECT)

    async def tell_changed(self, thread: str) -> None:
        """The thread's queue is not what it was: for those who watch it live."""
        self._registry.touch()
        await self._tell(subjects.CHANGED_SUBJECT, thread.encode())

    async def tell_if_full(self) -> None:
        if len(self._registry) >= self._settings.queue.max_running:
            await self.tell_others()

    async def _tell(self, subject: str, what: bytes = b"") -> None:
        try:
            await aio(self._nc.publish)(subject, what)
        except Exception as error:  # the connection is closed, or too much waits for it
            log.debug("%s was not told: %r", subject, error)
