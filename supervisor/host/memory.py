"""How much of what was freed the allocator keeps for later."""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8  # malloc.h of glibc
_ARENAS = 2


def few_arenas() -> None:
    """glibc gives threads arenas of their own, up to eight a core, and each keeps what was
    freed in it: 12 MiB after 10,000 runs. One thread runs at a time here, so two are enough.
    To be called before there are threads; MALLOC_ARENA_MAX in the environment decides."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, _ARENAS)
