"""``session``: by which names agents know a thread's conversation."""

from __future__ import annotations

from ...protocol import messages
from ...protocol.errors import NotFound
from ...protocol.model import check_thread
from ..queue.row_status import format_times
from .context import Context


async def session(c: Context, r: messages.Session) -> messages.Reply:
    thread = check_thread(r.thread)
    found = await c.durable.sessions.list_of(thread)
    if not found and not await c.durable.rows.list_runs(thread, limit=1):
        raise NotFound(f"no thread {thread!r}; see: runctl list")
    if r.forget:
        await c.durable.sessions.forget(thread)
    return messages.Sessions(
        [
            messages.ThreadSession(x.runner, x.name, *format_times([int(x.made * 1000)]))
            for x in found
        ]
    )
