"""The error tree. Every message tells the operator what to do.

::

    RunctlError
    +- ConfigError            exit 78 in runctld (defined in runctl.config.schema)
    +- Unavailable            NATS, the database or the daemon cannot be reached
    +- LeaseHeld              another live daemon has this executor ID
    +- LeaseLost              we had it, and lost it
    +- RequestError           a control request that is answered with a named error
    |  +- BadRequest          malformed or out of bounds
    |  +- NotFound            no such thread or run
    |  +- NotGone             aborted, and something of it is still there
    |  +- Refused             not possible as things stand
    |     +- Busy             as many requests are being served, and wait, as may
    |     +- Denied           NATS does not permit this user to ask for it
    |     +- QueueFull        as many runs wait as may
    +- Fenced                 a newer attempt owns the run's stream
    +- StreamUnfit            nothing can be stored until somebody has mended the stream
    +- RunFailed              a runner's work failed; the message is the run's error
"""

from __future__ import annotations

from typing import ClassVar

from ..config.schema import ConfigError, RunctlError

#: Characters of a message. It may quote what was asked for, and must fit into an answer.
LONGEST = 2000


def shortened(message: str, most: int = LONGEST) -> str:
    return message if len(message) <= most else message[: most - 3] + "..."


def innermost(error: BaseException) -> BaseException:
    """The first error of a group, which is what there is to say of it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Unavailable(RunctlError):
    """NATS, the database or the daemon cannot be reached."""


class Away(Unavailable):
    """Nobody serves for the moment, and nothing was done: a daemon that restarts would."""


class Stopping(Away):
    """The daemon stops, and did nothing of what it was asked; ``code`` goes on the wire."""

    code: ClassVar[str] = "stopping"


class LeaseHeld(RunctlError):
    """Another live daemon holds this executor ID."""


class LeaseLost(RunctlError):
    """This daemon no longer holds its executor ID."""


class RequestError(RunctlError):
    """A control request that cannot be served; ``code`` goes on the wire."""

    code: ClassVar[str] = "error"


class BadRequest(RequestError):
    code = "bad-request"


class NotFound(RequestError):
    code = "not-found"


class Refused(RequestError):
    code = "refused"


class NotGone(RequestError):
    """The run is aborted, for good, and something of it is still there: what is in the message."""

    code = "not-gone"


class Busy(Refused):
    """As many requests are being served, and wait, as may, of this client or in all. Nothing was
    done: to try again is safe."""

    code = "busy"


class Denied(Refused):
    """NATS does not permit this user to ask for it, or to hear the answer."""


class QueueFull(Refused):
    """As many runs are queued as may be, on the thread or in all."""

    code = "queue-full"


class Fenced(RunctlError):
    """A newer attempt owns the run's stream: this one must stop and record nothing.
    ``found`` is that attempt, when it was there already before this one began."""

    def __init__(self, message: str, found: int | None = None) -> None:
        super().__init__(message)
        self.found = found


class StreamUnfit(RunctlError):
    """The stream is gone and may not be made again, or was edited so that it takes no
    records: nothing can be stored until somebody has mended that."""


class RunFailed(RunctlError):
    """A runner's work failed. ``exit_code`` is the process's, where there was one
    (128 + signal number when a signal ended it)."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(shortened(message))
        self.exit_code = exit_code


__all__ = [
    "BadRequest",
    "Busy",
    "ConfigError",
    "Denied",
    "Fenced",
    "LeaseHeld",
    "LeaseLost",
    "NotFound",
    "NotGone",
    "QueueFull",
    "Refused",
    "RequestError",
    "RunFailed",
    "RunctlError",
    "StreamUnfit",
    "Unavailable",
    "innermost",
    "shortened",
]
