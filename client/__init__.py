"""How any Python program reaches a daemon: see docs/python.md.

Names are imported when they are used first, so that a command does not load what it does
not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config.schema import Config, ConfigError, RunctlError
    from ..protocol.errors import (
        BadRequest,
        Busy,
        Denied,
        NotFound,
        NotGone,
        QueueFull,
        Refused,
        RequestError,
        Unavailable,
    )
    from ..protocol.messages import RunDetails, RunRow, Submitted
    from ..protocol.model import Run, Status, ThreadRow
    from .api import Client, Listing, connect
    from .attachment import RunEvent, RunEvents
    from .events import Chunk, Continue, End, Gap, Reset

__all__ = [
    "BadRequest",
    "Busy",
    "Chunk",
    "Client",
    "Config",
    "ConfigError",
    "Continue",
    "Denied",
    "End",
    "Gap",
    "Listing",
    "NotFound",
    "NotGone",
    "QueueFull",
    "Refused",
    "RequestError",
    "Reset",
    "Run",
    "RunDetails",
    "RunEvent",
    "RunEvents",
    "RunRow",
    "RunctlError",
    "Status",
    "Submitted",
    "ThreadRow",
    "Unavailable",
    "connect",
]

_HOMES = {
    "..config.schema": ("Config", "ConfigError", "RunctlError"),
    "..protocol.errors": (
        *("BadRequest", "Busy", "Denied", "NotFound", "NotGone", "QueueFull", "Refused"),
        *("RequestError", "Unavailable"),
    ),
    "..protocol.messages": ("RunDetails", "RunRow", "Submitted"),
    "..protocol.model": ("Run", "Status", "ThreadRow"),
    ".api": ("Client", "Listing", "connect"),
    ".attachment": ("RunEvent", "RunEvents"),
    ".events": ("Chunk", "Continue", "End", "Gap", "Reset"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
