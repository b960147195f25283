"""Files and directories that hang whoever opens them, on this machine and for a while."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def hanging_command(path: Path) -> Iterator[str]:
    """A command that makes ``path``.ran. Its exec hangs for as long as the kernel lets a lease
    hold up an open: /proc/sys/fs/lease-break-time, usually 45 s. KILL reaches who hangs."""
    path.write_text(f"#!/bin/sh\necho > '{path}.ran'\n")
    path.chmod(0o700)
    old = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield str(path)
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, old)


_SERVER = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
if libc.mount(b"dead", sys.argv[1].encode(), b"fuse", 0, options.encode()) != 0:
    sys.exit(1)
print("up", flush=True)
while True:
    request = os.read(device, 1 << 20)
    _, opcode, unique = struct.unpack_from("=IIQ", request)
    if opcode == 26:  # its greeting is all that is answered
        major, minor, readahead = struct.unpack_from("=III", request, 40)
        body = struct.pack("=IIIIHHI", major, minor, readahead, 0, 12, 9, 1 << 17).ljust(64, b"\\0")
        os.write(device, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)
    else:
        open(sys.argv[1] + ".taken", "w").close()
"""


@contextlib.contextmanager
def dead_directory(path: Path) -> Iterator[str]:
    """A directory in a file system that takes a request and never answers: whoever enters it
    hangs where KILL does not reach, until the end of this, once the request is ``taken``."""
    path.mkdir()
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(path)], stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        if not server.stdout.readline():
            pytest.skip("only root, with /dev/fuse, can mount a file system that hangs")
        try:
            yield str(path / "anything")
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(path), 2)  # lazily: what hangs there uses it
    finally:
        server.kill()  # whoever hangs there gets an error
        server.communicate()


def taken(inside: str) -> bool:
    """Whether a request for what is in a dead directory was. Before that KILL ends who waits."""
    return Path(f"{Path(inside).parent}.taken").exists()


_UNSHARE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
new_namespace, recursively_private = 0x20000, 0x44000
if libc.unshare(new_namespace) or libc.mount(None, b"/", None, recursively_private, None):
    sys.exit("no right to make a mount namespace")
os.execvp(sys.argv[1], sys.argv[1:])
"""
#: What to run a command by that is to have mounts of its own, of which nobody else knows.
OWN_MOUNTS = [sys.executable, "-c", _UNSHARE]
_MOUNT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
_, pid, what, where = map(os.fsencode, sys.argv)
assert libc.setns(os.open(b"/proc/%b/ns/mnt" % pid, os.O_RDONLY), 0x20000) == 0
bind, detach = 0x1000, 2
result = libc.mount(what, where, None, bind, None) if what else libc.umount2(where, detach)
sys.exit(os.strerror(ctypes.get_errno()) if result else 0)
"""


@contextlib.contextmanager
def hanging_environment(seen_by: int, pid: int, folder: Path) -> Iterator[None]:
    """Whoever shares the mounts of process ``seen_by``, which has its own, and opens the
    environment of ``pid`` waits until the end of this. KILL reaches who waits."""
    pipe, file = folder / "nobody-writes", f"/proc/{pid}/environ"
    os.mkfifo(pipe)
    subprocess.run([sys.executable, "-c", _MOUNT, str(seen_by), str(pipe), file], check=True)
    try:
        yield
    finally:
        subprocess.run([sys.executable, "-c", _MOUNT, str(seen_by), "", file], check=True)
