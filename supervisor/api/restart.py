"""``restart``: the daemon's program is started again, in its own process."""

from __future__ import annotations

import os

from ...protocol import messages
from .context import Context


async def restart(c: Context, _: messages.Restart) -> messages.Reply:
    """What is being answered is answered first, this among it."""
    c.restart()
    return messages.Restarting(os.getpid(), c.outlives)
