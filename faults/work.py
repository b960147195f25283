"""What a run does: it writes numbered lines, and keeps a journal of them.

A program of its own that imports little, as it starts many times a round:
``work.py JOURNAL MODE PARTS PAUSE SIZE CODE PROMPT``. Modes: ``lines``; ``tree``, which leaves
grandchildren in sessions of their own that ignore TERM; ``stubborn``, which ignores it
itself; ``reader``, which reads its stdin slowly, and compares it with what it is to be;
``steps``, which stores a checkpoint after each third part, and goes on behind it. Each part is
noted *before* it is written: whoever is killed has written all that its journal says, except
for the last part.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # the real one is in a module that takes time to import
if TYPE_CHECKING:
    from typing import Literal

#: Each fifth part goes to stderr.
STDERR_EVERY = 5
#: After so many parts there is a checkpoint.
STEP = 3
#: What stands in the parts of one that goes on, in place of the attempt.
SAME = "same"


def text(run: str, label: str, part: int, size: int) -> str:
    """Part ``part`` of a reply: says by itself whose it is."""
    return f"{run} {label} {part} " + "x" * size + "\n"


def prompt_of(size: int) -> str:
    """A prompt of which each piece says where it belongs."""
    return "".join(f"{at:07x}\n" for at in range(0, size + 8, 8))[:size]


def stream_of(part: int) -> Literal["stdout", "stderr"]:
    return "stderr" if part % STDERR_EVERY == 0 else "stdout"


class Journal:
    """Appends lines ``run label writer what part size time``; see ``journal.Line``."""

    def __init__(self, path: str, run: str, label: str, writer: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._head = f"{run} {label} {writer}"

    def note(self, what: str, part: int = 0, size: int = 0, at: float | None = None) -> None:
        now = time.monotonic() if at is None else at
        os.write(self._fd, f"{self._head} {what} {part} {size} {now:.6f}\n".encode())
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def writer() -> str:
    """This process, and whose it is: executors here have state directories of their names."""
    return f"{os.path.basename(os.environ['RUNCTL_STATE'])}/{os.getpid()}"


def _store(part: int) -> None:
    """Until it is stored: a daemon that restarts does not answer."""
    import base64
    import socket

    line = b"CHECKPOINT " + base64.b64encode(b"%d" % part) + b"\n"
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(os.environ["RUNCTL_SOCKET"])
                connection.sendall(line)
                if connection.recv(100) == b"OK\n":
                    return
        except OSError:
            pass
        time.sleep(0.02)


def _find_first() -> int:
    """The part to begin with."""
    if not os.environ.get("RUNCTL_RESUME"):
        return 1
    with open(os.environ["RUNCTL_CHECKPOINT_FILE"]) as file:
        return int(file.read()) + 1


def _leave_children(path: str, run: str, label: str) -> None:
    """Two that no process group and no TERM reaches, and that say how long they live."""
    import signal

    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            journal = Journal(path, run, label, writer())
            for _ in range(2000):
                journal.note("alive")
                time.sleep(0.03)
            os._exit(0)
    for _ in range(2):
        os.wait()


def main() -> int:
    path, mode, parts, pause, size, code, prompt = sys.argv[1:]
    run, label = os.environ["RUNCTL_RUN"], os.environ["RUNCTL_ATTEMPT"]
    journal = Journal(path, run, label, writer())
    read = b""
    journal.note("begin")
    if mode == "stubborn":
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "tree":
        _leave_children(path, run, label)
    first, shown = 1, label
    if mode == "steps":
        first, shown = _find_first(), SAME
    for part in range(first, int(parts) + 1):
        journal.note("part", part, int(size))
        out = sys.stderr if stream_of(part) == "stderr" else sys.stdout
        out.write(text(run, shown, part, int(size)))
        out.flush()
        if mode == "steps" and part % STEP == 0:
            _store(part)
            journal.note("saved", part)
        if mode == "reader":
            read += os.read(0, int(prompt) // (int(parts) + 1) + 1)
        time.sleep(float(pause))
    if mode == "reader":
        while data := os.read(0, 4096):
            read += data
        journal.note("fed", len(read), int(read == prompt_of(int(prompt)).encode()))
    journal.note("end")
    if int(code) < 0:
        os.kill(os.getpid(), -int(code))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
