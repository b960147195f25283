"""supervisord: XML-RPC over its Unix socket, and supervisorctl."""

from __future__ import annotations

import http.client
import shlex
import socket
import xmlrpc.client
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from .base import Peer
from .install import Installed, venv
from .jobs import printed, printer, size, time_output, wait_until, writer

CONFIG = """
[supervisord]
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
childlogdir = {folder}
identifier = bench
[unix_http_server]
file = {folder}/s
chmod = 0700
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl = unix://{folder}/s
"""
PROGRAM = """
[program:{name}]
command = {command}
autostart = false
autorestart = false
startsecs = 0
stdout_logfile = {folder}/{name}.log
stdout_logfile_maxbytes = 0
redirect_stderr = true
"""


class Supervisor(Peer):
    name = "supervisor"
    durable = "no: a started program is forgotten with supervisord; its log is a plain file"
    how: ClassVar[dict[str, str]] = {
        "first_output": "XML-RPC startProcess(wait=False) of a declared program -> its log file",
        "watch_latency": "supervisorctl tail -f",
        "replay": "supervisorctl tail -BYTES",
        "listing": "supervisorctl status",
        "idle": "supervisord",
    }

    @staticmethod
    def install() -> Installed:
        return venv("supervisor", "supervisor", "supervisor")

    def start(self) -> None:
        self.bin = self.installed.folder / "bin"
        self.programs = ""
        self.config = self.folder / "supervisord.conf"
        self.config.write_text(CONFIG.format(folder=self.folder))
        self.process = self.spawn([str(self.bin / "supervisord"), "-n", "-c", str(self.config)])
        wait_until(self.answers, "supervisord")

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "daemon.log").read_text().strip()[-200:])
        try:
            return bool(self.proxy().getState())
        except OSError:
            return False

    def proxy(self) -> Any:
        transport = UnixTransport(self.folder / "s")
        return xmlrpc.client.ServerProxy("http://localhost", transport=transport).supervisor

    def declare(self, names: list[str], argv: list[str]) -> None:
        """Programs that can be started by name."""
        command = shlex.join(argv).replace("%", "%%")
        for name in names:
            self.programs += PROGRAM.format(name=name, command=command, folder=self.folder)
        self.config.write_text(CONFIG.format(folder=self.folder) + self.programs)
        proxy = self.proxy()
        (changes,) = proxy.reloadConfig()
        for name in changes[0]:
            proxy.addProcessGroup(name)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def ctl(self, *args: str) -> list[str]:
        return [str(self.bin / "supervisorctl"), "-c", str(self.config), *args]

    def first_output(self, count: int) -> list[float]:
        names = [f"echo-{n}" for n in range(count + 1)]
        self.declare(names, ["/bin/echo", "x"])
        proxy = self.proxy()
        proxy.getState()  # the connection is there
        took = []
        for name in names:
            ask = partial(proxy.startProcess, name, False)
            took.append(time_output(ask, partial(size, self.log(name))))
        return took[1:]

    def watch_latency(self, lines: int, interval: float) -> list[float]:
        gate = self.gate()
        self.declare(["writer"], writer(gate, lines, interval))
        self.proxy().startProcess("writer", False)
        return self.watched(self.ctl("tail", "-f", "writer"), gate, lines)

    def replay(self, lines: int = 20_000, count: int = 7) -> list[float]:
        text = printed(lines)
        self.declare(["printer"], printer(lines))
        self.proxy().startProcess("printer", False)
        wait_until(lambda: size(self.log("printer")) == len(text), "the printer's log")
        argv = self.ctl("tail", f"-{len(text)}", "printer")
        return self.time_processes(count, argv, lambda said: text in said)

    def listing(self, count: int, jobs: int = 10) -> list[float]:
        names = [f"listed-{n}" for n in range(jobs)]
        self.declare(names, ["/bin/true"])
        for name in names:
            self.proxy().startProcess(name, False)
        # It ends with 3 when a program does not run.
        argv = self.ctl("status", *names)
        return self.time_processes(count, argv, lambda said: said.count(b"EXITED") == jobs, (3,))


class UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = str(path)

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if not (self._connection and self._connection[1]):
            self._connection = host, UnixConnection(self._path)
        assert isinstance(self._connection[1], http.client.HTTPConnection)
        return self._connection[1]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self._path)
