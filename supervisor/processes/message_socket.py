"""The keeper's end of a connection to a daemon: messages, and descriptors beside them. Nothing in
it waits. Standard library only: the keeper imports it.
"""

import array
import errno
import os
import select
import selectors
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from .keeper_messages import encode, take_messages

#: Descriptors that come with one message, at most.
MOST_FDS = 16
#: Before descriptors are sent again for which too many were under way, seconds.
TOO_MANY = 0.005

_CREDENTIALS = struct.Struct("3i")  # process, user, group: socket(7)

#: A message, and the descriptors that came with it: whoever takes it closes them.
Received = tuple[dict[str, Any], list[int]]
#: What goes beside the bytes of a message, and what comes beside them: level, kind, body.
Sent = list[tuple[int, int, "array.array[int]"]]
Ancillary = list[tuple[int, int, bytes]]


class MessageSocket:
    """Registered with ``selector`` for what it waits for, with itself as data. ``again``: whether
    ``flush`` is to be called again in a moment, of which no event tells. ``most``: so many bytes
    may be said there, and one set of descriptors; 0 for any. Whoever says more, or what is no
    message, counts as gone.

    That somebody is gone is heard by ``receive``, once all that they have said is read, and by
    nothing else: what is sent to them before is lost."""

    def __init__(
        self, sock: socket.socket, selector: selectors.BaseSelector, most: int = 0
    ) -> None:
        sock.setblocking(False)
        self._most = most
        self.sock = sock
        self.again = False
        self._selector = selector
        self._buffer = bytearray()
        self._fds: deque[list[int]] = deque()  # what came beside messages, in their order
        #: What has not been taken yet, each with the descriptors that go with its first byte.
        self._out: deque[tuple[bytearray, Sequence[int]]] = deque()
        selector.register(sock, selectors.EVENT_READ, self)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        if fds:
            message = {**message, "fds": len(fds)}
        data = encode(message)
        if self._out and not fds and not self._out[-1][1]:
            self._out[-1][0].extend(data)
        else:
            self._out.append((bytearray(data), fds))
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes. Who is to read may be stopped: the rest waits."""
        self.again = False
        try:
            while self._out:
                data, fds = self._out[0]
                del data[: self.sock.sendmsg([data], make_rights(fds))]
                self._out.popleft()
                if data:
                    self._out.appendleft((data, ()))
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                self.again = True
            else:  # nobody takes anything any more
                self._out.clear()
        waits = bool(self._out) and not self.again
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if waits else 0)
        if self._selector.get_key(self.sock).events != events:
            self._selector.modify(self.sock, events, self)

    def receive(self) -> list[Received]:
        """What has come. Raises EOFError, when there is nothing left and never will be."""
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(1 << 20, socket.CMSG_SPACE(MOST_FDS * 4))
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError from error
        # The kernel ends a receive at the first bytes that carry descriptors: one set at most.
        fds = read_rights(ancillary)
        if fds or flags & socket.MSG_CTRUNC:  # truncated: we had no room for all of them
            self._fds.append(fds)
        if not data:
            raise EOFError
        self._buffer += data
        if self._most and (len(self._buffer) > self._most or len(self._fds) > 1):
            raise EOFError
        try:
            messages = take_messages(self._buffer)
        except (ValueError, RecursionError) as error:
            raise EOFError from error
        if not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return [(x, self._take_fds(x)) for x in messages]

    def trust(self) -> None:
        """From here on what is said there has no bound."""
        self._most = 0

    def _take_fds(self, message: dict[str, Any]) -> list[int]:
        return self._fds.popleft() if message.get("fds") and self._fds else []

    def is_hung_up(self) -> bool:
        """Whether the daemon is gone, also while what it has sent is not read yet."""
        poll = select.poll()
        poll.register(self.sock, 0)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._selector.unregister(self.sock)
        self.sock.close()
        for fds in self._fds:
            close_all(fds)
        self._fds.clear()


def make_rights(fds: Sequence[int]) -> Sent:
    """What ``sendmsg`` takes to send copies of ``fds``."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def read_rights(ancillary: Ancillary) -> list[int]:
    """The descriptors that came with a ``recvmsg``: whoever asks closes them."""
    fds = array.array("i")
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return list(fds)


def read_peer(sock: socket.socket) -> tuple[int, int]:
    """Process id and user id of who is at the other end."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(credentials)
    return pid, user


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
