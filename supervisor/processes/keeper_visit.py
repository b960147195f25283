"""The hand-over: a new daemon asks the keeper of one that is gone for what still runs."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .keeper_door import PROTOCOL, SOCKET_FILE
from .keeper_messages import encode, take_messages
from .message_socket import MOST_FDS
from .terminal_size import Clients

#: For one answer of the keeper, seconds.
ANSWER = 10.0
#: The keeper has not heard of the end of its daemon yet: asked again so often, seconds.
BUSY_PAUSE, BUSY_PATIENCE = 0.005, 2.0


class About(msgspec.Struct, frozen=True):
    """What the next daemon is told of a tree. ``kind``: "run", "hook" or "server". Of a run:
    which attempt it is, when it began (Unix seconds), what its command is called in words, its
    grace in seconds, and whether what it leaves behind is kept; ``adopted``: when daemons took it
    over (Unix seconds), and how many bytes of output there were then; ``clients``: whose terminals
    its own is like."""

    kind: str
    run: str = ""
    attempt: int = 0
    began: float = 0.0
    command: str = ""
    grace: float = 0.0
    keep: bool = False
    adopted: list[tuple[float, int]] = []
    clients: Clients = []


@dataclass(slots=True)
class Found:
    """A tree that outlived its daemon. ``status``: how its root ended, None while it runs.
    ``cut``: the daemon had it ended, and its root had not ended by itself before.
    ``fds``: what was kept of it, by name; ours to close."""

    number: int
    pid: int
    mark: str
    status: int | None
    starved: str
    cut: bool
    about: About | None
    fds: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Visit:
    """A keeper that was found alive: its process id, the version of the daemon that started it,
    our connection to it, the number of the last message that it had, what the paths of its runs'
    cgroups begin with, and its trees."""

    pid: int
    version: str
    sock: socket.socket
    last: int
    groups: str
    trees: list[Found]

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it is worth to be adopted."""
        # What has no story and has ended left something behind that was to be kept.
        kept = any(tree.about is None and tree.status is not None for tree in self.trees)
        return not kept and not any(tree.about and tree.about.run for tree in self.trees)

    def dismiss(self) -> None:
        """Have it end all, and let go of it."""
        with contextlib.suppress(OSError):
            self.sock.sendall(encode({"op": "bye"}))
        self.close()

    def close(self) -> None:
        self.sock.close()
        for tree in self.trees:
            for fd in tree.fds.values():
                os.close(fd)


class Refused(Exception):
    """The keeper does not speak our protocol; it was told to end all."""


def visit_keeper(state: Path, lock: int, outlive: float) -> Visit | None:
    """Take what the keeper of the state directory has, for which ``lock`` is held. None when there
    is none. Blocking, for ``ANSWER`` seconds at most.

    Raises: Refused; OSError, when it breaks off, or there is no descriptor left: then nothing has
    changed, and another daemon can take all."""
    deadline = time.monotonic() + BUSY_PATIENCE
    while True:
        sock = _connect(state)
        if sock is None:
            return None
        try:
            visit = _greet(sock, lock, outlive)
        except BaseException:
            sock.close()
            raise
        if visit is not None:
            return visit
        sock.close()
        if time.monotonic() > deadline:
            raise OSError("the process keeper of an earlier daemon serves another one")
        time.sleep(BUSY_PAUSE)


def _connect(state: Path) -> socket.socket | None:
    """None when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(ANSWER)
    # The path of a socket has 107 bytes, and that of a state directory more.
    folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{SOCKET_FILE}")
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(folder)
    return sock


def _greet(sock: socket.socket, lock: int, outlive: float) -> Visit | None:
    """None when it is busy."""
    _send(sock, {"op": "hello", "protocol": PROTOCOL, "pid": os.getpid()}, [lock])
    reader = _Reader(sock)
    try:
        greeting = reader.read()[0]
        refused = greeting.get("refused")
        if refused == "busy":
            return None
        if refused is not None:
            _send(sock, {"op": "bye"}, [lock])
            raise Refused(str(refused))
        trees = []
        for _ in range(greeting["trees"]):
            message, fds = reader.read()
            about = message["about"] and msgspec.convert(message["about"], About, strict=False)
            trees.append(
                Found(
                    *(message["tree"], message["root"], message["mark"], message["status"]),
                    *(message["starved"], message["cut"], about),
                    dict(zip(message["names"], fds, strict=True)),
                )
            )
    except BaseException:
        reader.close()
        raise
    reader.release()
    sock.sendall(encode({"op": "taken", "outlive": outlive}))
    return Visit(
        greeting["pid"],
        greeting.get("version", ""),
        sock,
        greeting["last"],
        greeting["groups"],
        trees,
    )


def _send(sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    data = encode({**message, "fds": len(fds)})
    sent = sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    sock.sendall(data[sent:])


class _Reader:
    """Messages, one by one, and the descriptors that came with each. ``close`` gives all of
    these back."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._messages: list[dict[str, Any]] = []
        self._sets: list[list[int]] = []
        self._given: list[int] = []

    def read(self) -> tuple[dict[str, Any], list[int]]:
        """Raises OSError."""
        while not self._messages:
            data, ancillary, flags, _ = self._sock.recvmsg(
                1 << 16, socket.CMSG_SPACE(MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
            fds = array.array("i")
            for level, kind, body in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
            self._given += fds
            if flags & socket.MSG_CTRUNC:
                raise OSError("there are no file descriptors left; raise runctld's limit of them")
            if fds:
                self._sets.append(list(fds))
            if not data:
                raise OSError("the process keeper of an earlier daemon broke off")
            self._buffer += data
            self._messages += take_messages(self._buffer)
        message = self._messages.pop(0)
        fds_of = self._sets.pop(0) if message.get("fds") and self._sets else []
        if len(fds_of) != message.get("fds", 0):
            raise OSError("descriptors were lost on the way from the process keeper")
        return message, fds_of

    def release(self) -> None:
        """What came is somebody else's."""
        self._given.clear()

    def close(self) -> None:
        for fd in self._given:
            os.close(fd)
        self._given.clear()
