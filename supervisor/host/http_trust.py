"""Whom we trust when we connect to others over HTTP, as the environment says."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Iterator

import trio

from ...config.outgoing import Problem, certificate_problems
from ...protocol.errors import RunFailed

_context: ssl.SSLContext | None = None
#: Reads of certificates at once: their file system may hang.
_reads = trio.CapacityLimiter(1)


async def tls_context() -> ssl.SSLContext:
    """The TLS context of all calls. The first one imports httpx and reads the certificates of
    the system, or of SSL_CERT_FILE: 0.1 s, off the event loop, and not at the daemon's start.

    Raises: RunFailed, when the environment names what cannot be used."""
    global _context
    if _context is None:
        try:
            _context = await trio.to_thread.run_sync(_load, limiter=_reads, abandon_on_cancel=True)
        except OSError as error:  # also ssl.SSLError
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise unusable(certificate_problems(os.environ), "certificates", error) from None
    return _context


def unusable(problems: Iterator[Problem], what: str, error: Exception) -> RunFailed:
    """What is wrong with the environment: the first of ``problems``, else ``what`` it is about."""
    # What is not known to be wrong is not quoted: it may hold a proxy's password.
    found = next(problems, None) or Problem(
        f"its {what} cannot be used ({type(error).__name__})", "correct or unset its variables"
    )
    return RunFailed(f"runctld's environment: {found.said}; {found.fix}")


def _load() -> ssl.SSLContext:
    import httpx
    import httpx_sse  # noqa: F401  # whoever chats needs it next

    return httpx.create_ssl_context()
