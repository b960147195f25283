"""What Prometheus and an OTLP collector get from a real daemon."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, daemon_with, wait_until
from pgserver import free_port
from proc import children
from runctl.config.load import load
from runctl.config.schema import ConfigError

DOC = Path(__file__).parent.parent / "docs" / "hooks-and-metrics.md"


def get(port: int, path: str, method: str = "GET", shown: str | None = None) -> tuple[int, str]:
    """``shown``: what the header Authorization says."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        link.request(method, path, headers={} if shown is None else {"Authorization": shown})
        answer = link.getresponse()
        return answer.status, answer.read().decode()
    finally:
        link.close()


class Collector:
    """An OTLP/HTTP collector; ``bodies`` is what was posted to it."""

    def __init__(self) -> None:
        bodies: list[tuple[str, bytes]] = []
        self.bodies = bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    data = gzip.decompress(data)
                bodies.append((self.path, data))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def spans(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, attributes) of every span that came."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        found = []
        for _, body in list(self.bodies):
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        values = {
                            a.key: a.value.string_value or a.value.int_value
                            for a in span.attributes
                        }
                        found.append((span.name, values))
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Shown:
    """A daemon with metrics and traces."""

    def __init__(self, box: Box, port: int, collector: Collector) -> None:
        self.box, self.port, self.collector = box, port, collector

    def text(self) -> str:
        status, text = get(self.port, "/metrics")
        assert status == 200
        return text

    def value(self, sample: str) -> float:
        """The value of a sample such as 'name{label="x"}'; 0 when it is not there."""
        match = re.search(rf"^{re.escape(sample)} (\S+)$", self.text(), re.MULTILINE)
        return float(match[1]) if match else 0.0


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    box, port, collector = Box(tmp_path_factory.mktemp("shown")), free_port(), Collector()
    try:
        # Of the exporter, that a collector here is never too slow for.
        os.environ |= {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_EXPORTER_OTLP_TIMEOUT": "600"}
        box.configure(
            f'[metrics]\nlisten = "127.0.0.1:{port}"\n[traces]\nendpoint = "{collector.url}"\n'
        )
        box.start()
        yield Shown(box, port, collector)
    finally:
        for name in ("OTEL_BSP_SCHEDULE_DELAY", "OTEL_EXPORTER_OTLP_TIMEOUT"):
            os.environ.pop(name, None)
        box.close()
        collector.close()


def wait(box: Box, run: str, code: int = 0) -> None:
    box.runctl("wait", run, code=code)


def test_runs_are_counted_by_how_they_ended(shown: Shown) -> None:
    box = shown.box

    def ended(status: str) -> float:
        return shown.value(f'runctl_runs_ended_total{{runner="shell",status="{status}"}}')

    before = {status: ended(status) for status in ("succeeded", "failed", "aborted")}
    chunks = shown.value("runctl_output_chunks_total")
    size = shown.value("runctl_output_bytes_total")
    waits = shown.value('runctl_queue_wait_seconds_count{runner="shell"}')
    good = box.submit("counted", "printf", "12345")
    bad = box.submit("counted", "false")
    wait(box, good)
    wait(box, bad, 1)
    live = box.submit_py("lives", "import time; time.sleep(600)")
    wait_until(lambda: box.show(live)["status"] == "running", "it runs")
    wait_until(lambda: shown.value('runctl_runs_running{runner="shell"}') == 1, "it alone")
    queued = box.submit("lives", "true")
    assert shown.value("runctl_runs_queued") == 1
    box.runctl("abort", "lives", "--queued")
    assert box.show(queued)["status"] == box.show(live)["status"] == "aborted"
    for status, count in (("succeeded", 1), ("failed", 1), ("aborted", 2)):
        wait_until(lambda s=status, n=count: ended(s) - before[s] == n, f"{status} is counted")
    wait_until(lambda: shown.value('runctl_runs_running{runner="shell"}') == 0, "none runs")
    assert shown.value("runctl_runs_queued") == 0
    assert shown.value("runctl_output_chunks_total") >= chunks + 1
    assert shown.value("runctl_output_bytes_total") >= size + 5
    assert shown.value('runctl_queue_wait_seconds_count{runner="shell"}') == waits + 3
    assert shown.value("runctl_abort_seconds_count") >= 2
    assert shown.value("runctl_resets_total") >= 3
    assert shown.value("runctl_dispatch_latency_seconds_count") >= 3


def test_names_are_those_of_the_document_and_labels_are_bounded(shown: Shown) -> None:
    thread = "a thread with a name of its own"
    run = shown.box.submit(thread, "true")
    wait(shown.box, run)
    text = shown.text()
    assert "a thread" not in text
    assert run not in text
    names = set(re.findall(r"^# TYPE (runctl_\w+) ", text, re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    assert names == set(re.findall(r"^\| `(runctl_\w+)", DOC.read_text(), re.MULTILINE))


def test_health_paths_and_methods(shown: Shown) -> None:
    assert get(shown.port, "/healthz") == (200, "ready\n")
    assert shown.value("runctl_ready") == 1
    assert get(shown.port, "/healthz", "HEAD") == (200, "")
    assert get(shown.port, "/nothing")[0] == 404
    assert get(shown.port, "/metrics", "POST")[0] == 405
    with socket.create_connection(("127.0.0.1", shown.port), timeout=DEADLINE) as link:
        link.sendall(b"nonsense\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 400")
    assert shown.box.json("status")["metrics"] == f"127.0.0.1:{shown.port}"
    assert "metrics" in shown.box.runctl("status")


def test_idle_connections_keep_nobody_out(shown: Shown) -> None:
    idle = [socket.create_connection(("127.0.0.1", shown.port)) for _ in range(40)]
    try:
        assert get(shown.port, "/metrics")[0] == 200
        log = shown.box.log.read_text()
        assert log.count("32 connections at once: those that ask nothing are closed") == 1
    finally:
        for link in idle:
            link.close()


def test_the_oldest_idle_connections_make_room(stopped_box: Box) -> None:
    """And not their time-out alone."""
    box, port = stopped_box, free_port()
    box.configure(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
    box.prefix = daemon_with("api.http_server.HEAD_LIMIT", 600.0)
    box.start()
    idle = [socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) for _ in range(40)]
    try:
        assert get(port, "/metrics")[0] == 200
        assert [link.recv(1) for link in idle[:9]] == [b""] * 9
        idle[9].setblocking(False)
        with pytest.raises(BlockingIOError):
            idle[9].recv(1)
    finally:
        for link in idle:
            link.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:2", 200), ("evil.example:80", 421)],
)
def test_loopback_is_asked_by_its_own_names(shown: Shown, host: str, status: int) -> None:
    """A page of evil.example may be given this address for its name."""
    link = http.client.HTTPConnection("127.0.0.1", shown.port, timeout=DEADLINE)
    try:
        link.request("GET", "/healthz", headers={"Host": host})
        assert link.getresponse().status == status
    finally:
        link.close()


def test_a_broker_that_is_killed_is_counted(shown: Shown) -> None:
    assert shown.box.daemon is not None
    before = shown.value("runctl_broker_restarts_total")
    (server,) = children(shown.box.daemon.pid, "nats-server")
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: shown.value("runctl_broker_restarts_total") == before + 1, "counted")
    wait_until(lambda: get(shown.port, "/healthz")[0] == 200, "ready again")


def test_a_run_is_a_span(shown: Shown) -> None:
    run = shown.box.submit("traced", "true")
    wait(shown.box, run)

    def step() -> dict[str, Any] | None:
        spans = shown.collector.spans()
        return next((v for n, v in spans if n == "run_thread" and v.get("runctl.run") == run), None)

    found = wait_until(step, "the run's span")
    assert found["runctl.thread"] == "traced"
    assert found["runctl.attempt"] == 1
    assert found["dbos.operation.workflow_id"] == run
    assert "OTLP" not in shown.box.log.read_text()


def test_a_collector_that_is_away_holds_nothing_up(
    stopped_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    with socket.socket() as hole:  # it takes connections, and never answers
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        url = f"http://127.0.0.1:{hole.getsockname()[1]}/v1/traces"
        stopped_box.configure(f'[traces]\nendpoint = "{url}"\n')
        stopped_box.start()
        wait(stopped_box, stopped_box.submit("untraced", "true"))
        assert stopped_box.term() == 0  # the exporter itself would wait for half a minute
    assert "Traceback" not in stopped_box.log.read_text()


def test_a_port_that_is_taken(stopped_box: Box, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        stopped_box.configure(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
        assert stopped_box.start(ready=False).wait(DEADLINE) == 69
    assert stopped_box.log.read_text().splitlines()[-1] == (
        f"runctld: metrics.listen: another program listens on 127.0.0.1:{port};"
        " end it, or choose another port"
    )


def test_only_who_shows_the_token_is_answered(stopped_box: Box, tmp_path: Path) -> None:
    box, port, file = stopped_box, free_port(), tmp_path / "token"
    file.write_text("the-first\n")
    file.chmod(0o600)
    box.configure(f'[metrics]\nlisten = "127.0.0.1:{port}"\ntoken_file = "{file}"\n')
    box.start()
    assert get(port, "/metrics", shown="Bearer the-first")[0] == 200
    assert get(port, "/healthz", shown="bearer  the-first ") == (200, "ready\n")
    for wrong in (None, "", "Bearer", "Bearer ", "Basic the-first", "the-first", "Bearer the-fir"):
        for path in ("/metrics", "/healthz", "/nothing"):
            status, text = get(port, path, shown=wrong)
            assert (status, "runctl_" in text, "ready" in text) == (401, False, False), wrong
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    link.request("GET", "/metrics")
    assert link.getresponse().headers["WWW-Authenticate"].startswith("Bearer")
    link.close()
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as twice:
        lines = ["GET /metrics HTTP/1.1", "Host: localhost"]
        lines += ["Authorization: Bearer the-first", "Authorization: Bearer other"]
        twice.sendall("\r\n".join([*lines, "", ""]).encode())
        assert twice.recv(100).startswith(b"HTTP/1.1 401")
    file.write_text("the-second")
    assert get(port, "/metrics", shown="Bearer the-first")[0] == 401
    assert get(port, "/metrics", shown="Bearer the-second")[0] == 200
    file.unlink()
    assert [get(port, "/metrics", shown="Bearer the-second")[0] for _ in range(2)] == [503, 503]
    said = f"metrics.token_file: {file} cannot be read (No such file or directory)"
    assert box.log.read_text().count(said) == 1
    os.mkfifo(file)  # a file system that does not answer
    assert get(port, "/metrics", shown="Bearer the-second")[0] == 503
    with file.open("w"):
        pass  # lets the read go
    file.unlink()
    file.write_text("the-third")
    wait_until(lambda: get(port, "/metrics", shown="Bearer the-third")[0] == 200, "read anew")
    log = box.log.read_text()
    assert not any(secret in log for secret in ("the-first", "the-second", "the-third"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory): correct the path or its mode"),
        (" \n", "is empty: write the token to it"),
        ("two words", "holds no token: write one line of ASCII without spaces to it"),
        ("d\u00e9j\u00e0", "holds no token: write one line of ASCII without spaces to it"),
        ("x" * 70_000, "cannot be read (it holds more than 64 KiB): correct the path or its mode"),
    ],
)
@pytest.mark.short
def test_a_token_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str | None, said: str
) -> None:
    config, file = tmp_path / "runctld.toml", tmp_path / "token"
    if content is not None:
        file.write_text(content)
    config.write_text('[metrics]\nlisten = "127.0.0.1:9464"\ntoken_file = "token"\n')
    with pytest.raises(ConfigError) as error:
        load(config)
    assert str(error.value) == f"{config}: metrics.token_file: {file} {said}"


@pytest.mark.parametrize(
    ("module", "text", "line"),
    [
        ("prometheus_client", '[metrics]\nlisten = "127.0.0.1:1"', "pip install prometheus-client"),
        ("opentelemetry", '[traces]\nendpoint = "http://x/"', "pip install 'runctl[traces]'"),
    ],
)
def test_what_is_not_installed_is_named(
    stopped_box: Box, module: str, text: str, line: str
) -> None:
    stopped_box.configure(text)
    code = (
        "import sys\n"
        "class Gone:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.split('.')[0] == {module!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "from runctl.supervisor.main import main\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "-c", str(stopped_box.config), "--check"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 78
    (said,) = ended.stderr.splitlines()
    assert line in said


def test_nothing_is_imported_unless_configured() -> None:
    code = (
        "import sys, runctl.supervisor.lifecycle.startup\n"
        "assert not [m for m in sys.modules if m.startswith(('prometheus', 'opentel', 'h11'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
