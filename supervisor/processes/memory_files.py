"""Files in memory, from which a command's output is read: what the kernel moves into them, and
gives back of them. Linux only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys

#: The flag by which memfd_create(2) is allowed under vm.memfd_noexec=2; kernels before 6.3 do not
#: know it.
_NOEXEC_SEAL = 0x8
#: fallocate(2): the range reads as zeros, and takes no memory; the size stays.
_KEEP_SIZE, _PUNCH_HOLE = 0x1, 0x2
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
#: Most that is moved at once.
MOST = 1 << 20


def make_memory_file(name: str) -> int:
    """The descriptor of an empty one. Raises OSError."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | _NOEXEC_SEAL)
    except OSError:
        return os.memfd_create(name, os.MFD_CLOEXEC)


def move(source: int, target: int, most: int) -> int:
    """Move up to ``most`` bytes, from or to a pipe, without copying; 0 at the end of
    ``source``. Each file's position counts on, for whoever has a copy of its descriptor as well.
    Raises BlockingIOError, when there is nothing to move or no room for it; OSError."""
    return os.splice(source, target, min(most, MOST), flags=os.SPLICE_F_NONBLOCK)


def give_back(memory: int, begin: int, end: int) -> None:
    """Free what a file in memory holds from ``begin`` to ``end``. Raises OSError."""
    assert _LIBC is not None
    what = _KEEP_SIZE | _PUNCH_HOLE
    size = ctypes.c_int64
    if _LIBC.fallocate(memory, what, size(begin), size(end - begin)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def find_data(memory: int, begin: int) -> int:
    """Where a file in memory holds something from ``begin`` on: what was given back reads as
    zeros. Its size, when it holds nothing there. Raises OSError."""
    # Of its own: the position of the one that is there counts what was moved.
    fd = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, begin, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def can_move() -> bool:
    """Whether this kernel does all that is above: tried."""
    if sys.platform != "linux":
        return False
    fds: list[int] = []
    try:
        fds += os.pipe()
        fds.append(make_memory_file("runctl-trial"))
        os.write(fds[1], b"x" * 8192)
        moved = move(fds[0], fds[2], 8192)
        give_back(fds[2], 0, 4096)
        return os.pread(fds[2], 8192, 0) == bytes(4096) + b"x" * 4096 and moved == 8192
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)
