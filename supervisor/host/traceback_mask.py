"""Tracebacks of what nobody caught, with the secrets of the configuration masked: errors of
libraries may quote what they were given."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType


def mask_tracebacks(hide: Callable[[str], str]) -> None:
    """Of exceptions that nobody catches, in any thread."""

    def show(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        print(hide(text), end="", file=sys.stderr, flush=True)

    sys.excepthook = show
    threading.excepthook = lambda args: show(args.exc_type, args.exc_value, args.exc_traceback)
