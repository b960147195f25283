"""The gateway as a process: each verb over HTTP, and watchers through deaths of everything."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import DEADLINE, Box, wait_until
from gateways import Gateway, Place, Stream
from natsserver import Node
from runctl.protocol import messages

STEPS = (
    "import time\nfor n in range({count}):\n    print('step', n, flush=True); time.sleep({pause})"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with closing(Place(tmp_path_factory.mktemp("gateway"))) as made:
        yield made


@pytest.fixture
def gateway(place: Place) -> Gateway:
    return place.gateway


def problem(answer: Any, status: int, code: str) -> str:
    """Its text."""
    assert answer.headers["content-type"] == "application/problem+json"
    value = answer.json()
    assert (answer.status_code, value["status"], value["code"]) == (status, status, code), value
    return str(value["detail"])


def test_a_run_from_its_submit_to_its_end(place: Place, gateway: Gateway) -> None:
    answer = gateway.post(
        "/v1/threads/a%2Fb%20%C3%A9/runs", {"argv": ["sh", "-c", "echo out; echo err >&2; exit 3"]}
    )
    assert answer.status_code == 201
    made = answer.json()
    assert made["thread"] == "a/b é"
    assert answer.headers["location"] == f"/v1/runs/{made['run']}"
    viewer = gateway.read(made["run"])
    assert sorted(viewer.chunks) == ["err\n", "out\n"]
    assert viewer.told == ["reset", "chunk", "chunk", "end"]
    shown = gateway.get(answer.headers["location"], params={"wait": "30s"}).json()
    assert (shown["status"], shown["exit_code"]) == ("failed", 3)
    assert shown == place.box.show(made["run"])
    assert gateway.get("/v1/threads/a%2Fb%20%C3%A9/runs").json() == place.box.json("list", "a/b é")
    current = gateway.get("/v1/threads/a%2Fb%20%C3%A9/run").json()
    assert current["run"] == made["run"]
    again = gateway.post(f"/v1/runs/{made['run']}/retry")
    assert again.status_code == 201
    assert gateway.read(again.json()["run"]).ended
    purged = gateway.post("/v1/threads/a%2Fb%20%C3%A9/purge", {"force": True})
    assert purged.json() == {"runs": 2}
    lost = gateway.read(made["run"])
    assert (lost.told, lost.chunks) == (["end"], [])


def test_a_submit_is_repeated(place: Place, gateway: Gateway) -> None:
    body = {"argv": ["sh", "-c", "echo once >> count"], "id": "once", "cwd": str(place.box.path)}
    answers = [gateway.post("/v1/threads/once/runs", body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert {answer.json()["run"] for answer in answers} == {"once"}
    gateway.read("once")
    assert (place.box.path / "count").read_text() == "once\n"
    assert "other work" in problem(
        gateway.post("/v1/threads/once/runs", {"argv": ["true"], "id": "once"}), 409, "refused"
    )


def test_an_abort_returns_when_all_is_gone(place: Place, gateway: Gateway) -> None:
    run = gateway.submit("abort", "sleep", "600")
    queued = gateway.submit("abort", "true")
    stream = Stream(gateway, run).begin()
    wait_until(lambda: stream.viewer.told, "it has begun")
    assert gateway.post(f"/v1/runs/{queued}/abort").json() == {"runs": [queued]}
    assert gateway.post("/v1/threads/abort/abort", {"queued": True}).json() == {"runs": [run]}
    assert stream.join().ended
    assert gateway.read(queued).told == ["end"]
    text = problem(gateway.post("/v1/threads/abort/abort"), 409, "refused")
    place.box.runctl("abort", "abort", code=6)
    assert place.box.stderr == f"runctl: {text}\n"


@pytest.mark.parametrize(
    ("path", "args"),
    [
        ("/v1/runs/none", ("show", "none")),
        ("/v1/runs/-x", ("show", "--", "-x")),
        ("/v1/threads/none/runs", ("list", "none")),
        ("/v1/threads/none/run", None),
        ("/v1/threads/none/session", ("session", "show", "none")),
        ("/v1/runs/none/events", None),
        ("/v1/threads/%0A/runs", ("list", "\n")),
        ("/v1/threads/%FF/runs", None),
        ("/v1/threads/..%2F..%2Fetc/runs", ("list", "../../etc")),
        ("/v1/threads/%2A/runs", ("list", "*")),
        ("/v1/threads/%3E/runs", ("list", ">")),
        ("/v1/threads?limit=0", None),
        ("/v1/threads?limit=1&limit=2", None),
        ("/v1/threads?status=odd", None),
        ("/v1/runs/none/events?after=1", None),
        ("/v1/runs/x?wait=9d", None),
        ("/page/", None),
        ("/page/../page_files.py", None),
        ("/page/%2e%2e/app.py", None),
        ("/v1/runs/x/../../..//etc/passwd", None),
    ],
)
def test_what_is_not_there_is_said_as_on_the_command_line(
    place: Place, gateway: Gateway, path: str, args: tuple[str, ...] | None
) -> None:
    answer = gateway.get(path)
    assert answer.status_code in (400, 404)
    text = problem(answer, answer.status_code, answer.json()["code"])
    if args is not None:
        place.box.runctl(*args, code={404: 3, 400: 2}[answer.status_code])
        assert place.box.stderr.removesuffix("\n") == f"runctl: {text}"


def test_bodies_that_are_wrong(gateway: Gateway) -> None:
    path = "/v1/threads/wrong/runs"
    bodies: list[object] = [[], {"argvs": []}, {"argv": "true"}, {"prompt": 1}]
    for body in bodies:
        assert "the body is not as it should be" in problem(
            gateway.post(path, body), 400, "bad-request"
        )
    for content in (b"{", b"\xff", b'{"argv": ["\\ud800"]}', b"[" * 100_000):
        answer = gateway.client.post(
            path, content=content, headers={"content-type": "application/json"}
        )
        problem(answer, 400, "bad-request")
    form = gateway.client.post(path, content=b"argv=true", headers={"content-type": "text/plain"})
    problem(form, 415, "bad-request")
    large = gateway.post(path, {"prompt": "x" * (5 * 1024 * 1024)})
    assert "more than 4194304 bytes" in problem(large, 413, "limit")
    answer = gateway.client.put(path)
    assert answer.headers["allow"] == "GET, HEAD, POST"
    problem(answer, 405, "bad-request")


def test_lines_are_submitted_in_order(place: Place, gateway: Gateway) -> None:
    lines: list[object] = [
        {"thread": "lines", "argv": ["true"], "id": f"line-{n}"} for n in range(100)
    ]
    lines[50] = {"thread": "lines", "argvs": []}
    content = b"\n".join(json.dumps(line).encode() for line in lines)
    answer = gateway.client.post(
        "/v1/runs", content=content, headers={"content-type": "application/x-ndjson"}
    )
    assert answer.headers["content-type"] == "application/x-ndjson"
    found = [json.loads(line) for line in answer.text.splitlines()]
    assert [row.get("run") for row in found[:50]] == [f"line-{n}" for n in range(50)]
    assert (found[50]["line"], found[50]["code"]) == (51, "bad-request")
    assert len(found) == 100


def test_pages_lead_to_each_other(gateway: Gateway) -> None:
    for n in range(5):
        gateway.submit(f"page-{n}", "true")
    names, path = list[str](), "/v1/threads?limit=2"
    while path:
        answer = gateway.get(path)
        names += [row["thread"] for row in answer.json()]
        path = answer.links.get("next", {}).get("url", "")
    assert {f"page-{n}" for n in range(5)} <= set(names)
    assert len(names) == len(set(names))


def test_the_word_not_to_come_back(gateway: Gateway) -> None:
    run = gateway.submit("over", "echo", "x")
    viewer = gateway.read(run)
    assert viewer.last == "1.end"
    path = f"/v1/runs/{run}/events"
    assert gateway.get(path, headers={"last-event-id": viewer.last}).status_code == 204
    # What a browser says counts for more than the address, which stays the same.
    answer = gateway.get(f"{path}?after=1.0", headers={"last-event-id": "1.1"})
    assert [line for line in answer.text.splitlines() if line.startswith("id:")] == ["id: 1.end"]
    assert gateway.client.head(path).headers["content-type"].startswith("text/event-stream")


def test_requests_wait_for_a_daemon_that_restarts(tmp_path: Path) -> None:
    box = Box(tmp_path)
    gateway = None
    try:
        box.start()
        gateway = Gateway(box.config)
        run = gateway.submit("t", "true")
        box.runctl("wait", run)  # the end of its output comes before the status
        box.kill()
        later = threading.Thread(target=box.start)
        later.start()
        assert gateway.get(f"/v1/runs/{run}").json()["status"] == "succeeded"
        later.join()
        box.term()
        answer = gateway.get("/v1/threads")
        assert "runctld is not running" in problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "1"
    finally:
        if gateway is not None:
            gateway.close()
        box.close()


@pytest.mark.long
def test_watchers_through_the_deaths_of_everything(tmp_path: Path) -> None:
    """Daemon, nats-server and gateway are killed in turn under a command that outlives them, and
    one that starts over."""
    box = Box(tmp_path)
    box.configure("[queue]\noutlive = '30s'\n")
    gateway = None
    try:
        box.start()
        gateway = Gateway(box.config)
        code = STEPS.format(count=60, pause=0.1)
        run = gateway.submit("t", "python3", "-u", "-c", code)
        streams = [Stream(gateway, run).begin() for _ in range(10)]
        wait_until(lambda: all(len(s.viewer.chunks) > 3 for s in streams), "they watch")
        box.kill()
        gateway.kill()
        gateway.start()
        late = Stream(gateway, run).begin()  # what is stored needs no daemon
        wait_until(lambda: late.viewer.chunks, "it watches without a daemon")
        box.start()
        pid = box.ask(messages.StatusRequest(brief=True))[0].pid
        assert pid == box.pid
        _kill_server(box)
        gateway.kill(signal.SIGTERM)
        gateway.start()
        for stream in (*streams, late):
            assert "".join(stream.join().chunks) == "".join(f"step {n}\n" for n in range(60))
            assert stream.viewer.told.count("reset") == 1
    finally:
        if gateway is not None:
            gateway.close()
        box.close()


def _kill_server(box: Box) -> None:
    """The embedded nats-server."""
    import os

    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"nats-server" in argv and os.fsencode(box.state) in argv:
            os.kill(int(folder.name), signal.SIGKILL)
            return
    raise AssertionError("no nats-server was found")


def test_watchers_are_told_that_it_stops(tmp_path: Path, place: Place) -> None:
    gateway = Gateway(place.box.config)
    try:
        run = gateway.submit("stops", "sleep", "600")
        streams = [Stream(gateway, run).begin() for _ in range(20)]
        wait_until(lambda: all(s.viewer.told for s in streams), "they watch")
        for stream in streams:
            stream.stop()
        assert gateway.kill(signal.SIGTERM) == 0
        for stream in streams:
            stream.wait_left()
            assert any("retry: " in comment for comment in stream.comments), stream.comments
        place.gateway.post(f"/v1/runs/{run}/abort")
    finally:
        gateway.close()


def test_who_reads_nothing_costs_no_memory(place: Place, gateway: Gateway) -> None:
    """Output goes past them: they read what is stored, if they ever do."""
    code = "import sys\nfor n in range(20000): sys.stdout.write(f'{n:0>999}\\n')"
    before = _resident(gateway.pid)
    stuck = []
    run = gateway.submit("slow", "python3", "-c", code)
    try:
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", gateway.port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host = f"Host: 127.0.0.1:{gateway.port}"
            connection.sendall(f"GET /v1/runs/{run}/events HTTP/1.1\r\n{host}\r\n\r\n".encode())
            stuck.append(connection)
        viewer = gateway.read(run)
        assert "".join(viewer.chunks).count("\n") == 20000
        assert _resident(gateway.pid) - before < 60 * 1024 * 1024
    finally:
        for connection in stuck:
            connection.close()


def test_who_reads_nothing_for_long_is_cut_off(place: Place) -> None:
    code = "import sys\nfor n in range(20000): sys.stdout.write(f'{n:0>999}\\n')"
    gateway = Gateway(place.box.config, constants={"connections.STUCK": 0.3})
    try:
        run = gateway.submit("stuck", "python3", "-c", code)
        gateway.read(run)
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            host = f"Host: 127.0.0.1:{gateway.port}"
            connection.sendall(f"GET /v1/runs/{run}/events HTTP/1.1\r\n{host}\r\n\r\n".encode())
            before = len(connection.recv(1))

            def is_cut() -> bool:
                # The kernel says so, though nobody reads what it has.
                state = Path("/proc/net/tcp").read_text()
                port = f":{connection.getsockname()[1]:04X}"
                return not any(port in line.split()[2] for line in state.splitlines()[1:])

            wait_until(is_cut, "it is cut off")
            assert before == 1
    finally:
        gateway.close()


def test_the_head_of_a_request_has_its_time(place: Place) -> None:
    gateway = Gateway(place.box.config, constants={"connections.HEAD_LIMIT": 0.3})
    try:
        with socket.create_connection(("127.0.0.1", gateway.port), DEADLINE) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        run = gateway.submit("slow-head", "sleep", "600")
        stream = Stream(gateway, run).begin()
        wait_until(lambda: stream.viewer.told, "it watches")
        assert gateway.get("/v1/threads").status_code == 200  # a request is no slow head
        gateway.post(f"/v1/runs/{run}/abort")
        assert stream.join().ended
        assert stream.connections == 1
    finally:
        gateway.close()


def test_there_are_only_so_many_connections(place: Place, tmp_path: Path) -> None:
    config = tmp_path / "few.toml"
    config.write_text(place.box.config.read_text() + "[gateway]\nmax_connections = 3\n")
    gateway = Gateway(config)
    try:
        held = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(3)]
        with socket.create_connection(("127.0.0.1", gateway.port), DEADLINE) as one_more:
            assert b" 503 " in one_more.recv(65536)
        for connection in held:
            connection.close()
        wait_until(lambda: gateway.get("/v1/threads").status_code == 200, "there is room")
    finally:
        gateway.close()


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_the_head_of_a_request_is_bounded(place: Place, gateway: Gateway) -> None:
    def ask(data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", gateway.port), DEADLINE) as connection:
            connection.sendall(data)
            parts = b""
            while part := connection.recv(65536):
                parts += part
            return parts

    assert b" 431 " in ask(b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000)
    said = ask(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
        + b"x" * 40_000
        + b"\r\n\r\n"
    )
    assert b" 431 " in said
    assert b" 400 " in ask(b"nonsense\r\n\r\n")
    assert b" 400 " in ask(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")


def test_elsewhere_what_reads_waits_for_a_nats_server_that_restarts(
    stopped_box: Box, tmp_path: Path
) -> None:
    (tmp_path / "nats").mkdir()
    node, file = Node(tmp_path / "nats"), tmp_path / "elsewhere.toml"
    node.start()
    told = f'[nats]\nurl = "{node.url}"\n'
    file.write_text(f'state_dir = "{tmp_path / "elsewhere"}"\n{told}')
    stopped_box.configure(told)
    stopped_box.start()
    with closing(node), closing(Gateway(file)) as gateway:
        run = gateway.submit("t", "true")
        assert gateway.read(run).ended
        answers: list[int] = []
        for _ in range(3):
            node.kill()
            ask = threading.Thread(
                target=lambda: answers.append(gateway.get(f"/v1/runs/{run}/events").status_code)
            )
            ask.start()
            node.start()
            ask.join(DEADLINE)
        node.kill()
        problem(gateway.get(f"/v1/runs/{run}/events"), 503, "unavailable")
        assert answers == [200] * 3


def test_who_waits_for_a_daemon_is_told_when_the_gateway_stops(
    stopped_box: Box, tmp_path: Path
) -> None:
    stopped_box.start()
    with closing(Gateway(stopped_box.config)) as gateway:
        stopped_box.runctl("submit", "t", "--id", "r", "--", "true")
        stopped_box.kill()  # it is expected back
        reads, writes = b"GET /v1/runs/other HTTP/1.1", b"POST /v1/threads/t/runs HTTP/1.1"
        lines = [socket.create_connection(("127.0.0.1", gateway.port), DEADLINE) for _ in range(2)]
        for line, request in zip(lines, (reads, writes), strict=True):
            line.sendall(
                request + b"\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b'content-length: 17\r\n\r\n{"argv":["true"]}'
            )
        for _ in range(3):  # whoever came earlier is served by then
            assert httpx.get(f"{gateway.url}/v1/openapi.json", trust_env=False).status_code == 200
        assert gateway.kill(signal.SIGTERM) == 0
        answers = [line.makefile("rb").read() for line in lines]
        for line in lines:
            line.close()
    assert answers[0].startswith(b"HTTP/1.1 503 ")
    assert b"the gateway stops; try again" in answers[0]
    assert answers[1].startswith(b"HTTP/1.1 504 ")
    assert b"it may have taken effect" in answers[1]
    assert "Traceback" not in gateway.log.read_text()
