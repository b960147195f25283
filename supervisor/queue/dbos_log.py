"""DBOS's words go to our log: one line each, and nothing that is no news here."""

from __future__ import annotations

import logging
from collections.abc import Callable

import sqlalchemy as sa

from .retries import reason

#: What DBOS says of a workflow that was aborted or interrupted, or is another's by now.
EXPECTED = ("no longer owned", "task cancelled", "automatically retried")


def redirect(lease_held: Callable[[], bool]) -> None:
    """Its warnings go to our log; an aborted or interrupted workflow is no error here. Unless
    ``lease_held``, the database is away, which the lease has said: several lines a second say no
    more."""
    library = logging.getLogger("dbos")
    library.handlers.clear()
    library.propagate = True

    def is_news(record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is not None and "Cancelled" in kind.__name__:
            return False
        if not lease_held() and record.levelno < logging.ERROR:
            return False
        message = record.getMessage()
        lines = message.strip().splitlines() or [""]  # no SQL, one line
        first, _, trace = lines[0].partition("Traceback (most recent call last)")
        record.msg, record.args = first + (lines[-1] if trace else ""), ()
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, sa.exc.DBAPIError):
            record.msg += f" {reason(error)}"
            record.exc_info = None
        return not any(words in message for words in EXPECTED)

    library.addFilter(is_news)
