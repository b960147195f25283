"""What is ours alone: files that are closed to others from their first byte, and what commands
inherit of us."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...config.access import strange
from ...config.schema import Account
from ...protocol.errors import ConfigError

log = logging.getLogger("runctld")

UMASK = 0o077
#: What the daemon got from its own supervisor is not a command's business.
_SUPERVISION = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY"),
    *("STATE_DIRECTORY", "JOURNAL_STREAM", "INVOCATION_ID", "SYSTEMD_EXEC_PID"),
    "RUNCTL_DELEGATED",
    # And what a run got of another daemon is not of ours.
    *("RUNCTL_SOCKET", "RUNCTL_RESUME", "RUNCTL_CHECKPOINT_FILE", "RUNCTL_PREVIOUS_OUTPUT"),
)


#: What is in our environment for us may be a secret from another user, and its paths ours.
_FOR_ANYBODY = ("PATH", "LANG", "LANGUAGE", "TZ", "TERM", "COLORTERM", "RUNCTL_CONFIG")


@dataclass(frozen=True, slots=True)
class Inherited:
    """What every command gets of the daemon's: ``env``, its ``umask``, None for ours, and its
    limit of open files, ``files``, None for ours."""

    env: Mapping[str, str]
    umask: int | None = None
    files: int | None = None


def inherited(
    withheld: Collection[str] = (),
    umask: int | None = None,
    source: Path | None = None,
    files: int | None = None,
) -> Inherited:
    """Our environment without ``withheld`` variables. ``source``: our configuration's file,
    a whole path, by which ``runctl`` in a command finds us."""
    hidden = {*_SUPERVISION, *withheld}
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    if source is not None:
        env["RUNCTL_CONFIG"] = str(source)
    return Inherited(env, umask, files)


def env_of(account: Account, env: Mapping[str, str]) -> dict[str, str]:
    """What of ``env``, ours, a command of another user gets, and what says who that is."""
    kept = {k: v for k, v in env.items() if k in _FOR_ANYBODY or k.startswith("LC_")}
    return {
        **kept,
        "HOME": account.home,
        "LOGNAME": account.name,
        "SHELL": account.shell,
        "USER": account.name,
    }


def write_private(path: Path, data: bytes) -> None:
    """Replace ``path`` in one step; 0600 from the first byte. On disk when this returns: a
    power cut leaves the old file or the new one, whole."""
    write_all_private({path: data})


def write_all_private(files: Mapping[Path, bytes]) -> None:
    """The same for files that belong together: where there is no room for all, none is
    replaced."""
    written: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            temporary = path.with_name(path.name + ".new")
            temporary.unlink(missing_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            written[temporary] = path
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
    except BaseException:
        for temporary in written:
            temporary.unlink(missing_ok=True)
        raise
    for temporary, path in written.items():
        temporary.replace(path)
    for folder in {path.parent for path in files}:
        sync_directory(folder)


def sync_directory(path: Path) -> None:
    """See that the names in it are on disk. A file system that cannot is left alone."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def prepare_state_dir(path: Path) -> None:
    """Make it, see that it is ours, and that nobody else may enter it.

    What others may read is closed to them. What they may write could hold anything by now,
    links to files of ours among it: unless empty it is refused. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        link = os.lstat(path)
        if stat.S_ISLNK(link.st_mode) and link.st_uid not in (0, os.getuid()):
            raise ConfigError(
                f"state_dir {path} is a link that user id {link.st_uid} made;"
                " remove it, or choose another state_dir"
            )
        _check_owner(path, os.stat(path).st_uid)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _close_to_others(path, fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(
            f"state_dir {path}: {error.strerror}; choose a directory that this user may write"
        ) from None
    for said, fix in strange(path, os.getuid()):
        raise ConfigError(f"state_dir {path}: {said}; {fix}")
    try:
        probe = path / f".probe-{os.getpid()}"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"state_dir {path} is not writable ({error.strerror}); choose another, or mount it rw"
        ) from None


def _check_owner(path: Path, owner: int) -> None:
    if owner != os.getuid():
        raise ConfigError(
            f"state_dir {path} belongs to user id {owner}, runctld runs as {os.getuid()};"
            " chown it, or choose another state_dir"
        )


def _close_to_others(path: Path, fd: int) -> None:
    found = os.fstat(fd)
    _check_owner(path, found.st_uid)  # of what we opened, should it have been replaced
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        os.fchmod(fd, 0o700)  # before we look: nobody adds to it from here on
    if mode & 0o022 and os.listdir(fd):
        os.fchmod(fd, mode)  # the next start is to find it as this one did
        raise ConfigError(
            f"state_dir {path} may be written by other users (mode {mode:04o}); see that all in"
            " it is yours, then chmod 700 it, or choose another state_dir"
        )
    if mode & 0o077:
        log.warning("state_dir %s was open to other users (mode %04o): it is 0700 now", path, mode)
