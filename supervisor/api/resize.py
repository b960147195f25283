"""``resize``: a watcher tells how large its terminal is."""

from __future__ import annotations

from ...protocol import messages
from ...protocol.errors import NotFound, Refused
from ..processes.terminal_size import check_size
from .context import Context
from .queries import find_run


async def resize(c: Context, r: messages.Resize) -> messages.Reply:
    size = check_size(r)
    live = c.registry.get(r.run)
    if live is None:
        found = await find_run(c, r.run)
        if found is None:
            raise NotFound(f"no run {r.run!r}; see: runctl list THREAD")
        raise Refused(f"run {r.run} does not run on executor {c.executor!r}")
    if live.window is None:
        raise Refused(f"run {r.run} is not on a terminal; its runner needs tty = true")
    if size is None:
        return messages.Resized(*await live.window.leave(r.client))
    return messages.Resized(*await live.window.announce(r.client, size))
