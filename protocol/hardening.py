"""A process that others of its user cannot look into. Small: the command line starts with it."""

from __future__ import annotations

import sys

_PR_SET_DUMPABLE = 4


def close_process() -> None:
    """No core dumps of this process, and no look at its memory or environment by others of
    its user, such as the commands that the daemon runs. It ends with an exec, so children are
    as ever. Most of our own files in /proc are root's from here on."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
