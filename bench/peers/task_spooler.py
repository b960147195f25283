"""task-spooler (``tsp``): one binary that is client and server."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from .base import Peer
from .install import Installed, deb
from .jobs import printed, printer, size, time_output, wait_until, writer


class TaskSpooler(Peer):
    name = "task-spooler"
    durable = "no: its queue is in the memory of its server; the output is a plain file"
    how: ClassVar[dict[str, str]] = {
        "first_output": "tsp COMMAND, a process -> its output file",
        "watch_latency": "tsp -c",
        "replay": "tsp -c",
        "listing": "tsp",
        "idle": "the server, which the first tsp starts",
    }

    @staticmethod
    def install() -> Installed:
        return deb("task-spooler")

    def start(self) -> None:
        self.binary = str(self.installed.folder / "usr/bin/tsp")
        self.environment |= {"TS_SOCKET": str(self.folder / "s"), "TS_MAXFINISHED": "1000"}
        self.run([self.binary, "-S", "1"])

    def add(self, argv: list[str]) -> str:
        """The id of the job."""
        return self.run([self.binary, *argv]).decode().strip()

    def output(self, job: str) -> bool:
        """Whether its server knows where the output of that job is."""
        return self.run([self.binary, "-o", job], codes=(0, 1, 255)).startswith(b"/")

    def outputs(self) -> set[Path]:
        return set((self.folder / "tmp").glob("ts-out.*"))

    def first_output(self, count: int) -> list[float]:
        argv = [self.binary, "/bin/echo", "x"]
        took = []
        for _ in range(count + 1):
            before = self.outputs()

            def look(before: set[Path] = before) -> bool:
                return any(size(file) for file in self.outputs() - before)

            took.append(time_output(partial(self.run, argv), look))
            self.run([self.binary, "-w"])
        return took[1:]

    def watch_latency(self, lines: int, interval: float) -> list[float]:
        gate = self.gate()
        job = self.add(writer(gate, lines, interval))
        # Until the job runs, and a little longer, there is no output that could be watched.
        wait_until(lambda: self.output(job), "the output of a job")
        return self.watched([self.binary, "-c", job], gate, lines)

    def replay(self, lines: int = 20_000, count: int = 7) -> list[float]:
        text = printed(lines)
        job = self.add(printer(lines))
        self.run([self.binary, "-w", job])
        return self.time_processes(count, [self.binary, "-c", job], lambda said: said == text)

    def listing(self, count: int, jobs: int = 10) -> list[float]:
        self.run([self.binary, "-C"])  # forgets the finished ones
        for _ in range(jobs):
            job = self.add(["true"])
        self.run([self.binary, "-w", job])
        return self.time_processes(
            count, [self.binary], lambda said: said.count(b"finished") == jobs
        )
