"""A NATS server that tests start and stop."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from conftest import wait_until
from pgserver import free_port
from runctl.supervisor.messaging.embedded_server import find_server_binary


class NatsServer:
    """With JetStream, on loopback. ``start`` and ``stop`` any number of times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self._path / "nats.log"
        log.write_bytes(b"")
        arguments = ["-js", "-a", "127.0.0.1", "-p", str(self.port), "-sd", str(self._path)]
        with log.open("ab") as file:
            self._process = subprocess.Popen([find_server_binary(), *arguments], stderr=file)
        wait_until(lambda: "Server is ready" in log.read_text(), "NATS is up")

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(20)
            self._process = None
