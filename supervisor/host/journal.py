"""The journal's own protocol: one datagram an entry, fields instead of a line.

``KEY=value`` and a newline; a value with newlines in it is ``KEY``, newline, its length as
64 bits, little-endian, the value, newline. What no datagram holds goes in a sealed memfd.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping

ADDRESS = "/run/systemd/journal/socket"
_LENGTH = struct.Struct("<Q")
_BUFFER = 8 << 20


def stderr_is_journal(env: Mapping[str, str] = os.environ) -> bool:
    """Whether stderr is the stream that $JOURNAL_STREAM names, not one that it was
    redirected to since."""
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return env.get("JOURNAL_STREAM", "") == f"{stat.st_dev}:{stat.st_ino}"


def encode(fields: Mapping[str, str]) -> bytes:
    """The entry. Keys are [A-Z_0-9]+."""
    parts = []
    for key, text in fields.items():
        value = text.encode("utf-8", "backslashreplace")
        name = key.encode("ascii")
        if b"\n" in value:
            parts.append(name + b"\n" + _LENGTH.pack(len(value)) + value + b"\n")
        else:
            parts.append(name + b"=" + value + b"\n")
    return b"".join(parts)


class Journal:
    """Where entries go. Never waits: a journal that does not read loses entries, and the
    first that it takes again says how many."""

    def __init__(self, address: str = ADDRESS) -> None:
        self._address = address
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

    def close(self) -> None:
        self._socket.close()

    def send(self, fields: Mapping[str, str]) -> None:
        """Raises OSError when there is no journal."""
        if self._lost:
            fields = {**fields, "RUNCTL_LOST": str(self._lost)}
        data = encode(fields)
        try:
            self._socket.sendto(data, self._address)
        except BlockingIOError:
            self._lost += 1
            return
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS) or sys.platform != "linux":
                raise
            try:
                self._send_file(data)
            except BlockingIOError:
                self._lost += 1
                return
        self._lost = 0

    def _send_file(self, data: bytes) -> None:
        fd = os.memfd_create("runctl-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._socket.sendmsg([], rights, 0, self._address)
        finally:
            os.close(fd)
