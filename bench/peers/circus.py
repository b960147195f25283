"""circusd: its ZeroMQ client, and circusctl."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import ClassVar

from .base import Peer, Unable
from .install import Installed, venv
from .jobs import size, time_output, wait_until, writer

CONFIG = """
[circus]
endpoint = ipc://{folder}/c
pubsub_endpoint = ipc://{folder}/p
stats_endpoint = ipc://{folder}/t
statsd = False
httpd = False
"""
CLIENT = """
import sys
from circus.client import CircusClient
client = CircusClient(endpoint=sys.argv[1], timeout=30)
client.send_message("numwatchers")
print("ready", flush=True)
for line in sys.stdin:
    # Refused while the last start is under way: wait for that.
    answer = client.send_message("start", name=line.strip(), waiting=True)
    assert answer["status"] == "ok", answer
"""


class Circus(Peer):
    name = "circus"
    durable = "no: a started watcher is forgotten with circusd; its log is a plain file"
    how: ClassVar[dict[str, str]] = {
        "first_output": "CircusClient 'start' of a declared watcher -> the log of its FileStream",
        "watch_latency": "tail -f on the log of its FileStream: it has no command for that",
        "listing": "circusctl status",
        "idle": "circusd without its statistics",
    }

    @staticmethod
    def install() -> Installed:
        return venv("circus", "circus", "circus")

    def start(self) -> None:
        self.bin = self.installed.folder / "bin"
        self.config = self.folder / "circus.ini"
        self.config.write_text(CONFIG.format(folder=self.folder))
        self.endpoint = f"ipc://{self.folder}/c"
        self.process = self.spawn([str(self.bin / "circusd"), str(self.config)])
        wait_until(self.answers, "circusd")

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "daemon.log").read_text().strip()[-200:])
        return (self.folder / "c").exists() and bool(self.run(self.ctl("numwatchers")))

    def ctl(self, *args: str) -> list[str]:
        return [str(self.bin / "circusctl"), "--endpoint", self.endpoint, *args]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def declare(self, names: list[str], argv: list[str]) -> None:
        """Watchers that can be started by name."""
        messages = [
            {
                "command": "add",
                "properties": {
                    "name": name, "cmd": argv[0], "args": argv[1:], "start": False,
                    "options": {
                        "respawn": False, "copy_env": True, "numprocesses": 1,
                        "stdout_stream": {"class": "FileStream", "filename": str(self.log(name))},
                    },
                },
            }
            for name in names
        ]  # fmt: skip
        code = (
            "import json, sys\nfrom circus.client import CircusClient\n"
            "client = CircusClient(endpoint=sys.argv[1], timeout=30)\n"
            "for message in json.loads(sys.argv[2]):\n"
            "    answer = client.call(message)\n"
            "    assert answer['status'] == 'ok', answer\n"
        )
        python = str(self.bin / "python")
        self.run([python, "-c", code, self.endpoint, json.dumps(messages)])

    def first_output(self, count: int) -> list[float]:
        names = [f"echo-{n}" for n in range(count + 1)]
        self.declare(names, ["/bin/echo", "x"])
        took = []
        with self.client([str(self.bin / "python"), "-c", CLIENT, self.endpoint]) as request:
            for name in names:
                look = partial(size, self.log(name))
                took.append(time_output(partial(request, name), look))
        return took[1:]

    def watch_latency(self, lines: int, interval: float) -> list[float]:
        gate = self.gate()
        self.declare(["writer"], writer(gate, lines, interval))
        self.run(self.ctl("start", "writer"))
        log = self.log("writer")
        wait_until(lambda: size(log), "the writer's log")
        return self.watched(["tail", "-f", str(log)], gate, lines)

    def replay(self, lines: int = 20_000, count: int = 7) -> list[float]:
        raise Unable("no command prints the output of a process")

    def listing(self, count: int, jobs: int = 10) -> list[float]:
        names = [f"listed-{n}" for n in range(jobs)]
        self.declare(names, ["/bin/true"])
        return self.time_processes(
            count, self.ctl("status"), lambda said: said.count(b"listed-") == jobs
        )
