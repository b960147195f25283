"""Waiting until a run ends, through restarts of the daemon and of nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ..config.schema import Config
from ..protocol import subjects
from ..protocol.model import Run, Status
from .cancellation import end_tasks
from .consumer import Watcher
from .events import CaughtUp, End, Event
from .run_end import RECORD_TIMEOUT, push_lost_end, wait_until_recorded
from .shared_link import SharedLink


async def wait_for_end(
    config: Config,
    links: SharedLink,
    found: Run,
    *,
    timeout: float | None = None,
    notice: Callable[[Event], None] = lambda _: None,
) -> Run:
    """``found`` once it has ended. ``timeout``: seconds. ``notice`` is called with each event of
    the run but its end; of its chunks only with the last one that is stored, and those after.

    Raises: TimeoutError, when it has not ended in time; Unavailable, when watching cannot
    begin. Restarts later on are waited out."""
    if found.status.terminal:
        return found
    name = found.run
    subject = subjects.out_subject(found.thread, name)
    settling: asyncio.Task[None] | None = None
    watcher = Watcher(links.dial, subject, last_only=True, shared=True)
    try:
        async with asyncio.timeout(timeout) as limit, watcher:
            async for events in watcher:
                for event in events:
                    if isinstance(event, End):
                        limit.reschedule(None)  # it has ended, and that stays
                        return await _read_ended(config, watcher, found, event)
                    notice(event)
                    if isinstance(event, CaughtUp):
                        if settling is not None:
                            settling.cancel()
                        settling = asyncio.create_task(push_lost_end(config, name, watcher))
    finally:
        if settling is not None:
            await end_tasks([settling])
    raise AssertionError("a watcher ends only with an error")


async def _read_ended(config: Config, watcher: Watcher, found: Run, end: End) -> Run:
    """The run as the daemon has it once it is recorded as ended; else from its end."""
    try:
        async with asyncio.timeout(RECORD_TIMEOUT):
            row = await wait_until_recorded(config, watcher, found.run)
    except TimeoutError:
        row = None
    if row is not None and row.status.value == end.status:
        return row
    return msgspec.structs.replace(
        found,
        status=Status(end.status),
        attempt=end.attempt,
        exit_code=end.exit_code,
        error=end.error,
        note=end.note,
    )
