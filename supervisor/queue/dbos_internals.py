"""DBOS's words go to our log, and what of it we do not use hardly runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import dbos._dbos
import dbos._workflow_commands
import sqlalchemy as sa

from .retries import reason

_commands: Any = dbos._workflow_commands
_launch: Any = dbos._dbos

#: How often DBOS looks after what we do not use (delays, a queue of its own), in seconds: its
#: every second is half of what an idle daemon costs.
SELDOM = 60.0
#: Its own queue: what its tools put there is taken to ours (``rows.Rows.adopt``).
NEVER = 10 * 365 * 86400.0


def quiet(held: Callable[[], bool]) -> None:
    """Its warnings go to our log; an aborted or interrupted workflow is no error here. Unless
    ``held``, the database is away, which the lease has said: several lines a second say no more."""
    library = logging.getLogger("dbos")
    library.handlers.clear()
    library.propagate = True

    def expected(record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is not None and "Cancelled" in kind.__name__:
            return False
        if not held() and record.levelno < logging.ERROR:
            return False
        message = record.getMessage()
        lines = message.strip().splitlines() or [""]  # no SQL, one line
        first, _, trace = lines[0].partition("Traceback (most recent call last)")
        record.msg, record.args = first + (lines[-1] if trace else ""), ()
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, sa.exc.DBAPIError):
            record.msg += f" {reason(error)}"
            record.exc_info = None
        return not any(
            words in message
            for words in ("no longer owned", "task cancelled", "automatically retried")
        )

    library.addFilter(expected)


def schedule_nothing() -> None:
    """No workflow of ours has a schedule: whoever may write rows gives us none, either."""

    def wait(stop: threading.Event, _: float) -> None:
        stop.wait()

    _launch.dynamic_scheduler_loop = wait


def poll_seldom(dbos: Any) -> None:
    """What has no setting."""
    dbos._registry.get_internal_queue()._polling_interval_sec = NEVER
    _commands._BACKGROUND_JOBS_INTERVAL_SEC = SELDOM
