"""One live daemon per executor ID: flock on the state directory."""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.schema import Config
from .errors import ConfigError, LeaseHeld


def prepare_state_dir(path: Path) -> None:
    """Make it (0700) and see that it is ours and writable. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise ConfigError(
            f"state_dir {path}: {error.strerror}; choose a directory that this user may write"
        ) from None
    if owner != os.getuid():
        raise ConfigError(
            f"state_dir {path} belongs to user id {owner}, runctld runs as {os.getuid()};"
            " chown it, or choose another state_dir"
        )
    path.chmod(0o700)
    try:
        probe = path / f".probe-{os.getpid()}"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"state_dir {path} is not writable ({error.strerror}); choose another, or mount it rw"
        ) from None


def executor_id(config: Config) -> str:
    """The configured ID, or one generated once and kept in the state directory."""
    if config.executor_id:
        return config.executor_id
    path = config.state_dir / "executor-id"
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    made = f"{socket.gethostname().split('.')[0][:40] or 'local'}-{uuid.uuid4().hex[:8]}"
    temporary = path.with_suffix(".new")
    temporary.write_text(made + "\n")
    temporary.replace(path)
    return made


@contextmanager
def hold_file_lease(state_dir: Path, executor: str) -> Iterator[None]:
    """Hold the state directory's lock. Raises LeaseHeld, naming the holder."""
    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 4096).decode(errors="replace").strip() or "another runctld"
            raise LeaseHeld(
                f"executor ID {executor!r} is held by {holder} (state_dir {state_dir});"
                " stop that one, or give this one its own state_dir and executor_id"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"executor {executor!r}, pid {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)
