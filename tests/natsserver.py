"""Real NATS servers with JetStream on loopback: one, or a cluster of three; and how a test
reaches the one that a daemon has started."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from conftest import wait_until
from pgserver import free_port
from runctl.config import connection
from runctl.config.schema import Nats
from runctl.protocol import subjects
from runctl.protocol.endpoint import ENDPOINT_FILE, Endpoint
from runctl.supervisor.messaging.embedded_server import find_server_binary

if TYPE_CHECKING:
    from nats.aio.client import Client


def embedded(state: Path) -> Nats:
    """How the embedded server of state directory ``state`` is reached by now."""
    written = (state / ENDPOINT_FILE).read_bytes()
    return msgspec.json.decode(written, type=Endpoint).nats()


async def connected(state: Path, **options: Any) -> Client:
    """A client of it, which finds its successor as well."""
    nats = embedded(state)
    client = connection.new_client(nats, lambda: embedded(state))
    try:
        await client.connect(
            connection.list_servers(nats), **connection.make_options(nats), **options
        )
    except BaseException:  # a server that has just gone: nats-py leaves its transport open
        await client.close()
        raise
    return client


class Node:
    """A server with a store of its own; ``start`` and ``kill`` any number of times."""

    def __init__(
        self, path: Path, name: str = "", cluster: str = "", listen: str = "127.0.0.1"
    ) -> None:
        self.path, self.name = path, name
        self.port = free_port()
        self.url = f"nats://{listen}:{self.port}"
        self._log = path / "log"
        self._config = path / "nats.conf"
        self._config.write_text(
            f'listen: "{listen}:{self.port}"\n{cluster}\njetstream {{ store_dir: "{path}/js" }}\n'
            + (f'server_name: "{name}"\n' if name else "")
        )
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, more: str) -> None:
        with self._config.open("a") as file:
            file.write(more + "\n")

    def start(self, *, ready: bool = True) -> None:
        offset = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [find_server_binary(), "-c", str(self._config)],
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        if ready:
            process = self._process

            def is_ready() -> bool:
                said = self._log.read_bytes()[offset:]
                assert process.poll() is None, said.decode()
                return b"Server is ready" in said

            wait_until(is_ready, "NATS is up")

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """As a machine that is gone; its store stays."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    close = kill


class Cluster:
    """Three servers. Clients know them by ``url`` alone: they advertise no others, so
    that a proxy between is not passed by."""

    def __init__(self, path: Path) -> None:
        ports = [free_port() for _ in range(3)]
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
        self.nodes: list[Node] = []
        for n, port in enumerate(ports):
            folder = path / f"nats-{n}"
            folder.mkdir(parents=True)
            self.nodes.append(
                Node(
                    folder,
                    f"n{n}",
                    f'cluster {{ name: "c", listen: "127.0.0.1:{port}", routes: [{routes}],'
                    " no_advertise: true }",
                )
            )
        self.url = ",".join(node.url for node in self.nodes)

    def start(self) -> None:
        for node in self.nodes:
            node.start(ready=False)

    def leader(self, bus: Any) -> Node:
        """The node that leads our stream."""

        def leader() -> Node | None:
            try:
                name = self._info(bus)["cluster"]["leader"]
            except Exception:  # there is none for the moment, or it does not answer yet
                time.sleep(0.1)
                return None
            return next((node for node in self.nodes if node.name == name), None)

        found = wait_until(leader, "our stream has a leader")
        assert isinstance(found, Node)
        return found

    def wait_whole(self, bus: Any) -> None:
        """Until all replicas of our stream are there and current."""

        def whole() -> bool:
            try:
                replicas = self._info(bus)["cluster"].get("replicas", [])
            except Exception:  # no leader yet
                time.sleep(0.1)
                return False
            return len(replicas) == 2 and all(
                r.get("current") and not r.get("offline") for r in replicas
            )

        wait_until(whole, "all replicas are current")

    def _info(self, bus: Any) -> Any:
        return json.loads(bus.call(f"$JS.API.STREAM.INFO.{subjects.STREAM}"))

    def close(self) -> None:
        for node in self.nodes:
            node.close()
