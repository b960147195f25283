"""A NATS server that tests start and stop, and executors that share it and a PostgreSQL."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import wait_until
from pgserver import Postgres, free_port
from runctl.supervisor.broker import server_binary


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
            self._process = subprocess.Popen([server_binary(), *arguments], stderr=file)
        wait_until(lambda: "Server is ready" in log.read_text(), "NATS is up")

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(20)
            self._process = None


@contextmanager
def servers() -> Iterator[tuple[Postgres, NatsServer]]:
    """A PostgreSQL and a NATS server, both started."""
    with tempfile.TemporaryDirectory(prefix="runctl-nats-") as path:
        postgres, nats = Postgres(), NatsServer(Path(path))
        try:
            postgres.start()
            nats.start()
            yield postgres, nats
        finally:
            nats.stop()
            postgres.close()
