"""User, groups and capabilities of a process (Linux). Standard library only: the keeper
imports it too.

What the kernel does when they change: capabilities(7), credentials(7), setfsuid(2),
PR_SET_PDEATHSIG and PR_SET_DUMPABLE in prctl(2).
"""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_VERSION_3 = 0x20080522
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
#: CAP_KILL, CAP_SETGID, CAP_SETUID: what the keeper may have, and nothing that it starts.
_OURS = 1 << 5 | 1 << 6 | 1 << 7


def become_user(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Turn this process into one of that user, for good and without any capability.

    Raises OSError; what it is then is undefined: end it."""
    if (uid, gid) == (os.geteuid(), os.getegid()):
        shed_capabilities()
        return
    os.setgroups(list(groups))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _keep_capabilities(0)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise OSError(errno.EPERM, "the user did not change")


def shed_capabilities() -> None:
    """Give up what is the keeper's alone. Root keeps what it has: its files are its own."""
    if _LIBC is not None and os.geteuid() != 0:
        _keep_capabilities(~_OURS)


def _keep_capabilities(kept: int) -> None:
    """Leave none but ``kept``, a set of bits, of the capabilities of this process; what is
    ambient goes with them."""
    assert _LIBC is not None
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
    _check_result(_LIBC.capget(header, data))
    held = list(data)
    for index in range(6):
        data[index] &= (kept >> 32 * (index // 3)) & 0xFFFFFFFF
    if list(data) != held:  # who holds none may be forbidden the very call
        _check_result(_LIBC.capset(header, data))


@contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """In this thread: files are opened and made as that user's. Nothing is raised when this
    process may not do that: it then goes on as itself. Must not await."""
    if _LIBC is None or (uid, gid) == (os.geteuid(), os.getegid()):
        yield
        return
    # The kernel opens a process to its new user's eyes, or closes it, when that changes.
    dumpable = _LIBC.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    before_gid = _LIBC.setfsgid(ctypes.c_uint32(gid))
    before_uid = _LIBC.setfsuid(ctypes.c_uint32(uid))
    try:
        yield
    finally:
        _LIBC.setfsuid(ctypes.c_uint32(before_uid & 0xFFFFFFFF))
        _LIBC.setfsgid(ctypes.c_uint32(before_gid & 0xFFFFFFFF))
        if dumpable == 1:
            _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def _check_result(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
