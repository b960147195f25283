"""A command's stdin: a prompt, which is fed to it as fast as it reads."""

from __future__ import annotations

import contextlib

import trio

from ...processes.memory_files import MOST, move


async def feed_bytes(pipe: int, data: bytes) -> None:
    """Write ``data`` to ``pipe``, and close it."""
    async with trio.lowlevel.FdStream(pipe) as stream:
        # Broken: the command did not want to read it.
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(data)


async def feed_file(pipe: int, text: int) -> None:
    """Move what follows the position of ``text``, a file in memory, into ``pipe``. How much of it
    has been fed is that position, for whoever has copies of both: neither is closed."""
    while True:
        await trio.lowlevel.wait_writable(pipe)
        try:
            if not move(text, pipe, MOST):
                return
        except BlockingIOError:
            await trio.lowlevel.checkpoint()
        except BrokenPipeError:
            return
