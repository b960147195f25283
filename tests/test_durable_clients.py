"""The clients that the protocol Durable Streams has itself, from npm and from PyPI, read a run
through the deaths of everything; and the protocol's own tests."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import durable_streams
import httpx
import pytest
from conftest import DEADLINE, Box, wait_until
from durable import RunReader
from gateways import Gateway, Place
from node_packages import install
from test_gateway import STEPS, _kill_server

#: Groups of the protocol's tests that take seconds in all; the others wait, or send much.
DAILY = (
    "Basic Stream Operations|Append Operations|Read Operations|HTTP Protocol|JSON Mode"
    "|Create with Stream-Closed|Close Operations|Idempotent Producers with Stream Closure"
    "|Case-Insensitivity|Content-Type Validation|HEAD Metadata"
)
#: What there is not.
OUT_OF_SCOPE = "Fork - |Reserved subscription"
#: Whose pages the protocol's tests are.
ORIGIN = "https://example.com"


def run_protocol_tests(path: Path, pattern: str) -> dict[str, str]:
    """Those whose names match ``pattern``, and what became of each."""
    packages = install()
    config = '[queue]\nmax_running = 100000\n[runners.push]\nkind = "push"\n'
    config += f'[gateway]\norigins = ["{ORIGIN}"]\nmax_rate = 100000\nmax_burst = 1000000\n'
    found = path / "found.json"
    with closing(Place(path, config)) as place:
        done = subprocess.run(
            [
                *("node", str(packages / "node_modules/vitest/vitest.mjs"), "run"),
                *("conformance.test.mjs", "--testTimeout=40000", "-t", pattern),
                *("--reporter=json", f"--outputFile={found}"),
            ],
            cwd=packages,
            env={**os.environ, "CONFORMANCE_TEST_URL": place.gateway.url},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert found.exists(), done.stdout + done.stderr
        assert "Traceback" not in place.gateway.log.read_text()
    (file,) = json.loads(found.read_text())["testResults"]
    return {
        each["title"]: each["status"] if each["status"] == "passed" else str(each)
        for each in file["assertionResults"]
        if each["status"] not in ("skipped", "pending")
    }


@pytest.mark.long
def test_a_part_of_the_protocols_own_tests(tmp_path: Path) -> None:
    found = run_protocol_tests(tmp_path, f"^ ?(?!.*(?:{OUT_OF_SCOPE})).*(?:{DAILY})")
    assert [text for text in found.values() if text != "passed"] == []
    assert len(found) > 60


@pytest.mark.nightly
def test_the_protocols_own_tests(tmp_path: Path) -> None:
    found = run_protocol_tests(tmp_path, f"^(?!.*(?:{OUT_OF_SCOPE})).*$")
    assert [text for text in found.values() if text != "passed"] == []
    assert len(found) > 240


class Client:
    """A program, or a thread, that reads a run's stream to its end."""

    def __init__(self, read: Callable[[RunReader], None]) -> None:
        self.reader = RunReader()
        self.problem: BaseException | None = None
        self._read = read
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._read(self.reader)
        except BaseException as error:
            self.problem = error

    def join(self) -> RunReader:
        self._thread.join(2 * DEADLINE)
        assert not self._thread.is_alive(), "the run's end did not come"
        if self.problem is not None:
            raise self.problem
        return self.reader


def follow_with_npm(packages: Path, url: str, live: str) -> Client:
    def read(reader: RunReader) -> None:
        command = ["node", "follow.mjs", url, live]
        with subprocess.Popen(command, cwd=packages, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                reader.hear(json.loads(line))
        assert process.returncode == 0

    return Client(read)


def follow_with_pypi(url: str, live: Any) -> Client:
    """It tells of a connection that broke, and goes on where its user says."""

    def read(reader: RunReader) -> None:
        offset, pause = "-1", threading.Event()
        with httpx.Client(timeout=DEADLINE, trust_env=False) as client:
            while reader.told[-1:] != ["end"]:
                try:
                    found = durable_streams.stream(url, offset=offset, live=live, client=client)
                    for event in found.iter_events(mode="json_batches"):
                        for message in event.data:
                            reader.hear(message)
                        offset = event.next_offset
                        if reader.told[-1:] == ["end"]:  # it knows nothing of closure
                            return
                except (httpx.HTTPError, durable_streams.DurableStreamError, FETCH_ERROR):
                    pause.wait(0.05)

    return Client(read)


FETCH_ERROR = durable_streams.FetchError


@pytest.fixture
def box(stopped_box: Box) -> Box:
    stopped_box.configure("[queue]\noutlive = '30s'\n")
    stopped_box.start()
    return stopped_box


@pytest.mark.long
@pytest.mark.parametrize("whose", ["npm", "pypi"])
def test_their_own_clients_read_through_the_deaths_of_everything(box: Box, whose: str) -> None:
    packages = install() if whose == "npm" else None
    gateway = Gateway(box.config)
    try:
        run = gateway.submit("t", "python3", "-u", "-c", STEPS.format(count=60, pause=0.1))
        url = f"{gateway.url}/v1/runs/{run}/stream"
        if packages is not None:
            clients = [follow_with_npm(packages, url, live) for live in ("sse", "long-poll")]
        else:
            clients = [follow_with_pypi(url, live) for live in ("sse", "long-poll")]
        read = [client.reader for client in clients]

        def came_to(count: int) -> None:
            wait_until(
                lambda: (
                    all(len(r.chunks) >= count for r in read) or any(c.problem for c in clients)
                ),
                f"{count} chunks are read",
            )

        came_to(5)
        gateway.kill()
        gateway.start()
        came_to(10)
        box.kill()
        box.start()  # which publishes what the run has written meanwhile
        came_to(30)
        _kill_server(box)
        for client in clients:
            assert "".join(client.join().chunks) == "".join(f"step {n}\n" for n in range(60))
            assert client.reader.told.count("reset") == 1
    finally:
        gateway.close()
