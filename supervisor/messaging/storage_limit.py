"""How much output an embedded server can store: what the file system has, at most."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from msgspec.structs import replace

from ...config.schema import Config
from ...config.units import format_size
from ...protocol.errors import Unavailable

log = logging.getLogger("runctld")

#: Of the room that is there; the rest is for the queue, and for whatever else is there.
SHARE = 0.75
LEAST = 1024**2


def fit_to_disk(config: Config) -> Config:
    """``config`` with a ``stream.max_bytes`` that the disk can hold. Without that a disk that
    is smaller would be full one day, and then nothing could be written at all.

    Raises: Unavailable, when there is no room to begin with."""
    if not config.nats.embedded:
        return config
    disk = os.statvfs(config.state_dir)
    room = disk.f_bavail * disk.f_frsize + _measure_use(config.state_dir / "nats" / "store")
    most = int(room * SHARE) // LEAST * LEAST
    if most >= config.stream.max_bytes:
        return config
    if most < LEAST:
        raise Unavailable(f"the disk of state_dir {config.state_dir} is full; make room there")
    log.warning(
        "stream.max_bytes is %s, and state_dir %s has room for %s: output is kept up to that;"
        " lower it, or make room and restart",
        *(format_size(config.stream.max_bytes), config.state_dir, format_size(most)),
    )
    return replace(config, stream=replace(config.stream, max_bytes=most))


def _measure_use(folder: Path) -> int:
    """Bytes on disk below ``folder``."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_blocks * 512
            except OSError:  # it has just gone
                continue
    return total
