"""The daemon's program, started again in its own process: as it is installed by now."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from .early_signals import LEAVE, STOP


def start_again() -> NoReturn:
    """Signals wait until the new program hears them. Raises OSError."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP, *LEAVE, signal.SIGHUP))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
