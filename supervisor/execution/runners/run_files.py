"""What a run has beside it: the socket on which it speaks to us, and, when it was interrupted,
files about its last attempt. Their names stay the same while daemons come and go."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ....config.schema import Account

log = logging.getLogger("runctld.command")

#: The longest path of a Unix socket is 107 bytes on Linux, and 103 on macOS.
LONGEST = 103
#: Of a file, and the slash before it.
LONGEST_NAME = 1 + 12 + len(".socket")
SOCKET, CHECKPOINT, OUTPUT = "socket", "checkpoint", "output"
#: Where runs of other users find their files; ours are closed to them.
FOR_OTHERS = Path("/run/runctl")
BACKLOG = 16


class RunFiles:
    """Of all runs of the daemon with this ``state`` directory. Methods are blocking, briefly."""

    def __init__(self, state: Path) -> None:
        name = hashlib.sha256(os.fsencode(state)).hexdigest()[:8]
        own = state / "run"
        if len(os.fsencode(own)) + LONGEST_NAME > LONGEST:
            own = Path("/tmp", f"runctl-{os.geteuid()}", name)
        self._folders = {False: own, True: FOR_OTHERS / name}

    def path(self, run: str, kind: str, account: Account | None) -> Path:
        name = hashlib.sha256(run.encode()).hexdigest()[:12]
        return self._folders[account is not None] / f"{name}.{kind}"

    def listen(self, run: str, account: Account | None) -> socket.socket | None:
        """A listening socket at its path, in place of one that may be there; None, with a word
        in the log, where there can be none. Raises OSError, when there is no descriptor left."""
        path = self.path(run, SOCKET, account)
        new = path.with_suffix(".new")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._make_folder(path.parent)
            new.unlink(missing_ok=True)
            listener.bind(os.fspath(new))
            self._give(new, account)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            new.replace(path)
        except OSError as error:
            listener.close()
            log.warning("there is no RUNCTL_SOCKET: %s: %s", path, error.strerror or error)
            return None
        return listener

    def create(self, run: str, kind: str, account: Account | None) -> BinaryIO:
        """A new file of that kind, 0600. Raises OSError."""
        path = self.path(run, kind, account)
        self._make_folder(path.parent)
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._give(path, account)
            return open(fd, "wb")  # the caller's
        except BaseException:
            os.close(fd)
            raise

    def remove(self, run: str) -> None:
        """All of the run's."""
        name = hashlib.sha256(run.encode()).hexdigest()[:12]
        for folder in self._folders.values():
            for kind in (SOCKET, CHECKPOINT, OUTPUT):
                with suppress(OSError):
                    os.unlink(folder / f"{name}.{kind}")
            if folder.name != "run":  # elsewhere nothing of ours stays
                with suppress(OSError):
                    os.rmdir(folder)

    def sweep(self, runs: Collection[str]) -> None:
        """What an earlier daemon left of others than ``runs``."""
        stay = {hashlib.sha256(run.encode()).hexdigest()[:12] for run in runs}
        for folder in self._folders.values():
            with suppress(OSError):
                for entry in list(os.scandir(folder)):
                    if entry.name.partition(".")[0] not in stay:
                        os.unlink(entry.path)
                if folder.name != "run":
                    os.rmdir(folder)

    def _make_folder(self, folder: Path) -> None:
        """Raises OSError, where somebody else has it."""
        if folder == self._folders[True]:
            _make_ours(folder.parent, 0o711)
            _make_ours(folder, 0o711)
            return
        if folder.name != "run":  # below /tmp
            _make_ours(folder.parent, 0o700)
        _make_ours(folder, 0o700)

    def _give(self, path: Path, account: Account | None) -> None:
        os.chmod(path, 0o600)
        if account is not None:
            os.chown(path, account.uid, account.gid)


def _make_ours(folder: Path, mode: int) -> None:
    folder.mkdir(mode, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EPERM, "it is not ours")
    if stat.S_IMODE(found.st_mode) != mode:
        os.chmod(folder, mode)
