"""One connection for all that a client does, which is made anew when it broke."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..config.schema import Config
from ..protocol import messages
from ..protocol.errors import Away
from .link import Link, LinkLost, dial
from .patience import Outage, Patience
from .requests import ask

T = TypeVar("T")
R = TypeVar("R", bound=messages.Reply)


class SharedLink:
    """Made when it is needed first. ``patience``: with a daemon that restarts; None: nobody
    waits for one."""

    def __init__(self, config: Config, patience: Patience | None = None) -> None:
        self._config = config
        self._patience = patience or Patience(config, 0)
        self._lock = asyncio.Lock()
        self._link: Link | None = None

    async def dial(self) -> Link:
        """Now, or never. Raises Unavailable."""
        async with self._lock:
            if self._link is None or self._link.closed.is_set():
                self._link = await dial(self._config)
            return self._link

    async def reach(self) -> Link:
        """``dial``, with patience."""
        return await self.use(_give)

    async def use(self, work: Callable[[Link], Awaitable[T]], *, repeatable: bool = True) -> T:
        """``work`` over the connection; with patience again where nobody was there to hear its
        request, and, if it is ``repeatable``, where the connection broke before the answer.
        Raises Unavailable, and what ``work`` raises."""
        outage = Outage(self._patience)
        try:
            while True:
                try:
                    return await work(await self.dial())
                except Away as error:
                    await outage.wait(error, met=self._link is not None)
                except LinkLost as error:
                    if not repeatable:
                        raise
                    try:
                        await outage.wait(error, met=True)
                    except LinkLost:  # whoever only reads has lost nothing
                        raise Away(f"{error}; try again") from error
        finally:
            outage.end()

    async def ask(
        self, request: messages.Request, expect: type[R], *, executor: str | None = None
    ) -> R:
        """The daemon's answer; any executor's, or the named one's. Raises as ``requests.ask``
        does."""
        reads = messages.verb_of(request) in messages.READING
        return await self.use(
            lambda link: ask(link, request, expect, executor=executor), repeatable=reads
        )

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()


async def _give(link: Link) -> Link:
    return link
