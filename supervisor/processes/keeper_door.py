"""Where the next daemon comes in, to take over what the one before has left running. Standard
library only: the keeper imports it.

Who comes says so with ``hello``, and shows that it is the daemon of this state directory: its
descriptor of the locked file comes with it. Nothing here waits: whoever is silent is sent away.
"""

import contextlib
import errno
import fcntl
import math
import os
import selectors
import socket
import time
from typing import Any

from .message_socket import MessageSocket, close_all, read_peer
from .trees import Tree

#: Of the messages that a daemon and a keeper of another version tell each other; ``hello``, its
#: answer and ``bye`` stay as they are for ever.
PROTOCOL = 2
SOCKET_FILE = "keeper.sock"
LOCK_FILE = "lock"
#: Without a descriptor for who knocks we listen again after so many seconds.
PAUSE = 0.1
#: So long one who came may be silent, seconds; so many may be there at once, and so much may they
#: say, bytes.
PATIENCE, MOST_GUESTS, MOST_SAID = 2.0, 16, 4096


class Door:
    """Of the keeper of ``state``. ``selector`` tells of those who come: ``knock`` and ``hear`` are
    for its events."""

    def __init__(self, state: str, selector: selectors.BaseSelector) -> None:
        """Raises OSError."""
        self._state = state
        self._selector = selector
        #: Until when each may be silent.
        self._guests: dict[MessageSocket, float] = {}
        #: While we have no descriptor for who knocks: when to listen again.
        self._again = math.inf
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
        self._listener.listen(MOST_GUESTS)
        selector.register(self._listener, selectors.EVENT_READ, self)

    def next_deadline(self) -> float:
        """When to call ``keep_time``."""
        return min(self._again, *self._guests.values(), math.inf)

    def knock(self, *, occupied: bool) -> None:
        """Somebody comes. ``occupied``: there is a daemon already, as far as we know."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                self._selector.unregister(self._listener)
                self._again = time.monotonic() + PAUSE
            return
        sock.setblocking(False)
        if read_peer(sock)[1] != os.geteuid():
            sock.close()
            return
        guest = MessageSocket(sock, self._selector, MOST_SAID)
        self._guests[guest] = time.monotonic() + PATIENCE
        if occupied:
            self._refuse(guest, "busy")
        elif len(self._guests) > MOST_GUESTS:
            self._send_away(next(iter(self._guests)))

    def hear(self, guest: object) -> tuple[MessageSocket, dict[str, Any]] | None:
        """The connection of the daemon that has come, which is the caller's from now on, and its
        ``hello`` or ``bye``; None as long as there is none. ``guest``: of whom there is an
        event."""
        if not isinstance(guest, MessageSocket) or guest not in self._guests:
            return None  # sent away since
        try:
            received = guest.receive()
        except EOFError:
            self._send_away(guest)
            return None
        come = None
        for message, fds in received:
            try:
                known = message.get("op") in ("hello", "bye") and self._is_ours(fds)
            finally:
                close_all(fds)
            if come is not None or not known:
                self._refuse(guest, "stranger")
                return None
            if message["op"] == "bye" or message.get("protocol") == PROTOCOL:
                come = guest, message
            else:  # it may say "bye"
                guest.send({"protocol": PROTOCOL, "pid": os.getpid(), "refused": "protocol"})
        if come is not None:
            del self._guests[guest]
            guest.trust()
        return come

    def keep_time(self) -> None:
        """Send those away who have said nothing for too long; listen again."""
        now = time.monotonic()
        if now >= self._again:
            self._again = math.inf
            self._selector.register(self._listener, selectors.EVENT_READ, self)
        for guest in [guest for guest, end in self._guests.items() if now >= end]:
            self._send_away(guest)

    def send_all_away(self) -> None:
        """A daemon has come."""
        for guest in list(self._guests):
            self._refuse(guest, "busy")

    def _refuse(self, guest: MessageSocket, why: str) -> None:
        guest.send({"protocol": PROTOCOL, "pid": os.getpid(), "refused": why})
        self._send_away(guest)

    def _send_away(self, guest: MessageSocket) -> None:
        del self._guests[guest]
        guest.close()

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
        for guest in list(self._guests):
            self._send_away(guest)
        if self._again == math.inf:
            self._selector.unregister(self._listener)
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._state, SOCKET_FILE))


def offer_trees(guest: MessageSocket, greeting: dict[str, Any], trees: list[Tree]) -> None:
    """Show the daemon that has come what is here; ``greeting`` goes before."""
    guest.send(greeting)
    for tree in trees:
        what = {
            "tree": tree.number,
            "root": tree.pid,
            "mark": tree.mark.partition(b"=")[2].decode(errors="surrogateescape"),
            "status": tree.status,
            "starved": tree.starved,
            "cut": tree.cut,
            "kept": tree.kept,
            "names": list(tree.files),
            "about": tree.about,
        }
        guest.send(what, list(tree.files.values()))
