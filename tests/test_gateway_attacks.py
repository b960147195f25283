"""What somebody may try who wants the gateway to break, to forget itself, or to say too much."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import DEADLINE, wait_until
from gateways import Gateway, Place
from test_gateway import _resident, problem
from test_gateway_access import OPERATOR, READER, TABLES, bearer, digest

MIB = 1024 * 1024
#: Short times, so that a test need not wait for what takes half a minute.
SHORT = {"connections.HEAD_LIMIT": 1.0, "service.BODY_LIMIT": 1.0, "connections.REST_LIMIT": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with closing(Place(tmp_path_factory.mktemp("attacks"), '[log]\nlevel = "debug"\n')) as made:
        yield made


@pytest.fixture
def gateway(place: Place) -> Gateway:
    return place.gateway


def connect(gateway: Gateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), DEADLINE)


def ask(gateway: Gateway, data: bytes) -> bytes:
    """All that it answers, until it closes the connection."""
    with connect(gateway) as connection:
        connection.sendall(data)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass  # it closes while we still send
    return found


def head(gateway: Gateway, line: str, *more: str) -> bytes:
    return "\r\n".join((line, f"Host: 127.0.0.1:{gateway.port}", *more, "", "")).encode("latin-1")


def test_slow_clients_lose_their_places(place: Place, tmp_path: Path) -> None:
    """All connections are theirs, and none is silent: in a head, in a body, in one that is not
    read any more, after an answer. They do not keep what they have."""
    config = tmp_path / "few.toml"
    config.write_text(place.box.config.read_text() + "[gateway]\nmax_connections = 8\n")
    with ExitStack() as stack:
        gateway = stack.enter_context(closing(Gateway(config, constants=SHORT)))
        long = ("Content-Type: application/json", "Content-Length: 1000000")
        beginnings = [
            head(gateway, "GET / HTTP/1.1")[:-2],
            head(gateway, "GET /v1/openapi.json HTTP/1.1") + b"GET / HTTP/1.1\r\nX: ",
            head(gateway, "POST /v1/threads/t/runs HTTP/1.1", *long),
            head(gateway, "POST /v1/nothing HTTP/1.1", *long),
        ]
        slow = [stack.enter_context(connect(gateway)) for _ in range(8)]
        for n, connection in enumerate(slow):
            connection.sendall(beginnings[n % 4])
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                for connection in slow:
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        pass

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            answers = [read_all(connection) for connection in slow]
        finally:
            stop.set()
            dripping.join()
        codes = [[int(a.split(b" ", 1)[0]) for a in x.split(b"HTTP/1.1 ")[1:]] for x in answers]
        assert codes[:4] == [[408], [200, 408], [408], [404]]
        assert codes[4:] == codes[:4]
        wait_until(lambda: gateway.get("/v1/threads").status_code == 200, "there is room")


def test_heads_and_what_is_like_them_stay_small(gateway: Gateway) -> None:
    """Many headers, a long one, an address, trailers, the frames of chunks."""
    before = _resident(gateway.pid)
    post = head(
        gateway,
        "POST /v1/threads/t/runs HTTP/1.1",
        *("Transfer-Encoding: chunked", "Content-Type: application/json"),
    )
    events = head(gateway, "GET /v1/changes HTTP/1.1", "Transfer-Encoding: chunked")
    attacks = [
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
        (b"GET / HTTP/1.1\r\nX: ", b"y"),
        (b"GET / HTTP/1.1\r\n", b"y"),
        (b"GET /", b"%20"),
        (b"GET /?", b"&x=y"),
        (b"", b"G"),
        (b"", b"\r\n"),
        (post + b"0\r\n", b"X: y\r\n"),
        (post + b"0\r\nX: ", b"y"),
        (post + b"2;", b"x"),
        (events + b"0\r\n", b"X: y\r\n"),
        (events + b"0\r\nX: ", b"y"),
    ]
    for begin, again in attacks:
        flood = again * (64 * 1024 // len(again))
        with connect(gateway) as connection:
            connection.sendall(begin)
            try:
                for _ in range(16 * 64):  # 64 MiB, if it takes all
                    connection.sendall(flood)
            except OSError:
                said = read_all(connection)
            else:
                raise AssertionError(f"it took all of {begin!r}")
        assert _resident(gateway.pid) - before < 16 * MIB, (begin[:40], said[:100])
    assert gateway.get("/v1/threads").status_code == 200


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /v1/threads/\xff/runs HTTP/1.1",
        "GET /v1/threads/%C0%AE%C0%AE/runs HTTP/1.1",  # ".." by too many bytes
        "GET /v1/threads/%ED%A0%80/runs HTTP/1.1",  # half of a character
        "GET /v1/threads/\x00/runs HTTP/1.1",
        "GET /v1/threads?limit=%FF HTTP/1.1",
        "GET v1/threads HTTP/1.1",
        "CONNECT evil.example:443 HTTP/1.1",
        "CONNECT /v1/threads HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "TRACE /v1/threads HTTP/1.1",
        "BREW /v1/threads HTTP/1.1",
        "PRI * HTTP/2.0",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
)
def test_requests_that_are_none(gateway: Gateway, request_line: str) -> None:
    lines = gateway.log.read_text().count("\n")
    answer = ask(gateway, head(gateway, request_line, "Connection: close"))
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.1 405 ")), answer
    assert b"\r\ncontent-type: application/problem+json\r\n" in answer
    # Nobody fills a disk with what the log says of that.
    assert gateway.log.read_text().count("\n") == lines


@pytest.mark.parametrize(
    "more",
    [
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: -1",),
        ("Content-Length: 99999999999999999999999",),
        ("Transfer-Encoding: gzip",),
        ("Transfer-Encoding : chunked",),
        ("Host: evil.example",),
        ("X-\xff: y",),
        ("X\x00: y",),
        ("X: y\nHost: evil.example",),
    ],
)
def test_heads_that_proxies_may_read_otherwise(gateway: Gateway, more: tuple[str, ...]) -> None:
    line = "POST /v1/threads/smuggled/runs HTTP/1.1"
    said = head(gateway, line, "Content-Type: application/json", "Connection: close", *more)
    answer = ask(gateway, said + b'{"argv": ["true"]}')
    assert answer.startswith(b"HTTP/1.1 400 ") or answer == b"", answer
    problem(gateway.get("/v1/threads/smuggled/runs"), 404, "not-found")


NAMES = [
    "..",
    ".",
    "../../etc/passwd",
    "a/../b",
    "//x",
    "/etc/passwd",
    "\\..\\x",
    "%2e%2e%2f",
    "*",
    ">",
    "a.b",
    "a b",
    "$JS.API.>",
    "~root",
    "-rf",
    "$(id)",
    "'; DROP TABLE workflow_status; --",
    "\u202egnp",
    "\N{KELVIN SIGN}",
    "e\u0301",
]


def test_who_leaves_amid_a_body_is_no_news(gateway: Gateway) -> None:
    lines = gateway.log.read_text().count("\n")
    for path in ("/v1/threads/left/runs", "/v1/runs", "/v1/threads/left/abort"):
        kind = "application/x-ndjson" if path == "/v1/runs" else "application/json"
        said = head(
            gateway, f"POST {path} HTTP/1.1", f"Content-Type: {kind}", "Content-Length: 1000"
        )
        with connect(gateway) as connection:
            connection.sendall(said + b'{"argv": ["true"]}')
            connection.shutdown(socket.SHUT_WR)
            assert b"run" not in read_all(connection)
    problem(gateway.get("/v1/threads/left/runs"), 404, "not-found")
    assert gateway.log.read_text().count("\n") == lines


def test_names_of_threads_are_names_and_nothing_else(place: Place, gateway: Gateway) -> None:
    """Each is one thread, beside all others, wherever it is said; nothing is made of it on disk."""
    before = _list_names(place.box.path)
    for n, name in enumerate(NAMES):
        path = f"/v1/threads/{quote(name, safe='')}"
        body = {"argv": ["true"], "id": f"name-{n}"}
        made = gateway.client.build_request("POST", "/", json=body)
        answer = ask(
            gateway,
            head(
                gateway,
                f"POST {path}/runs HTTP/1.1",
                "Content-Type: application/json",
                f"Content-Length: {len(made.content)}",
                "Connection: close",
            )
            + made.content,
        )
        assert answer.startswith(b"HTTP/1.1 201 "), (name, answer)
        value = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert (value["thread"], value["run"]) == (name, f"name-{n}")
    for n in range(len(NAMES)):
        assert gateway.get(f"/v1/runs/name-{n}?wait=30s").json()["status"] == "succeeded"
        assert gateway.read(f"name-{n}").ended
    rows = place.box.json("list", "--limit", "500")
    found = {row["thread"]: row["run"]["run"] for row in rows}
    assert {name: found.get(name) for name in NAMES} == {
        x: f"name-{n}" for n, x in enumerate(NAMES)
    }
    added = _list_names(place.box.path) - before
    assert not [path for path in added if any(part in str(path) for part in ("passwd", "DROP"))]


@pytest.mark.parametrize(
    "name", ["%00", "a%0Ab", "a%0D%0AX:%20y", "%1B%5B2J", "%C2%9B2J", "%E2%80%A8", "x" * 2000]
)
def test_names_that_would_be_more_than_a_line(place: Place, gateway: Gateway, name: str) -> None:
    answer = gateway.post(f"/v1/threads/{name}/runs", {"argv": ["true"]})
    said = problem(answer, 400, "bad-request")
    assert said.isprintable()
    for path in (f"/v1/threads/{name}/run", f"/v1/threads/{name}/session"):
        assert problem(gateway.get(path), 400, "bad-request").isprintable()
    for log in (place.box.log, gateway.log):
        text = log.read_text()
        assert "\x1b[2J" not in text
        assert "\x9b" not in text


def _list_names(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_no_log_has_a_secret(place: Place, tmp_path: Path) -> None:
    """Wherever somebody puts a token, by mistake or not, and though it logs all that it can."""
    config, tokens = tmp_path / "tokens.toml", tmp_path / "secret.toml"
    tokens.write_text(TABLES)
    told = f'[gateway]\ntokens_file = "{tokens}"\n'
    config.write_text(place.box.config.read_text() + told)
    marks = [OPERATOR, READER, "sesame" * 4]
    with closing(Gateway(config)) as gateway:
        for secret in marks:
            for path in (
                f"/v1/threads?access_token={secret}",
                f"/v1/runs/x/events?after={secret}",
                f"/v1/nothing/{secret}",
                f"/{secret}?{secret}#{secret}",
            ):
                for headers in ({}, bearer(OPERATOR), {"authorization": f"Basic {secret}"}):
                    gateway.get(path, headers=headers)
            for data in (
                head(gateway, f"GET http://x:{secret}@127.0.0.1/ HTTP/1.1", "Connection: close"),
                head(gateway, f"GET /{secret} HTTP/9.9", f"Authorization: Bearer {secret}"),
                head(gateway, "GET / HTTP/1.1", f"Authorization: Bearer {secret}\x00"),
                f"Bearer {secret}\r\n\r\n".encode(),
                head(gateway, "GET / HTTP/1.1", "Connection: close", f"X: {secret}" + "x" * 40_000),
            ):
                ask(gateway, data)
        body = {"argv": ["true"], "env": {"KEY": "sesame" * 4}}
        problem(
            gateway.post("/v1/threads/t/runs", body, headers=bearer(OPERATOR)), 400, "bad-request"
        )
        gateway.post("/v1/threads/t/runs", {"argv": ["true"]}, headers=bearer(OPERATOR))
        text = gateway.log.read_text() + place.box.log.read_text()
    assert "ready: " in text
    for secret in marks:
        assert secret not in text
        assert digest(secret) not in text


def test_no_stream_costs_memory_whose_client_reads_nothing(place: Place, gateway: Gateway) -> None:
    """Durable Streams, and what has changed; events are in test_gateway.py."""
    code = "import sys\nfor n in range(5000): sys.stdout.write(f'{n:0>999}\\n')"
    run = gateway.submit("slow", "python3", "-c", code)
    assert gateway.read(run).ended
    before = _resident(gateway.pid)
    lines = b"".join(b'{"thread": "change-%d", "argv": ["true"]}\n' % n for n in range(200))
    with ExitStack() as stack:
        for path in (f"/v1/runs/{run}/stream?offset=-1&live=sse", "/v1/changes"):
            for _ in range(20):
                connection = stack.enter_context(connect(gateway))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(head(gateway, f"GET {path} HTTP/1.1"))
        answer = gateway.client.post(
            "/v1/runs", content=lines, headers={"content-type": "application/x-ndjson"}
        )
        assert answer.text.count("\n") == 200
        # One that reads has all of it meanwhile.
        url = f"/v1/runs/{run}/stream?offset=-1&live=sse"
        with gateway.client.stream("GET", url) as stream:
            read = sum(len(data) for data in stream.iter_bytes())
        assert read > 5_000_000
        assert _resident(gateway.pid) - before < 40 * MIB


def test_what_slow_clients_have_not_taken_is_bounded(place: Place) -> None:
    """Of answers that are large, each of a request of its own."""
    constants = {"connections.MOST_UNSENT": 4.0 * MIB}
    code = "import sys\nfor n in range(3000): sys.stdout.write(f'{n:0>999}\\n')"
    with closing(Gateway(place.box.config, constants=constants)) as gateway, ExitStack() as stack:
        run = gateway.submit("large", "python3", "-c", code)
        assert gateway.read(run).ended
        path = f"/v1/runs/{run}/stream?offset=-1"
        size = len(gateway.get(path).content)
        assert size > MIB // 2

        def begin() -> socket.socket:
            connection = stack.enter_context(connect(gateway))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
            connection.sendall(head(gateway, f"GET {path} HTTP/1.1", "Connection: close"))
            assert connection.recv(1) == b"H"
            return connection

        # Whoever takes it in the end is not in the way of one that is slower.
        first = begin()
        for _ in range(5):
            assert len(read_all(begin())) > size
        assert len(read_all(first)) > size
        slow = [begin() for _ in range(20)]
        assert len(gateway.get(path).content) == size
        # Of the first ones there is what the kernel has, of the last one everything.
        for connection in slow[:10]:
            assert len(read_all(connection)) < size // 2
        assert len(read_all(slow[-1])) > size
