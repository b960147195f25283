"""One live daemon per state directory: its lock, and the executor ID that is kept in it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...config.schema import MAX_ID_BYTES, Config, ConfigError
from ...protocol.endpoint import LOCK_FILE
from ...protocol.errors import LeaseHeld, LeaseLost
from ..host.private_files import write_private

log = logging.getLogger("runctld.lease")


def executor_id(config: Config) -> str:
    """The configured ID, or one generated once and kept in the state directory. A new one is
    made where none can be read: the directory's lock, not the ID, says whose runs are in it."""
    if config.executor_id:
        return config.executor_id
    path = config.state_dir / "executor-id"
    try:
        kept = path.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        kept = ""
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; let runctld's user read it, or remove it"
        ) from None
    if kept and kept.isprintable() and "\ufffd" not in kept and len(kept.encode()) <= MAX_ID_BYTES:
        return kept
    if kept:
        log.warning("%s does not hold an executor ID; a new one is made", path)
    made = f"{socket.gethostname().split('.')[0][:40] or 'local'}-{uuid.uuid4().hex[:8]}"
    write_private(path, f"{made}\n".encode())
    return made


def home_of(state_dir: Path) -> str:
    """A name of this state directory that no other has, nor a copy of it."""
    path = state_dir / "home"
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = uuid.uuid4().hex
        write_private(path, f"{kept}\n".encode())
    return f"{kept}-{path.stat().st_ino:x}"


class FileLease:
    """The lock of a state directory, held through ``fd``."""

    def __init__(self, fd: int, path: Path, executor: str) -> None:
        self.fd = fd
        self._path = path
        self._executor = executor
        self.expected = False

    def stay_expected(self) -> None:
        """Another daemon is to come: its clients wait for it."""
        self.expected = True

    def check(self) -> None:
        """See that the lock is still ours, and the file still where others look for it.
        Costs microseconds; may be called from any thread.

        Raises LeaseLost. What cannot be looked at for the moment is not lost."""
        try:
            there = os.stat(self._path)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # changes nothing if it is ours
            if os.path.samestat(there, os.fstat(self.fd)):
                return
            how = f"{self._path} is another file now{self._holder()}"
        except BlockingIOError:
            how = f"{self._path} was unlocked, and is locked by another process{self._holder()}"
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return
            how = f"{self._path} was removed"
        raise LeaseLost(
            f"the lease of executor ID {self._executor!r} is lost: {how}. All runs were stopped,"
            " and are replayed by whoever holds it; restart runctld if nobody does"
        )

    def _holder(self) -> str:
        try:
            holder = _first_line(self._path.read_bytes())
        except OSError:
            holder = ""
        return f" ({holder})" if holder else ""


@contextmanager
def hold_file_lease(state_dir: Path, executor: str) -> Iterator[FileLease]:
    """Hold the state directory's lock. Who leaves without an error stops in order: clients do
    not wait for the next one. Raises LeaseHeld, naming the holder."""
    path = state_dir / LOCK_FILE
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            lease = FileLease(fd, path, executor)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _first_line(os.read(fd, 4096))
                raise LeaseHeld(
                    f"already running{holder and f': {holder}'} (state_dir {state_dir});"
                    " stop that one, or give this one its own state_dir and executor_id"
                ) from None
            try:
                lease.check()
            except LeaseLost:  # the file was replaced between the two calls
                continue
            # Never empty meanwhile: that says that the daemon before us has stopped in order.
            said = f"executor {executor!r}, pid {os.getpid()}\n".encode()
            os.pwrite(fd, said, 0)
            os.ftruncate(fd, len(said))
            yield lease
            if not lease.expected:
                os.ftruncate(fd, 0)
            return
        finally:
            os.close(fd)


def _first_line(text: bytes) -> str:
    return text[:4096].decode(errors="replace").strip().partition("\n")[0]
