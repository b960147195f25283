"""The hand-over: a new daemon asks the keeper of one that is gone for what still runs."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .keeper_door import PROTOCOL, SOCKET_FILE
from .keeper_messages import encode, take_messages
from .message_socket import MOST_FDS, close_all, make_rights, read_peer, read_rights
from .terminal_size import Clients

#: For one answer of the keeper, seconds.
ANSWER = 10.0
#: Descriptors that a daemon needs besides those of what it takes over, and for each tree of that.
SPARE, EACH = 64, 2
NO_ROOM = "there are no file descriptors left; raise runctld's limit of them"
#: The keeper has not heard of the end of its daemon yet: asked again so often, seconds.
BUSY_PAUSE, BUSY_PATIENCE = 0.005, 2.0


class About(msgspec.Struct, frozen=True):
    """What the next daemon is told of a tree. ``kind``: "run", "hook", "server" or "gateway". Of a
    run: which attempt it is, when it began (Unix seconds), what its command is called in words, its
    grace in seconds, and whether what it leaves behind is kept; ``adopted``: when daemons took it
    over (Unix seconds), and how many bytes of output there were then; ``calm_since``: which of
    these, the later ones, were not on purpose; ``clients``: whose terminals its own is like."""

    kind: str
    run: str = ""
    attempt: int = 0
    began: float = 0.0
    command: str = ""
    grace: float = 0.0
    keep: bool = False
    adopted: list[tuple[float, int]] = []
    calm_since: float = 0.0
    clients: Clients = []


@dataclass(slots=True)
class Found:
    """A tree that outlived its daemon. ``status``: how its root ended, None while it runs.
    ``cut``: the daemon had it ended, and its root had not ended by itself before. ``kept``: only
    what its root left behind is there, which goes on. ``fds``: what was kept of it, by name; ours
    to close."""

    number: int
    pid: int
    mark: str
    status: int | None
    starved: str
    cut: bool
    kept: bool
    about: About | None
    fds: dict[str, int] = field(default_factory=dict)

    def take_files(self) -> dict[str, int]:
        """``fds``, which are the caller's to close from here on."""
        taken, self.fds = self.fds, {}
        return taken


@dataclass(slots=True)
class Visit:
    """A keeper that was found alive: its process id, the version of the daemon that started it,
    our connection to it, the number of the last message that it had, what the paths of its runs'
    cgroups begin with, whether the daemon before us left it on purpose, its trees, and what it has
    said behind them."""

    pid: int
    version: str
    sock: socket.socket
    last: int
    groups: str
    left: bool
    trees: list[Found]
    rest: bytes

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it is worth to be adopted."""
        return not any(tree.kept or (tree.about and tree.about.run) for tree in self.trees)

    def dismiss(self) -> None:
        """Have it end all, and let go of it."""
        with contextlib.suppress(OSError):
            self.sock.sendall(encode({"op": "bye"}))
        self.close()

    def close(self) -> None:
        self.sock.close()
        for tree in self.trees:
            close_all(tree.fds.values())


class Refused(Exception):
    """The keeper cannot hand over what it has, and ends all, is killed, or is to be; in words."""


class _Busy(Exception):
    """The keeper says that its daemon is there."""


class _BrokenOff(Exception):
    """Nothing more is heard of the keeper: it was busy, or its time was over."""


def visit_keeper(state: Path, lock: int, outlive: float) -> Visit | None:
    """Take what the keeper of the state directory has, for which ``lock`` is held. None when there
    is none, or when it had to end all since nothing may ``outlive`` a daemon. Blocking, for
    ``ANSWER`` seconds at most.

    Raises: Refused; OSError, when it breaks off, or there is no descriptor left: then nothing has
    changed, and another daemon can take all."""
    deadline = time.monotonic() + BUSY_PATIENCE
    while True:
        sock = _connect(state)
        if sock is None:
            return None
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            try:
                if outlive <= 0:
                    with contextlib.suppress(BrokenPipeError):  # it says why
                        _send(sock, {"op": "bye"}, [lock])
                    _wait_for_end(sock)
                    return None
                visit = _greet(sock, lock, outlive)
                stack.pop_all()
                return visit
            except TimeoutError:
                _kill(sock)
                raise Refused("its keeper does not answer, and was killed") from None
            except _Busy:
                if time.monotonic() > deadline:
                    # We have the lock that its daemon had. It is left to the sweep, which ends it
                    # with all below it: what has neither mark nor session is only known by that.
                    raise Refused("its keeper serves a daemon that has lost the lock") from None
            except _BrokenOff:
                if time.monotonic() > deadline:
                    raise OSError("its keeper broke off") from None
        time.sleep(BUSY_PAUSE)


def _wait_for_end(sock: socket.socket) -> None:
    """Whoever is busy says so, and is asked again. Raises _Busy."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            said += data
    if said:
        raise _Busy


