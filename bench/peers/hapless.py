"""hapless (``hap``): a command line without a daemon."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from ..processes import Usage
from .base import Peer, Unable
from .install import Installed, venv
from .jobs import printed, printer, size, time_output, wait_until, writer


class Hapless(Peer):
    name = "hapless"
    durable = "no: each job is a folder of plain files, but nothing starts one again"
    how: ClassVar[dict[str, str]] = {
        "first_output": "hap run, a process -> the job's stdout.log",
        "watch_latency": "hap logs -f",
        "replay": "hap logs",
        "listing": "hap status",
    }

    @staticmethod
    def install() -> Installed:
        return venv("hapless", "hapless", "hapless")

    def start(self) -> None:
        self.hap = str(self.installed.folder / "bin/hap")
        self.state = self.folder / "haps"
        self.environment["HAPLESS_DIR"] = str(self.state)
        self.run([self.hap, "status"])

    def add(self, argv: list[str]) -> tuple[list[str], Path]:
        """The command line that starts the next job, and its folder."""
        number = max((int(one.name) for one in self.state.iterdir()), default=0) + 1
        return [self.hap, "run", "--", *argv], self.state / str(number)

    def ended(self, folder: Path) -> None:
        wait_until(lambda: size(folder / "rc"), "the end of a hap")

    def first_output(self, count: int) -> list[float]:
        took = []
        for _ in range(count + 1):
            argv, folder = self.add(["/bin/echo", "x"])
            look = partial(size, folder / "stdout.log")
            took.append(time_output(partial(self.run, argv), look))
            self.ended(folder)
        return took[1:]

    def watch_latency(self, lines: int, interval: float) -> list[float]:
        gate = self.gate()
        argv, folder = self.add(writer(gate, lines, interval))
        self.run(argv)
        return self.watched([self.hap, "logs", "-f", folder.name], gate, lines)

    def replay(self, lines: int = 20_000, count: int = 7) -> list[float]:
        text = printed(lines)
        argv, folder = self.add(printer(lines))
        self.run(argv)
        self.ended(folder)
        argv = [self.hap, "logs", folder.name]
        return self.time_processes(count, argv, lambda said: text in said)

    def listing(self, count: int, jobs: int = 10) -> list[float]:
        self.run([self.hap, "cleanall"])
        for _ in range(jobs):
            argv, folder = self.add(["/bin/true"])
            self.run(argv)
            self.ended(folder)
        argv = [self.hap, "status"]
        return self.time_processes(count, argv, lambda said: said.count(b"success") == jobs)

    def idle(self, seconds: float) -> Usage:
        raise Unable("it has no daemon")
