"""The jobs that every peer is given, and how their output is awaited."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 30.0
#: Seconds between two looks at a file: less would take the processor from the peer.
NAP = 0.0002
SCRIPT = str(Path(__file__).with_name("script.py"))
#: The first lines of a writer, which warm all up, do not count.
WARM = 5


def writer(gate: Path, lines: int, interval: float) -> list[str]:
    """A line each ``interval`` seconds, once the file ``gate`` is there."""
    argv = [sys.executable, "-I", SCRIPT, "write", str(lines + WARM)]
    return [*argv, str(interval), str(gate)]


def printer(lines: int) -> list[str]:
    """All at once, and it ends."""
    return [sys.executable, "-I", SCRIPT, "print", str(lines)]


def printed(lines: int) -> bytes:
    return b"".join(b"%d\n" % n for n in range(1, lines + 1))


def size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return 0


def wait_until(look: Callable[[], T], what: str, nap: float = 0.02) -> T:
    """What ``look`` returns once it is true. ``RuntimeError`` when that takes too long."""
    end = time.monotonic() + PATIENCE
    while not (found := look()):
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come in {PATIENCE:g} s")
        time.sleep(nap)
    return found


def time_output(request: Callable[[], object], look: Callable[[], object]) -> float:
    """Milliseconds from the request until ``look`` finds something, be it before its answer."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread is there
        began = time.perf_counter()
        answer = pool.submit(request)
        wait_until(look, "the first output", NAP)
        took = (time.perf_counter() - began) * 1000
        answer.result()
    return took


class Watch:
    """The lines of a watcher that are numbers, with the time (ns) at which they came."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._fd = process.stdout.fileno()
        os.set_blocking(self._fd, False)
        self._rest = b""

    def wait_line(self) -> None:
        for line, _ in self._lines():
            if line == b"0":
                return
        raise RuntimeError("the watcher ended early")

    def lines(self, count: int) -> list[tuple[bytes, int]]:
        found: list[tuple[bytes, int]] = []
        for line, at in self._lines():
            if len(line) > 15:
                found.append((line, at))
                if len(found) == count:
                    return found
        raise RuntimeError(f"the watcher showed {len(found)} lines of {count}")

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if not poll.poll(1000):
                continue
            if not (data := os.read(self._fd, 65536)):
                return
            at = time.time_ns()
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                if (text := line.strip()).isdigit():
                    yield text, at
