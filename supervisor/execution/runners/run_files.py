"""What a run has beside it: the socket on which it speaks to us, and, when it was interrupted,
files about its last attempt. Their names stay the same while daemons come and go.

They belong to whom the run belongs to. In a daemon that is not root we may act as another user,
but give nothing away: what is another user's is made as that user, where that user may.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import stat
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from ....config.schema import Account
from ...processes.credentials import acting_as

log = logging.getLogger("runctld.command")

#: The longest path of a Unix socket is 107 bytes on Linux, and 103 on macOS.
LONGEST = 103
#: Of a file, and the slash before it.
LONGEST_NAME = 1 + 12 + len(".socket")
SOCKET, CHECKPOINT, OUTPUT = "socket", "checkpoint", "output"
BACKLOG = 16


class RunFiles:
    """Of all runs of the daemon with this ``state`` directory. Methods are blocking, briefly."""

    def __init__(self, state: Path) -> None:
        self._name = hashlib.sha256(os.fsencode(state)).hexdigest()[:8]
        self._own = state / "run"
        if len(os.fsencode(self._own)) + LONGEST_NAME > LONGEST:
            self._own = self._elsewhere(os.geteuid())

    def path(self, run: str, kind: str, account: Account | None) -> Path:
        return self._folder(account) / f"{_name_of(run)}.{kind}"

    def listen(self, run: str, account: Account | None) -> socket.socket | None:
        """A listening socket at its path, in place of one that may be there; None, with a word
        in the log, where there can be none."""
        path = self.path(run, SOCKET, account)
        new = path.with_suffix(".new")
        listener = None
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with _as_owner(account):
                self._make_folder(account)
                new.unlink(missing_ok=True)
                listener.bind(os.fspath(new))
                os.chmod(new, 0o600)
                listener.listen(BACKLOG)
                new.replace(path)
        except OSError as error:
            if listener is not None:
                listener.close()
            log.warning("there is no RUNCTL_SOCKET: %s: %s", path, error.strerror or error)
            return None
        listener.setblocking(False)
        return listener

    def create(self, run: str, kind: str, account: Account | None) -> BinaryIO:
        """A new file of that kind, 0600. Raises OSError."""
        path = self.path(run, kind, account)
        with _as_owner(account):
            self._make_folder(account)
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return open(fd, "wb")  # the caller's

    def remove(self, run: str, account: Account | None) -> None:
        """All of the run's."""
        folder, name = self._folder(account), _name_of(run)
        with _as_owner(account):
            for kind in (SOCKET, CHECKPOINT, OUTPUT):
                with suppress(OSError):
                    os.unlink(folder / f"{name}.{kind}")
            self._leave(folder)

    def sweep(self, runs: Collection[str]) -> None:
        """What an earlier daemon left of others than ``runs``, of our own user."""
        stay = {_name_of(run) for run in runs}
        with suppress(OSError):
            for entry in list(os.scandir(self._own)):
                if entry.name.partition(".")[0] not in stay:
                    os.unlink(entry.path)
        self._leave(self._own)

    def _folder(self, account: Account | None) -> Path:
        return self._own if account is None else self._elsewhere(account.uid)

    def _elsewhere(self, uid: int) -> Path:
        return Path("/tmp", f"runctl-{uid}", self._name)

    def _make_folder(self, account: Account | None) -> None:
        """Raises OSError, where somebody else has it."""
        uid = os.geteuid() if account is None else account.uid
        folder = self._folder(account)
        if folder == self._elsewhere(uid):
            _make_private(folder.parent, uid)
        _make_private(folder, uid)

    def _leave(self, folder: Path) -> None:
        """Nothing of ours stays elsewhere longer than it is of use."""
        if folder.name == self._name:
            for path in (folder, folder.parent):
                with suppress(OSError):
                    os.rmdir(path)


def _name_of(run: str) -> str:
    return hashlib.sha256(run.encode()).hexdigest()[:12]


def _as_owner(account: Account | None) -> AbstractContextManager[None]:
    return nullcontext() if account is None else acting_as(account.uid, account.gid)


def _make_private(folder: Path, uid: int) -> None:
    folder.mkdir(0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != uid or not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EPERM, "it is somebody else's")
    if stat.S_IMODE(found.st_mode) != 0o700:
        os.chmod(folder, 0o700)
