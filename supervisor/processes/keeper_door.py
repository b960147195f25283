"""Where the next daemon comes in, to take over what the one before has left running. Standard
library only: the keeper imports it.

Who comes says so with ``hello``, and shows that it is the daemon of this state directory: its
descriptor of the locked file comes with it. Nothing here waits: whoever is silent is sent away.
"""

import contextlib
import fcntl
import math
import os
import selectors
import socket
import struct
import time
from typing import Any

from .message_socket import MessageSocket

#: Of the messages that a daemon and a keeper of another version tell each other; ``hello``, its
#: answer and ``bye`` stay as they are for ever.
PROTOCOL = 2
SOCKET_FILE = "keeper.sock"
LOCK_FILE = "lock"
#: So long one who came may be silent, seconds.
PATIENCE = 2.0


class Door:
    """Of the keeper of ``state``. ``selector`` tells of those who come: ``knock`` and ``hear`` are
    for its events."""

    def __init__(self, state: str, selector: selectors.BaseSelector) -> None:
        """Raises OSError."""
        self._state = state
        self._selector = selector
        self._guest: MessageSocket | None = None
        self._deadline = math.inf
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        # The path of a socket has 107 bytes, and that of a state directory more.
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        old = os.umask(0o177)
        try:
            os.chdir(state)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET_FILE)
            self._listener.bind(SOCKET_FILE)
        finally:
            os.umask(old)
            os.fchdir(here)
            os.close(here)
        self._listener.listen(8)
        selector.register(self._listener, selectors.EVENT_READ, self)

    def next_deadline(self) -> float:
        """When to call ``send_away``."""
        return self._deadline

    def is_guest(self, who: object) -> bool:
        return who is not None and who is self._guest

    def knock(self, *, occupied: bool) -> None:
        """Somebody comes. ``occupied``: there is a daemon already, as far as we know."""
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if _read_user(sock) != os.geteuid():
            sock.close()
        elif occupied or self._guest is not None:
            guest = MessageSocket(sock, self._selector)
            with contextlib.suppress(EOFError):
                guest.send({"protocol": PROTOCOL, "pid": os.getpid(), "refused": "busy"})
            guest.close()
        else:
            self._guest = MessageSocket(sock, self._selector)
            self._deadline = time.monotonic() + PATIENCE

    def hear(self) -> tuple[MessageSocket, dict[str, Any]] | None:
        """The connection of the daemon that has come, which is the caller's from now on, and its
        ``hello`` or ``bye``; None as long as there is none."""
        guest = self._guest
        assert guest is not None
        try:
            received = guest.receive()
        except EOFError:
            self.send_away()
            return None
        for message, fds in received:
            try:
                known = message.get("op") in ("hello", "bye") and self._is_ours(fds)
            finally:
                for fd in fds:
                    os.close(fd)
            spoken = message["op"] == "bye" or message.get("protocol") == PROTOCOL
            if known and spoken:
                self._guest, self._deadline = None, math.inf
                return guest, message
            refused = "protocol" if known else "stranger"
            with contextlib.suppress(EOFError):
                guest.send({"protocol": PROTOCOL, "pid": os.getpid(), "refused": refused})
            if not known:  # else it may say "bye"
                self.send_away()
                return None
        return None

    def send_away(self) -> None:
        if self._guest is not None:
            self._guest.close()
        self._guest, self._deadline = None, math.inf

    def _is_ours(self, fds: list[int]) -> bool:
        """Whether a descriptor is of the state directory's lock, and holds it. (Ours is closed at
        once, or the lock would outlive the daemon.)"""
        if len(fds) != 1:
            return False
        try:
            there = os.stat(os.path.join(self._state, LOCK_FILE))
            fcntl.flock(fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(there, os.fstat(fds[0]))
        except OSError:
            return False

    def close(self) -> None:
        self.send_away()
        self._selector.unregister(self._listener)
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._state, SOCKET_FILE))


def _read_user(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", credentials)[1]
    return user
