"""A process that we start, its lines, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from ...config.schema import RunctlError

#: Longest wait for any one thing, seconds.
PATIENCE = 20.0


class ChildFailed(RunctlError):
    """A process that we started did not do what it was started for; its last lines are there."""


class Child:
    """A process in a session of its own (Ctrl-C reaches us alone, who then end it in order), its
    lines kept with the time at which they were read. ``show`` is called with each, and its stream,
    in a thread of its own."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        show: Callable[[str, str], None] | None = None,
    ) -> None:
        self.name = argv[2].rpartition(".")[2] if argv[1] == "-m" else argv[0]
        self.lines: list[tuple[float, str, str]] = []
        self._show = show
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, stream), daemon=True)
            for pipe, stream in ((self.process.stdout, "stdout"), (self.process.stderr, "stderr"))
        ]
        for thread in (*self._readers, threading.Thread(target=self._reap, daemon=True)):
            thread.start()

    def _read(self, pipe: IO[bytes], stream: str) -> None:
        for raw in pipe:
            line = raw.decode(errors="replace").rstrip("\n")
            with self._changed:
                self.lines.append((time.time(), stream, line))
                self._changed.notify_all()
            if self._show is not None:
                self._show(stream, line)
        pipe.close()

    def _reap(self) -> None:
        self.process.wait()
        with self._changed:
            self._changed.notify_all()

    def wait_line(
        self,
        what: str,
        wanted: Callable[[str, str], bool],
        since: int = 0,
        patience: float = PATIENCE,
    ) -> tuple[float, str]:
        """The first line from number ``since`` on that is wanted, and its time. Raises
        ChildFailed, after ``patience`` seconds at the latest."""
        deadline = time.monotonic() + patience
        with self._changed:
            while True:
                ended = self.process.poll() is not None
                for at, stream, line in self.lines[since:]:
                    if wanted(stream, line):
                        return at, line
                since = len(self.lines)
                left = deadline - time.monotonic()
                if left <= 0 or (ended and not any(t.is_alive() for t in self._readers)):
                    break
                # After its end the rest of its output is still on the way.
                self._changed.wait(min(left, 0.05) if ended else left)
        state = f"ended with {self.process.poll()}" if ended else f"gave it not in {patience:g} s"
        raise ChildFailed(f"{what} expected, but {self.name} {state}{self.tail()}")

    def finish(self) -> int:
        """Its exit code, once it and its output have ended. Raises ChildFailed."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"{self.name} did not end in {PATIENCE:g} s{self.tail()}") from None
        for thread in self._readers:
            thread.join(PATIENCE)
        return code

    def stop(self, grace: float) -> int:
        """TERM, ``grace`` seconds, KILL for its whole session; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()

    def kill(self) -> None:
        """KILL, and it is gone."""
        self.process.kill()
        self.process.wait()

    def tail(self) -> str:
        last = [line for _, stream, line in self.lines if stream == "stderr"][-15:]
        return "".join(f"\n  {line}" for line in last)
