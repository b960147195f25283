"""``runctl submit --batch``: JSON lines in, JSON lines out, in order, over one connection."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator

from ...client.api import find_directory
from ...client.shared_link import SharedLink
from ...client.submit_lines import SubmitLines, split_lines
from ...protocol.model import one_line
from ..common import FAILED, OK, UNAVAILABLE
from ..display import render

BLOCK = 64 * 1024


async def submit_batch(links: SharedLink, fd: int, *, runner: str | None, ordered: bool) -> int:
    """Submit what ``fd`` holds; the exit code. ``ordered``: see SubmitLines. Raises ReaderGone;
    OSError, when ``fd`` cannot be read to its end, once what was read before is answered;
    Unavailable."""
    batch = SubmitLines(links, runner=runner, cwd=find_directory(), ordered=ordered)

    async def write(answer: object) -> None:
        render.out_json(answer)

    await batch.submit(lambda most: lines(fd, most), write)
    if batch.unread is not None:
        raise batch.unread
    if batch.lost is not None:
        render.note(
            f"{one_line(str(batch.lost))}; {batch.answered} lines were answered,"
            f" {batch.unanswered} were not and may have been submitted. Submit them all again:"
            " lines with an id are submitted once"
        )
        return UNAVAILABLE
    if batch.failed:
        render.note(f"{batch.failed} of {batch.answered} lines were not submitted")
        return FAILED
    return OK


def lines(fd: int, most: int) -> AsyncIterator[bytes | None]:
    """The lines of ``fd``, as they come: see ``split_lines``."""
    return split_lines(_blocks(fd), most)


async def _blocks(fd: int) -> AsyncIterator[bytes]:
    waits = not stat.S_ISREG(os.fstat(fd).st_mode)
    while True:
        if waits:
            waits = await _readable(fd)
        else:
            await asyncio.sleep(0)
        try:
            data = os.read(fd, BLOCK)
        except BlockingIOError:  # another process that has it open was quicker
            waits = await _readable(fd)
            continue
        if not data:
            return
        yield data


async def _readable(fd: int) -> bool:
    """Wait until there is something to read; False where that cannot be waited for."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # such as /dev/null
        return False
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
    return True
