"""One operator's connection to a house: requests, and what is stored of a run."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from runctl.client.link import Link, NotReady
from runctl.client.requests import ask
from runctl.client.shared_link import SharedLink
from runctl.config.load import load
from runctl.protocol import messages, records, subjects
from runctl.protocol.errors import Unavailable
from runctl.protocol.records import Record

R = TypeVar("R", bound=messages.Reply)
T = TypeVar("T")

#: A request may meet a server that is stopped: then another one is sent.
PATIENCE = 8.0


class Client:
    """Dials again whenever its connection is gone."""

    def __init__(self, config: Path) -> None:
        self._links = SharedLink(load(config, client=True))

    async def ask(self, request: messages.Request, expect: type[R]) -> R:
        """One answer to one request. Raises Unavailable, RequestError, TimeoutError."""
        return await self.use(lambda link: ask(link, request, expect))

    async def sure(self, request: messages.Request, expect: type[R], deadline: float = 60.0) -> R:
        """The answer, however often it has to be asked for."""
        return await self._persist(lambda: self.ask(request, expect), deadline)

    async def records(self, thread: str, run: str) -> list[Record]:
        """All that is stored of the run's output."""
        return await self._persist(lambda: self._records(subjects.out_subject(thread, run)), 60.0)

    async def close(self) -> None:
        await self._links.close()

    async def _persist(self, what: Callable[[], Awaitable[T]], deadline: float) -> T:
        async with asyncio.timeout(deadline):
            while True:
                try:
                    return await what()
                except (Unavailable, NotReady, TimeoutError, OSError):
                    await asyncio.sleep(0.1)

    async def _records(self, subject: str) -> list[Record]:
        found: list[Record] = []
        sequence = 1
        while True:
            query = {"seq": sequence, "next_by_subj": subject}
            try:
                reply = await self.use(
                    lambda link, query=query: link.api(f"STREAM.MSG.GET.{subjects.STREAM}", query)
                )
            except NotReady as problem:
                if problem.code == subjects.NO_MESSAGE:
                    return found
                raise
            message = reply["message"]
            found.append(records.decode_record(base64.b64decode(message["data"])))
            sequence = int(message["seq"]) + 1

    async def use(self, what: Callable[[Link], Awaitable[T]]) -> T:
        """What it makes of the connection, which is made if there is none, and shared."""
        async with asyncio.timeout(PATIENCE):
            link = await self._links.dial()
        try:
            async with asyncio.timeout(PATIENCE):
                return await what(link)
        except (Unavailable, NotReady, TimeoutError, OSError) as problem:
            if isinstance(problem, NotReady) and problem.code:
                raise  # that is an answer
            # Only the one that failed: others that share it have dialled another by now, and
            # would lose that again and again.
            await link.close()
            raise
