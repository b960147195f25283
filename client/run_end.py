"""How a run ended, where its end record is gone or is not in the database yet."""

from __future__ import annotations

import asyncio

from ..config.schema import Config
from ..protocol import messages
from ..protocol.errors import BadRequest, Busy, Denied, NotFound, RequestError, Unavailable
from ..protocol.model import Run
from .consumer import Watcher
from .events import End, Lost
from .requests import ask, ask_once

#: How long the daemon may take to record an end that is in the stream already, seconds.
RECORD_TIMEOUT = 5.0


async def push_lost_end(config: Config, name: str, watcher: Watcher) -> None:
    """After a reconnection: if the run ended and its end record is gone (retention, a
    purge), nothing would ever tell the watcher. Ask the daemon, once it answers."""
    delay = 0.1
    while True:
        try:
            found = (await ask_once(config, messages.Show(name), messages.RunDetails)).run
        except (BadRequest, NotFound, Denied):
            return
        except (Unavailable, RequestError):  # it is busy, it stops, its database is away
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)
            continue
        if found.status.terminal:
            await asyncio.sleep(1.0)  # the record itself comes first, if it is there
            watcher.push(Lost(name))
            watcher.push(make_end(found))
        return


def make_end(found: Run) -> End:
    """In place of its record."""
    return End(
        *(found.run, found.attempt, found.status.value),
        *(found.exit_code, found.error, found.note),
        lost=True,
    )


async def wait_until_recorded(config: Config, watcher: Watcher, name: str) -> Run | None:
    """The run once the daemon says that it ended; None if the daemon does not answer."""
    delay = 0.005
    while True:
        link = watcher.link
        reply: messages.RunDetails | None
        try:
            if link is None or link.closed.is_set():
                reply = await ask_once(config, messages.Show(name), messages.RunDetails)
            else:
                reply = await ask(link, messages.Show(name), messages.RunDetails)
        except Busy:
            reply = None
        except (Unavailable, RequestError):
            return None
        if reply is not None and reply.run.status.terminal:
            return reply.run
        await asyncio.sleep(delay)
        delay = min(delay * 2, 0.2)
