"""pm2: its God Daemon, through its API for Node.js and its command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from .base import Peer
from .install import Installed, npm
from .jobs import printed, printer, size, time_output, wait_until, writer

CLIENT = """
const pm2 = require(process.argv[1]);
const fail = (error) => { if (error) { console.error(error); process.exit(1); } };
pm2.connect((error) => {
    fail(error);
    console.log("ready");
    require("readline").createInterface({input: process.stdin})
        .on("line", (line) => pm2.start(JSON.parse(line), fail));
});
"""


class Pm2(Peer):
    name = "pm2"
    durable = "no: a started process is forgotten with its daemon unless `pm2 save` came after"
    how: ClassVar[dict[str, str]] = {
        "first_output": "pm2.start() of its API for Node.js, already connected -> its log file",
        "watch_latency": "pm2 logs NAME --raw",
        "replay": "pm2 logs NAME --nostream --raw --lines N",
        "listing": "pm2 ls",
        "idle": "its God Daemon",
    }

    @staticmethod
    def install() -> Installed:
        return npm("pm2")

    def start(self) -> None:
        self.module = self.installed.folder / "node_modules/pm2"
        self.environment |= {
            "PM2_HOME": str(self.folder / "pm2"), "PM2_DISABLE_VERSION_CHECK": "true",
            "PM2_NO_INTERACTION": "true", "PM2_DISCRETE_MODE": "true",
        }  # fmt: skip
        self.run(self.pm2("ping"))

    def pm2(self, *args: str) -> list[str]:
        return ["node", str(self.module / "bin/pm2"), *args]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def process(self, name: str, argv: list[str]) -> dict[str, Any]:
        return {
            "name": name, "script": argv[0], "args": argv[1:], "interpreter": "none",
            "autorestart": False, "out_file": str(self.log(name)),
            "error_file": str(self.folder / f"{name}.err"),
        }  # fmt: skip

    def launch(self, *processes: dict[str, Any]) -> None:
        file = self.folder / "apps.json"
        file.write_text(json.dumps({"apps": processes}))
        self.run(self.pm2("start", str(file)))

    def first_output(self, count: int) -> list[float]:
        took = []
        with self.client(["node", "-e", CLIENT, str(self.module)]) as request:
            for n in range(count + 1):
                name = f"echo-{n}"
                ask = json.dumps(self.process(name, ["/bin/echo", "x"]))
                took.append(time_output(partial(request, ask), partial(size, self.log(name))))
        return took[1:]

    def watch_latency(self, lines: int, interval: float) -> list[float]:
        gate = self.gate()
        self.launch(self.process("writer", writer(gate, lines, interval)))
        return self.watched(self.pm2("logs", "writer", "--raw"), gate, lines)

    def replay(self, lines: int = 20_000, count: int = 7) -> list[float]:
        text = printed(lines)
        self.launch(self.process("printer", printer(lines)))
        wait_until(lambda: size(self.log("printer")) == len(text), "the printer's log")
        argv = self.pm2("logs", "printer", "--nostream", "--raw", "--lines", str(lines))
        return self.time_processes(count, argv, lambda said: text in said)

    def listing(self, count: int, jobs: int = 10) -> list[float]:
        self.run(self.pm2("delete", "all"))
        self.launch(*(self.process(f"listed-{n}", ["/bin/true"]) for n in range(jobs)))
        return self.time_processes(
            count, self.pm2("ls"), lambda said: said.count(b"listed-") == jobs
        )
