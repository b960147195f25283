"""Gateways as processes, and their clients: requests, and event streams as a browser has them."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
from conftest import DEADLINE, Box, wait_until
from pgserver import free_port
from test_gateway_hub import Viewer

JSON = {"content-type": "application/json"}


class Gateway:
    """Of the daemon whose configuration is ``config``. ``start`` and ``kill`` any number of times:
    it stays at its port. ``constants``: values in place of those of its modules, by their names
    below ``runctl.gateway``."""

    def __init__(
        self, config: Path, *, start: bool = True, constants: dict[str, float] | None = None
    ) -> None:
        self.config = config
        self._constants = constants or {}
        self.port = free_port()
        self.log = config.parent / f"gateway-{self.port}.log"
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE, trust_env=False)
        self._process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        argv = [sys.executable, "-m", "runctl.cli.main", "-c", str(self.config), "gateway"]
        if self._constants:
            code = ["import sys, runctl.gateway.server"]
            for name, value in self._constants.items():
                place = f"sys.modules['runctl.gateway.{name.partition('.')[0]}']"
                code.append(f"assert {place}.{name.partition('.')[2]}")
                code.append(f"{place}.{name.partition('.')[2]} = {value!r}")
            code.append("from runctl.gateway.main import main; sys.exit(main())")
            argv = [sys.executable, "-c", "\n".join(code), "--config", str(self.config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*argv, "--listen", f"127.0.0.1:{self.port}"], stdout=log, stderr=log
            )
        begun = self.log.read_bytes().count(b"ready: ")
        process = self._process

        def is_ready() -> bool:
            assert process.poll() is None, self.log.read_text()
            return self.log.read_bytes().count(b"ready: ") > begun

        wait_until(is_ready, "the gateway is ready")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(DEADLINE)

    def close(self) -> None:
        self.client.close()
        if self._process is not None and self._process.poll() is None:
            self.kill(signal.SIGTERM)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def post(self, path: str, body: object = None, **options: Any) -> httpx.Response:
        content = b"" if body is None else json.dumps(body).encode()
        headers = JSON | options.pop("headers", {})
        return self.client.post(path, content=content, headers=headers, **options)

    def submit(self, thread: str, *argv: str, run: str | None = None) -> str:
        answer = self.post(f"/v1/threads/{thread}/runs", {"argv": argv, "id": run})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["run"])

    def read(self, run: str, after: str = "") -> Viewer:
        """What a client hears until the run's end."""
        stream = Stream(self, run)
        stream.viewer.last = after
        return stream.join()


class Stream:
    """A client of a run's events, which comes back as browsers do, until the end."""

    def __init__(self, gateway: Gateway, run: str, headers: dict[str, str] | None = None) -> None:
        self._gateway = gateway
        self._path = f"/v1/runs/{run}/events"
        self._headers = headers or {}
        self.viewer = Viewer()
        self.connections = 0
        self.comments: list[str] = []
        self.problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self) -> Stream:
        self._thread.start()
        return self

    def join(self) -> Viewer:
        if self._thread.ident is None:
            self.begin()
        self._thread.join(2 * DEADLINE)
        assert not self._thread.is_alive(), "the run's end did not come"
        if self.problem is not None:
            raise self.problem
        return self.viewer

    def stop(self) -> None:
        """Do not come back."""
        self._stop.set()

    def wait_left(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self.viewer.ended and not self._stop.is_set():
                try:
                    self._connect()
                except (OSError, http.client.HTTPException):
                    pass
                self._stop.wait(0.05)
        except BaseException as error:
            self.problem = error

    def _connect(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._gateway.port, timeout=30)
        try:
            shown = {"Last-Event-ID": self.viewer.last} if self.viewer.last else {}
            connection.request("GET", self._path, headers={**self._headers, **shown})
            response = connection.getresponse()
            if response.status == 503:  # nobody is there for the moment
                return
            assert response.status == 200, (response.status, response.read())
            self.connections += 1
            frame = b""
            while line := response.readline():
                frame += line
                if line != b"\n":
                    continue
                if b"\nevent: " in b"\n" + frame:
                    self.viewer.hear(frame)
                else:
                    self.comments.append(frame.decode())
                frame = b""
        finally:
            connection.close()


class Place:
    """A daemon, configured by ``text``, and a gateway beside it; ``close`` both."""

    def __init__(self, path: Path, text: str = "") -> None:
        self.box = Box(path)
        if text:
            self.box.configure(text)
        self.box.start()
        self.gateway = Gateway(self.box.config)

    def close(self) -> None:
        self.gateway.close()
        self.box.close()
