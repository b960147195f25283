"""Whether an executor without a lease has surely ended.

A free lease alone says little: PostgreSQL may have restarted, and its executors go on without
their leases for a while (``queue.lease_grace``). Who does so answers over NATS, and who does
not get an answer of NATS either ends within ``lease.PROBE_LIMIT`` seconds.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio
import trio_asyncio

from ...protocol import subjects
from .database_lease import PROBE, PROBE_LIMIT
from .members import Members

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("runctld.absence")
aio = trio_asyncio.aio_as_trio

#: Whether an executor answers at all is known after this, seconds.
HEAR_TIMEOUT = 1.0
#: So long without lease and answer: it has ended, whatever its grace.
SILENCE = PROBE_LIMIT + 4 * PROBE
#: A longer gap between two looks, seconds, and what was seen before counts for nothing.
_GAP = 5.0
_POLL = 0.1


class Absence:
    """``members`` None: there are no other executors."""

    def __init__(self, client: Client, members: Members | None) -> None:
        self._nc = client
        self._members = members
        self._session = 0
        #: executor -> (since when neither lease nor answer was seen, when looked last)
        self._seen: dict[str, tuple[float, float]] = {}

    async def surely_ended(self, executor: str) -> bool:
        """Whether its daemon has; its keeper may need ``TREES_GONE`` for the processes.

        Raises Unavailable, when PostgreSQL is away."""
        assert self._members is not None
        began = trio.current_time()
        member = await self._members.get(executor)
        if self._session != self._members.sessions:
            self._session = self._members.sessions
            self._seen.clear()
        if member.alive or await self.answers(executor):
            self._seen.pop(executor, None)
            return False
        since, last = self._seen.get(executor, (began, began))
        if began - last > _GAP:
            since = began
        self._seen[executor] = since, trio.current_time()
        return began - since >= min(member.grace and member.grace + PROBE, SILENCE)

    async def wait_predecessor(self, executor: str, grace: float) -> None:
        """Until the daemon that had our own ``executor`` ID before us, and goes on for ``grace``
        seconds without it, has surely ended. We hold the lease, and do not answer yet."""
        since = trio.current_time()
        while trio.current_time() - since < min(grace + PROBE, SILENCE):
            if await self.answers(executor):
                since = trio.current_time()
            await trio.sleep(_POLL)

    async def answers(self, executor: str, timeout: float = HEAR_TIMEOUT) -> bool:
        """Whether it says anything. One that stops serves no verb any more, but has runs."""
        from nats.errors import Error, NoRespondersError

        # "here" may be asked by whoever watches, and so be flooded; an older daemon knows no
        # other.
        for verb in ("alive", "here"):
            try:
                await aio(self._nc.request)(subjects.control_subject(verb, executor), b"", timeout)
            except NoRespondersError:
                continue
            except (Error, TimeoutError) as error:
                log.debug("executor %s: %r", ascii(executor), error)
                return False
            return True
        return False
