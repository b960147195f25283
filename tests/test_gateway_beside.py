"""The gateway that a daemon starts beside itself."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Box, wait_until
from gateways import Gateway, Stream
from pgserver import free_port
from proc import alive

STEPS = "import time\nfor n in range(40): print('step', n, flush=True); time.sleep(0.1)"


class Beside(Gateway):
    """The one of ``box``'s configuration, which has it listen at ``port``."""

    def __init__(self, box: Box, port: int) -> None:
        super().__init__(box.config, start=False)
        self.client.close()
        self.port = port
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def wait(self) -> None:
        def answers() -> bool:
            try:
                return self.get("/v1/openapi.json").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, "the gateway answers")


def find_gateways(box: Box) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"runctl.gateway.main" in argv and os.fsencode(box.config) in argv:
            found.append(int(folder.name))
    return [pid for pid in found if alive(pid)]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def beside(stopped_box: Box, port: int) -> Iterator[Beside]:
    stopped_box.configure(f"[gateway]\nlisten = '127.0.0.1:{port}'\n[queue]\noutlive = '30s'\n")
    stopped_box.start()
    gateway = Beside(stopped_box, port)
    try:
        gateway.wait()
        yield gateway
    finally:
        gateway.client.close()


def test_it_outlives_its_daemon_with_what_runs(beside: Beside, stopped_box: Box) -> None:
    box = stopped_box
    run = beside.submit("t", "python3", "-u", "-c", STEPS)
    stream = Stream(beside, run).begin()
    wait_until(lambda: len(stream.viewer.chunks) > 3, "it watches")
    (pid,) = find_gateways(box)
    box.kill()
    assert alive(pid)
    assert beside.get("/v1/openapi.json").status_code == 200
    box.start()
    assert "".join(stream.join().chunks) == "".join(f"step {n}\n" for n in range(40))
    assert stream.connections == 1
    assert find_gateways(box) == [pid]
    assert box.term() == 0
    wait_until(lambda: not find_gateways(box), "it ends with its daemon")


def test_it_is_started_again(beside: Beside, stopped_box: Box) -> None:
    (pid,) = find_gateways(stopped_box)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: find_gateways(stopped_box) not in ([], [pid]), "there is another one")
    beside.wait()
    assert "the gateway ended" in stopped_box.log.read_text()


def test_another_configuration_has_another_gateway(
    beside: Beside, stopped_box: Box, port: int
) -> None:
    """Also while a run goes on."""
    box = stopped_box
    run = beside.submit("t", "sleep", "600")
    (pid,) = find_gateways(box)
    box.kill()
    box.config.write_text(
        box.config.read_text().replace("[gateway]\n", "[gateway]\nmax_watchers = 1\n")
    )
    box.start()
    wait_until(lambda: find_gateways(box) not in ([], [pid]), "there is another one")
    beside.wait()
    assert not alive(pid)
    stream = Stream(beside, run).begin()
    wait_until(lambda: stream.viewer.told, "it watches")
    assert beside.get(f"/v1/runs/{run}/events").status_code == 429
    assert beside.post(f"/v1/runs/{run}/abort").json() == {"runs": [run]}
    assert stream.join().ended


def test_watchers_are_told_of_an_orderly_end(beside: Beside, stopped_box: Box) -> None:
    run = beside.submit("t", "sleep", "600")
    stream = Stream(beside, run).begin()
    wait_until(lambda: stream.viewer.told, "it watches")
    stream.stop()
    assert stopped_box.term() == 0
    stream.wait_left()
    assert any("retry: " in comment for comment in stream.comments)


def test_where_it_cannot_listen_the_daemon_says_why(stopped_box: Box) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stopped_box.configure(f"[gateway]\nlisten = '127.0.0.1:{port}'\n")
        stopped_box.start()
        words = f"another program listens on 127.0.0.1:{port}"
        wait_until(lambda: words in stopped_box.log.read_text(), "the log says so")
        assert json.loads(stopped_box.runctl("status", "--json"))["running"] == 0
