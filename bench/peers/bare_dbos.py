"""Bare DBOS: what a program of its own needs after a SIGKILL until its work goes on.

``python -m bench.peers.bare_dbos`` prints both figures.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

PROGRAM = str(Path(__file__).with_name("bare_program.py"))
#: Bytes of each line that a step writes.
LINE = 7
PATIENCE = 90.0
#: Seconds between two looks of whoever waits for the work to be seen again.
POLLING = 0.05

Kind = Literal["direct", "queue", "partitions"]


class Bare:
    """A folder with its program."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder = folder
        self.kind = kind
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, count: int = 0) -> None:
        """``count`` workflows are begun; 0: those that did not end are recovered."""
        # -P: the names in this folder are no modules of the program's.
        argv = [sys.executable, "-P", PROGRAM, str(self.folder), self.kind]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, str(count)] if count else argv,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def wait_started(self, count: int, nap: float) -> None:
        """Until the steps have been entered ``count`` times in all."""
        end = time.monotonic() + PATIENCE
        while (lines := self._started()) < count:
            if time.monotonic() > end or self.process is None or self.process.poll() is not None:
                said = (self.folder / "log").read_text(errors="replace").strip()[-300:]
                raise RuntimeError(f"bare dbos: {lines} steps of {count} began: {said}")
            time.sleep(nap)

    def _started(self) -> int:
        try:
            return (self.folder / "started").stat().st_size // LINE
        except FileNotFoundError:
            return 0


@contextmanager
def bare(kind: Kind) -> Iterator[Bare]:
    with tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as name:
        program = Bare(Path(name), kind)
        try:
            yield program
        finally:
            program.kill()


def recovery(kills: int = 5, kind: Kind = "direct") -> list[float]:
    """Milliseconds from a SIGKILL, the restart being immediate, until a watcher that looks
    every 50 ms sees that the step runs again."""
    samples = []
    with bare(kind) as program:
        program.start(1)
        program.wait_started(1, POLLING)
        for n in range(2, kills + 2):
            killed = time.perf_counter()
            program.kill()
            program.start()
            program.wait_started(n, POLLING)
            samples.append((time.perf_counter() - killed) * 1000)
    return samples


def redispatch(count: int = 1000, times: int = 1, kind: Kind = "queue") -> list[float]:
    """Milliseconds from a restart until ``count`` unfinished workflows all run again."""
    samples = []
    with bare(kind) as program:
        program.start(count)
        program.wait_started(count, POLLING)
        for n in range(2, times + 2):
            program.kill()
            began = time.perf_counter()
            program.start()
            program.wait_started(n * count, 0.005)
            samples.append((time.perf_counter() - began) * 1000)
    return samples


def main() -> None:
    kinds: list[Kind] = ["direct", "queue"]
    for kind in kinds:
        took = recovery(kind=kind)
        print(f"SIGKILL -> step seen again, {kind}: median {statistics.median(took):.0f} ms,"
              f" max {max(took):.0f} ms", flush=True)  # fmt: skip
    kinds = ["queue", "partitions"]
    for kind in kinds:
        print(f"1000 unfinished, {kind}: {redispatch(kind=kind)[0]:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
