"""Files that others name, or may have written, are read as far as they can be meant."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path

#: Bytes of a secret, a key, a certificate or a bundle of them; and of a configuration.
MOST_SECRET = 64 * 1024
MOST_KEYS = 2 * 1024 * 1024
MOST_TOML = 4 * 1024 * 1024
#: Whoever writes to a pipe has so long for all of it, seconds.
PIPE = 5.0


def read_bounded(file: Path, most: int) -> bytes:
    """What ``file`` holds. Raises OSError, also when that is more than ``most`` bytes: a device
    may have no end, and a file of gigabytes is none of those that are looked for. So may a pipe
    have none, or nobody who writes to it: then it raises OSError as well, after ``PIPE``."""
    with open(file, "rb", opener=open_at_once) as opened:
        if stat.S_ISFIFO(os.fstat(opened.fileno()).st_mode):
            data = _read_pipe(opened.fileno(), most + 1)
        else:
            os.set_blocking(opened.fileno(), True)  # a terminal's
            data = opened.read(most + 1)
    if len(data) > most:
        size = f"{most // 1024**2} MiB" if most >= 1024**2 else f"{most // 1024} KiB"
        raise OSError(errno.EFBIG, f"it holds more than {size}")
    return data


def open_at_once(path: str, flags: int) -> int:
    """For ``open``, of what may be a pipe: it would wait for somebody who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read_pipe(fd: int, most: int) -> bytes:
    data = b""
    end = time.monotonic() + PIPE
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    while len(data) < most:
        left = end - time.monotonic()
        if left <= 0 or not waiting.poll(1000 * left):
            raise OSError(errno.ETIMEDOUT, f"it is a pipe that has not ended within {PIPE:g} s")
        try:
            part = os.read(fd, most - len(data))
        except BlockingIOError:
            continue
        if not part:
            break
        data += part
    return data
