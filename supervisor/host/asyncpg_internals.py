"""All that is private to asyncpg and in use: listed, checked before the first session is opened,
touched nowhere else."""

from __future__ import annotations

import socket
from typing import Any

from ...config.private_names import PrivateNames

PRIVATE = PrivateNames(
    "asyncpg",
    "asyncpg",
    "0.32.0",
    {"asyncpg.connection": ("Connection._transport",)},
)
#: Raises ConfigError.
check = PRIVATE.check


def leave_session(conn: Any) -> None:
    """Close our socket of ``conn`` without a word to the server: the session goes on for whoever
    has a copy. (``terminate`` says farewell first, which ends it.)"""
    conn._transport.abort()


def socket_of(conn: Any) -> socket.socket:
    """What ``conn`` is connected through. It stays asyncpg's."""
    found: socket.socket = conn._transport.get_extra_info("socket")
    return found
