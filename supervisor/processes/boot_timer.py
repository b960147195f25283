"""A timer that counts the time in which the machine sleeps. Standard library only: the keeper
imports it. Linux only.
"""

import ctypes
import os
import struct
import sys
import time

_CLOCK_BOOTTIME = 7
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def measure_sleep() -> float:
    """How long the machine has slept since it was started, seconds."""
    return time.clock_gettime(_CLOCK_BOOTTIME) - time.monotonic()


def open_boot_timer(seconds: float) -> int:
    """A descriptor that is readable once ``seconds`` are over (timerfd_create(2)). Raises
    OSError."""
    assert _LIBC is not None
    fd: int = _LIBC.timerfd_create(_CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    whole = int(seconds)
    nanoseconds = max(1, int((seconds - whole) * 1e9))
    when = struct.pack("4l", 0, 0, whole, nanoseconds)
    if _LIBC.timerfd_settime(fd, 0, when, None) != 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, "timerfd_settime")
    return fd
