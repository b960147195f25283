"""Why a connection failed, in the system's words: trio, httpcore and httpx wrap them, and say
nothing themselves of a handshake that failed."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and all that it came from, the nearest first."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        found = todo.pop(0)
        if found is None or found in seen:
            continue
        seen.append(found)
        yield found
        if isinstance(found, BaseExceptionGroup):
            todo += found.exceptions
        todo += [found.__cause__, found.__context__]


def why(error: Exception) -> str:
    """What the system said, else what the library did; never empty."""
    all_causes = list(causes(error))
    for found in all_causes:
        if isinstance(found, ssl.SSLError):
            return tls_words(found)
    for found in all_causes:
        if isinstance(found, socket.gaierror) and found.strerror:
            return found.strerror
    for found in all_causes:
        if isinstance(found, OSError) and found.errno:
            return os.strerror(found.errno)
    return next((str(found) for found in all_causes if str(found)), type(error).__name__)


def tls_words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    return f"TLS failed ({(error.reason or str(error)).replace('_', ' ').lower()})"
