"""What tells clients that an executor was here a moment ago, when none answers.

Clients of an external NATS cannot see a state directory. JetStream ends a consumer some time
after nobody hears it any more: one that all executors hear together outlives a crash of the
last of them by as much, and whoever ends in order last deletes it.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import trio
import trio_asyncio

from ...protocol import subjects
from ...protocol.stream_config import LEAST_IDLE
from ..output.stream_life import StreamLife

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

log = logging.getLogger("runctld.control")
aio = trio_asyncio.aio_as_trio

#: After a crash of the last executor, seconds: longer than clients wait for one.
REMEMBERED = LEAST_IDLE
TIMEOUT = 1.0
GROUP = "runctl"


class Presence:
    """``keep`` in a nursery, ``withdraw`` at an end in order."""

    def __init__(self, client: Client, life: StreamLife) -> None:
        self._nc = client
        self._life = life
        self._heard: Subscription | None = None
        self._lost = trio.Event()
        self._scope = trio.CancelScope()

    def renew(self) -> None:
        """The server may have forgotten it."""
        self._lost.set()

    async def keep(self) -> None:
        from nats.errors import Error

        try:
            self._heard = await aio(self._nc.subscribe)(
                subjects.PRESENCE_SUBJECT, queue=GROUP, cb=_answer
            )
        except (Error, OSError) as error:  # whoever watches the connection says so
            log.debug("presence: %r", error)
            return
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_stream)
                while True:
                    self._lost = trio.Event()
                    await self._announce()
                    await self._lost.wait()

    async def _follow_stream(self) -> None:
        while True:
            await self._life.next_change.wait()
            self.renew()

    async def _announce(self) -> None:
        config = {
            "name": subjects.PRESENCE,
            "description": "executors are here; clients wait for one that restarts",
            "deliver_subject": subjects.PRESENCE_SUBJECT,
            "deliver_group": GROUP,
            "deliver_policy": "new",
            "filter_subject": subjects.PRESENCE_FILTER,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(REMEMBERED * 1e9),
        }
        where = f"{subjects.STREAM}.{subjects.PRESENCE}.{subjects.PRESENCE_FILTER}"
        body = {"stream_name": subjects.STREAM, "config": config}
        await self._ask(f"$JS.API.CONSUMER.CREATE.{where}", body)

    async def withdraw(self) -> None:
        """Nobody is to wait for us; those who wait for others may."""
        self._scope.cancel()
        if self._heard is None:
            return
        try:
            await aio(self._heard.unsubscribe)()
        except Exception as error:  # the connection is closed
            log.debug("presence: %r", error)
            return
        if not await self._ask(subjects.PRESENCE_SUBJECT):
            where = f"{subjects.STREAM}.{subjects.PRESENCE}"
            await self._ask(f"$JS.API.CONSUMER.DELETE.{where}")

    async def _ask(self, subject: str, body: dict[str, Any] | None = None) -> bool:
        """Whether anybody answered. What becomes of it does not matter enough to end for."""
        from nats.errors import Error

        payload = b"" if body is None else json.dumps(body).encode()
        try:
            answer = await aio(self._nc.request)(subject, payload, TIMEOUT)
        except (Error, OSError, TimeoutError) as error:
            log.debug("presence: %s: %r", subject, error)
            return False
        log.debug("presence: %s", answer.data)
        return True


async def _answer(message: Msg) -> None:
    if message.reply:
        await message.respond(b"")
