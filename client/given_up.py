"""Tasks and futures whose outcome is of no more interest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


def give_up(futures: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel them. Of one that fails, or did at this moment, asyncio says nothing on stderr."""
    for future in futures:
        future.add_done_callback(_take_error)
        future.cancel()


def _take_error(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
