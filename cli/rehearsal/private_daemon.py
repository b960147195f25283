"""A daemon of our own in a temporary directory, of which nothing is left afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..interrupts import interrupt
from .child import Child, ChildFailed

#: A start takes a second, on a machine that has nothing else to do. Seconds.
START_WITHIN = 60.0
#: What has been killed is gone within so many seconds.
GONE_WITHIN = 10.0


@contextmanager
def private_folder(prefix: str, *, keep: bool = False) -> Iterator[Path]:
    """A temporary directory for the block, with all symbolic links resolved. SIGTERM, and the end
    of the terminal, end the block as Ctrl-C does. ``keep``: it stays there."""
    previous = {
        number: signal.signal(number, _interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL  # not under nohup
    }
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    try:
        yield folder
    finally:
        if not keep:
            with uninterrupted():
                _remove(folder)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    interrupt(KeyboardInterrupt())


def _remove(folder: Path) -> None:
    """Also what has taken our right to change it."""
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o700)
    shutil.rmtree(folder)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Whatever ends processes and removes directories does so to the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start_daemon(config: Path, env: Mapping[str, str]) -> Child:
    """Not ready yet."""
    return Child([sys.executable, "-m", "runctl.supervisor.main", "--config", str(config)], env)


def wait_ready(daemon: Child) -> tuple[float, str]:
    """When it said that it is (Unix seconds), and how. Raises ChildFailed."""
    return daemon.wait_line(
        "a ready daemon",
        lambda stream, line: stream == "stderr" and "ready" in line,
        patience=START_WITHIN,
    )


def kill_all_of(state: Path, first: Child | None = None) -> list[str]:
    """SIGKILL, as when the machine loses power: ``first``, the daemon, with its keeper, so
    that neither says anything of the end of what they run, then all else that belongs to the state
    directory. Who that was, in words, without these. Raises ChildFailed."""
    if first is not None and first.process.poll() is None:
        # Parents first.
        for pid in [first.process.pid, *_list_descendants(first.process.pid)]:
            _kill(pid)
        first.kill()
    killed: dict[int, str] = {}
    deadline = time.monotonic() + GONE_WITHIN
    # Twice: a process may fork and exit between the listing and the kill.
    clear = 0
    while clear < 2:
        found = _find_processes(state)
        clear = 0 if found else clear + 1
        if time.monotonic() > deadline:
            raise ChildFailed(f"these do not die: {', '.join(_name(found))}; end them")
        for pid in found:
            _kill(pid)
        killed |= found
        if found:
            time.sleep(0.005)
    return _name(killed)


def find_left_over(state: Path, patience: float = 3.0) -> list[str]:
    """The processes of the state directory that are still there after ``patience`` seconds, in
    words; they are killed."""
    deadline = time.monotonic() + patience
    while _find_processes(state) and time.monotonic() < deadline:
        time.sleep(0.02)
    return kill_all_of(state)


def _name(found: Mapping[int, str]) -> list[str]:
    return [f"{pid} ({words})" for pid, words in found.items()]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _list_descendants(pid: int) -> list[int]:
    """Nearest first."""
    found = [pid]
    for parent in found:
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, tasks.read_text().split())
    return found[1:]


def _find_processes(state: Path) -> dict[int, str]:
    """pid -> its command line, of the keepers of a state directory and what runs for it. Empty
    where there is no /proc: there all of it ends with its daemon."""
    path = os.fsencode(state)
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        argv = _read(entry / "cmdline")
        keeper = path in argv and any(word.endswith(b"/keeper.py") for word in argv)
        if keeper or b"RUNCTL_STATE=" + path in _read(entry / "environ"):
            found[int(entry.name)] = b" ".join(argv).decode(errors="replace").strip()
    return found


def _read(file: Path) -> list[bytes]:
    """Nothing of a process that is gone, or somebody else's."""
    try:
        return file.read_bytes().split(b"\0")
    except OSError:
        return []
