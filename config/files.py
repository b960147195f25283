"""Files that others name, or may have written, are read as far as they can be meant."""

from __future__ import annotations

import errno
from pathlib import Path

#: Bytes of a secret, a key, a certificate or a bundle of them; and of a configuration.
MOST_SECRET = 64 * 1024
MOST_KEYS = 2 * 1024 * 1024
MOST_TOML = 4 * 1024 * 1024


def read_bounded(file: Path, most: int) -> bytes:
    """What ``file`` holds. Raises OSError, also when that is more than ``most`` bytes: a device
    may have no end, and a file of gigabytes is none of those that are looked for."""
    with file.open("rb") as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        size = f"{most // 1024**2} MiB" if most >= 1024**2 else f"{most // 1024} KiB"
        raise OSError(errno.EFBIG, f"it holds more than {size}")
    return data
