"""What waits on stdin for a verb that does not read it.

It is not read without being asked for: in ``while read x; do runctl submit ...; done`` it is
the loop's, and a pipe that nobody closes (of cron, ssh, CI, another program) would hold the
verb for ever. What was given to this command is not dropped without a word either.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import termios
from typing import Literal

STDIN = 0


#: Data that waits: none, for this command alone, or perhaps for its parent, such as a loop.
Unread = Literal["nothing", "ours", "shared"]


def unread_input() -> Unread:
    """Whose data waits on stdin. Reads nothing, waits for nothing."""
    with contextlib.suppress(OSError):  # closed
        found = os.fstat(STDIN)
        if _waits(found):
            if not _shared(found):
                return "ours"
            # Of a file whose beginning has been read the reader is known.
            if not stat.S_ISREG(found.st_mode) or not os.lseek(STDIN, 0, os.SEEK_CUR):
                return "shared"
    return "nothing"


def _waits(found: os.stat_result) -> bool:
    if stat.S_ISREG(found.st_mode):
        return os.lseek(STDIN, 0, os.SEEK_CUR) < found.st_size
    if stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode):
        (size,) = struct.unpack("i", fcntl.ioctl(STDIN, termios.FIONREAD, b"\0" * 4))
        return bool(size > 0)
    return False


def _shared(found: os.stat_result) -> bool:
    """Whether it is our parent's as well: a loop's, a script's, or that of "sh -c". Yes where
    that is not known, without /proc or below another user's process."""
    try:
        theirs = os.stat(f"/proc/{os.getppid()}/fd/{STDIN}")
    except OSError:
        return True
    return (theirs.st_dev, theirs.st_ino) == (found.st_dev, found.st_ino)
