"""What ``runctl status --probe`` asks, for whoever keeps a daemon's container alive.

Other executors may answer on the same NATS: the one that the configuration names is
asked, by name. A daemon whose NATS is away reconnects by itself, and its runs go on
meanwhile; to end it for that would only have them replayed. So "live" fails only when
NATS is there and the daemon is not.
"""

from __future__ import annotations

import asyncio

from ...client.link import LinkLost, dial
from ...client.requests import ask
from ...config.schema import Config
from ...protocol import messages
from ...protocol.errors import Unavailable

#: Of a probe as a whole, seconds; a container's timeout lies above it.
LIMIT = 8.0


async def probe(config: Config, *, live: bool) -> str:
    """What was found, in words. Raises Unavailable, RequestError."""
    try:
        async with asyncio.timeout(LIMIT):
            return await _probe(config, live)
    except TimeoutError:
        raise Unavailable(f"no answer within {LIMIT:g} s; see the daemon's log") from None


async def _probe(config: Config, live: bool) -> str:
    try:
        link = await dial(config)
    except Unavailable as error:
        if live and not config.nats.embedded:
            return f"taken as alive: it cannot be asked ({error})"
        raise
    try:
        # Nothing of NATS or the database decides whether it is alive.
        request = messages.StatusRequest(alone=True, brief=live)
        found = await ask(link, request, messages.DaemonStatus, executor=config.executor_id)
    except LinkLost as error:
        if live and not config.nats.embedded:
            return f"taken as alive: it cannot be asked ({error})"
        raise
    finally:
        await link.close()
    if live:
        return f"executor {found.executor_id} is alive, {found.running} running"
    if not found.nats.connected:
        raise Unavailable(f"executor {found.executor_id} is not connected to NATS; it tries again")
    if found.nats.unfit is not None:
        raise Unavailable(f"executor {found.executor_id} stores no output: {found.nats.unfit}")
    return f"executor {found.executor_id} is ready, {found.running} running"