def _kill(sock: socket.socket) -> None:
    """Whoever listens at the other end; what it has ends with it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(read_peer(sock)[0], signal.SIGKILL)


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


def _greet(sock: socket.socket, lock: int, outlive: float) -> Visit:
    """Raises _Busy, _BrokenOff, Refused, OSError."""
    reader = _Reader(sock)
    try:
        with contextlib.suppress(BrokenPipeError):  # it says why
            _send(sock, {"op": "hello", "protocol": PROTOCOL, "pid": os.getpid()}, [lock])
        greeting = reader.read()[0]
        if (refused := greeting.get("refused")) is not None:
            if refused == "busy":
                raise _Busy
            _send(sock, {"op": "bye"}, [lock])
            raise Refused(f"its keeper, of another version, says {refused!r}, and ends it")
        trees = []
        for _ in range(greeting["trees"]):
            message, fds = reader.read()
            about = message["about"] and msgspec.convert(message["about"], About, strict=False)
            trees.append(
                Found(
                    *(message["tree"], message["root"], message["mark"], message["status"]),
                    *(message["starved"], message["cut"], message["kept"], about),
                    dict(zip(message["names"], fds, strict=True)),
                )
            )
        _check_room(SPARE + len(trees) * EACH)
        sock.sendall(encode({"op": "taken", "outlive": outlive}))
    except ConnectionError as error:  # it was busy, or its time was over
        reader.close()
        raise _BrokenOff from error
    except BaseException:
        reader.close()
        raise
    return Visit(
        greeting["pid"],
        greeting.get("version", ""),
        sock,
        greeting["last"],
        greeting["groups"],
        greeting["left"],
        trees,
        reader.rest,
    )


def _check_room(count: int) -> None:
    """Raises OSError, unless we may open ``count`` files more."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise OSError(NO_ROOM) from None
    finally:
        close_all(opened)


def _send(sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    data = encode({**message, "fds": len(fds)})
    sent = sock.sendmsg([data], make_rights(fds))
    sock.sendall(data[sent:])


class _Reader:
    """Messages, one by one, and the descriptors that came with each. ``rest``: what came behind
    those that were read. ``close`` gives all descriptors back."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._sets: list[list[int]] = []
        self._given: list[int] = []

    @property
    def rest(self) -> bytes:
        return bytes(self._buffer)

    def read(self) -> tuple[dict[str, Any], list[int]]:
        """Raises OSError."""
        while not (messages := take_messages(self._buffer, 1)):
            data, ancillary, flags, _ = self._sock.recvmsg(
                1 << 16, socket.CMSG_SPACE(MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
            fds = read_rights(ancillary)
            self._given += fds
            if flags & socket.MSG_CTRUNC:
                raise OSError(NO_ROOM)
            if fds:
                self._sets.append(fds)
            if not data:
                raise ConnectionResetError
            self._buffer += data
        message = messages[0]
        fds_of = self._sets.pop(0) if message.get("fds") and self._sets else []
        if len(fds_of) != message.get("fds", 0):
            raise OSError("descriptors were lost on the way from the process keeper")
        return message, fds_of

    def close(self) -> None:
        close_all(self._given)
        self._given.clear()
