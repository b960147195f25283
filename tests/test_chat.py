"""The chat runner against real loopback servers, well-behaved and otherwise."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import DEADLINE, SLACK
from runctl.cli.commands.mock_endpoint import MockServer
from runctl.config import outgoing
from runctl.config.schema import ChatRunner
from runctl.protocol.errors import Fenced, RunFailed
from runctl.protocol.model import Outcome, RunSpec, Status
from runctl.supervisor.execution.runners.chat import Chat
from runctl.supervisor.execution.runners.chat import call as calls
from runctl.supervisor.execution.runners.protocol import Turn
from runctl.supervisor.host import http_trust
from securenats import Certificates

KEY = "sk-very-secret-0123456789"
SPEC = RunSpec(run="r1", thread="t", runner="chat", prompt="hello")
Answer = Callable[["Scripted"], None]


class Scripted(BaseHTTPRequestHandler):
    """Answers as its server's ``answer`` says, and keeps the request."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        self.close_connection = True
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        try:
            self.server.answer(self)
        except ConnectionError:
            pass

    def reply(self, status: int, body: bytes, kind: str = "application/json", **more: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin(self, *, chunked: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header(
            "Transfer-Encoding" if chunked else "Connection", "chunked" if chunked else "close"
        )
        self.end_headers()

    def event(self, data: object, *, chunked: bool = True) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        raw = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw) if chunked else raw)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.over = threading.Event()
        super().__init__(("127.0.0.1", port), Scripted)


@contextmanager
def running(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        if isinstance(server, Server):
            server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def serving(answer: Answer, port: int = 0) -> AbstractContextManager[Server]:
    return running(Server(answer, port))


def delta(text: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def config(server: Any, **more: Any) -> ChatRunner:
    port = server if isinstance(server, int) else server.server_port
    values = {"name": "chat", "base_url": f"http://127.0.0.1:{port}/v1", "model": "m", "retry": 0.0}
    return ChatRunner(**{**values, **more})


#: A time-out that is to pass, and longer ones, for a machine that is so busy that this process is
#: silent for as long before the test has come to what it is about.
TIMEOUTS = (0.2, 1.0, 5.0, 20.0)


async def call(
    runner: ChatRunner, history: tuple[Turn, ...] = (), spec: RunSpec = SPEC
) -> tuple[Outcome, list[bytes]]:
    seen: list[bytes] = []

    async def emit(stream: str, data: bytes) -> None:
        assert stream == "text"
        seen.append(data)
        await trio.lowlevel.checkpoint()

    with trio.fail_after(DEADLINE):
        return await Chat(runner).run(spec, 1, emit, history), seen


async def failure(runner: ChatRunner) -> str:
    """The message of a call that must fail; it names the endpoint, never the key."""
    with pytest.raises(RunFailed) as caught:
        await call(runner)
    message = str(caught.value)
    assert "/v1/chat/completions: " in message
    assert KEY not in message
    assert caught.value.exit_code is None
    assert "\n" not in message
    assert "\x1b" not in message
    return message


async def test_success_streams_each_delta() -> None:
    with running(MockServer(chunks=5, interval=0.01)) as server:
        outcome, seen = await call(config(server))
    assert len(seen) == 5
    assert [chunk.split()[0] for chunk in seen] == [b"chunk-%d" % n for n in range(1, 6)]
    assert len({chunk.split(b" @ ")[1] for chunk in seen}) == 1
    assert outcome == Outcome(Status.SUCCEEDED, reply=b"".join(seen).decode())


async def test_request_holds_system_history_prompt_and_key() -> None:
    def answer(to: Scripted) -> None:
        to.begin()
        to.event({"choices": []})
        to.event(delta(None))
        to.event(delta("grüße\U0001f600"))
        to.event(delta("", "length"))

    turns = tuple(Turn(f"q{n}", f"a{n}") for n in range(4))
    with serving(answer) as server:
        runner = config(server, system="be brief", history=5, api_key=KEY)
        outcome, seen = await call(runner, turns)
        await call(config(server, history=0), turns)
    assert outcome == Outcome(
        Status.SUCCEEDED,
        reply="grüße\U0001f600",
        note="the reply was cut at a length limit (finish_reason length)",
    )
    assert seen == ["grüße\U0001f600".encode()]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["stream"] is True
    assert body["model"] == "m"
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("system", "be brief"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "q3"),
        ("assistant", "a3"),
        ("user", "hello"),
    ]
    assert server.requests[1][2]["messages"] == [{"role": "user", "content": "hello"}]
    assert "Authorization" not in server.requests[1][1]


@pytest.mark.parametrize("prompt", [None, ""])
async def test_no_prompt(prompt: str | None) -> None:
    spec = RunSpec(run="r1", thread="t", runner="chat", prompt=prompt)
    with pytest.raises(RunFailed, match="needs a prompt"):
        await call(config(1), spec=spec)


async def test_401_that_echoes_the_key() -> None:
    text = f"Incorrect API key\x1b[31m\n provided: {KEY}."
    body = json.dumps({"error": {"message": text, "code": "invalid_api_key"}}).encode()
    with serving(lambda to: to.reply(401, body)) as server:
        message = await failure(config(server, api_key=KEY))
    assert "answered 401 Unauthorized: Incorrect API key [31m provided: [redacted]." in message


@pytest.mark.parametrize("pad", range(0, 40, 3))
async def test_key_at_the_cut_of_a_long_body(pad: int) -> None:
    body = b" " * (16 * 1024 - pad) + KEY.encode() + b"x" * 100_000
    with serving(lambda to: to.reply(400, body, "text/plain")) as server:
        message = await failure(config(server, api_key=KEY))
    assert KEY[:6] not in message


async def test_500_with_a_long_page() -> None:
    with serving(lambda to: to.reply(500, b"<html>" + b"x" * 50_000, "text/html")) as server:
        message = await failure(config(server))
    assert "answered 500 Internal Server Error: <html>xxx" in message
    assert len(message) < 400


@pytest.mark.parametrize("chunked", [True, False])
async def test_cut_mid_way(chunked: bool) -> None:
    def answer(to: Scripted) -> None:
        to.begin(chunked=chunked)
        to.event(delta("half a "), chunked=chunked)

    with serving(answer) as server:
        assert "the stream was cut mid-way (" in await failure(config(server))


async def test_connection_reset_before_an_answer() -> None:
    with serving(lambda to: None) as server:
        assert "no usable answer (" in await failure(config(server))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"choices": [', "malformed event"),
        ('{"choices": 7}', "malformed event"),
        ('{"choices": [{"delta": {"content": 7}}]}', "malformed event"),
        ('{"error": {"message": "overloaded", "code": 529}}', "reported an error: overloaded"),
        ('{"error": "busy"}', "reported an error: busy"),
        ("x\nevent: error", "reported an error: x"),
        (json.dumps(delta("", "content_filter")), "ended the reply: content_filter"),
        (f'{{"oops": "{KEY}"', "[redacted]"),
    ],
)
async def test_bad_events(data: str, reason: str) -> None:
    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("a"))
        to.event(data)
        to.server.over.wait(DEADLINE)

    with serving(answer) as server:
        assert reason in await failure(config(server, api_key=KEY))


@pytest.mark.parametrize("events", [0, 1])
async def test_silence(events: int) -> None:
    def answer(to: Scripted) -> None:
        if events:
            to.begin()
            to.event(delta("a"))
        to.server.over.wait(DEADLINE)

    with serving(answer) as server:
        for timeout in TIMEOUTS:
            message = await failure(config(server, timeout=timeout))
            assert f"timed out: silent for {timeout:g} s" in message
            if ("in mid-reply" in message) == bool(events):
                break
    assert ("in mid-reply" in message) == bool(events)


async def test_slow_emit_is_not_silence() -> None:

    async def emit(stream: str, data: bytes) -> None:
        await trio.sleep(1.5 * timeout)

    with running(MockServer(chunks=3, interval=0)) as server:
        for timeout in TIMEOUTS:
            with contextlib.suppress(RunFailed):
                outcome = await Chat(config(server, timeout=timeout)).run(SPEC, 1, emit, ())
                break
    assert outcome.status is Status.SUCCEEDED


async def test_errors_of_emit_pass_through() -> None:
    async def emit(stream: str, data: bytes) -> None:
        raise Fenced("newer attempt")

    with running(MockServer(chunks=3, interval=0)) as server, pytest.raises(Fenced):
        await Chat(config(server)).run(SPEC, 1, emit, ())


async def test_cancelling_ends_the_call() -> None:
    gone = threading.Event()

    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("a"))
        assert to.connection.recv(1) == b""
        gone.set()

    with serving(answer) as server:
        async with trio.open_nursery() as nursery:

            async def emit(stream: str, data: bytes) -> None:
                nursery.cancel_scope.cancel()

            nursery.start_soon(Chat(config(server)).run, SPEC, 1, emit, ())
        assert await trio.to_thread.run_sync(gone.wait, DEADLINE)


async def test_connection_refused() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        message = await failure(config(port))
    assert f"http://127.0.0.1:{port}/v1/chat/completions: cannot connect (" in message


async def test_secrets_in_the_url_are_not_shown() -> None:
    with serving(lambda to: to.reply(403, b"no, hunter22 and qwertz")) as server:
        url = f"http://me:hunter22@127.0.0.1:{server.server_port}/v1?token=qwertz"
        message = await failure(config(server, base_url=url))
        await failure(config(server, base_url=url, api_key=KEY))
    assert "hunter22" not in message
    assert "qwertz" not in message
    assert f"http://127.0.0.1:{server.server_port}/v1/chat/completions" in message
    assert server.requests[0][0] == "/v1/chat/completions?token=qwertz"
    assert server.requests[0][1]["Authorization"].startswith("Basic ")
    assert server.requests[1][1]["Authorization"] == f"Bearer {KEY}"


async def test_redirect_is_not_followed() -> None:
    with serving(lambda to: to.reply(307, b"", Location="/v2/chat?key=1")) as server:
        message = await failure(config(server))
    assert f"a redirect to http://127.0.0.1:{server.server_port}/v2/chat;" in message
    assert len(server.requests) == 1


async def test_wrong_content_type() -> None:
    body = b"<html><body>Welcome to the gateway</body></html>"
    with serving(lambda to: to.reply(200, body, "text/html")) as server:
        message = await failure(config(server))
    assert "answered with text/html, where text/event-stream is expected: <html>" in message


@pytest.mark.parametrize("url", ["ftp://x/v1", "not a url", "http://", "http://[::1/v1"])
async def test_unusable_base_url(url: str) -> None:
    with pytest.raises(RunFailed, match="base_url of runner 'chat' is not"):
        await call(config(1, base_url=url))


async def test_key_file_is_read_at_each_run(tmp_path: Path) -> None:
    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("hi", "stop"))

    file = tmp_path / "key"
    with serving(answer) as server:
        runner = config(server, api_key_file=file)
        with pytest.raises(RunFailed, match=f"api_key_file {file} cannot be read: No such file"):
            await call(runner)
        file.write_text("")
        with pytest.raises(RunFailed, match="is empty"):
            await call(runner)
        file.write_text(f"{KEY}\nsecond line")
        with pytest.raises(RunFailed, match="does not hold a usable API key") as caught:
            await call(runner)
        assert KEY not in str(caught.value)
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(RunFailed, match="does not hold a usable API key"):
            await call(runner)
        for key in ("one", "two"):
            file.write_text(key + "\n")
            assert (await call(runner))[0] == Outcome(Status.SUCCEEDED, reply="hi")
    assert [r[1]["Authorization"] for r in server.requests] == ["Bearer one", "Bearer two"]


# ---- the end of an answer ---------------------------------------------------------------


async def test_an_answer_that_stays_open_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finish_reason, and then neither [DONE] nor an end: it is not waited for ever."""
    monkeypatch.setattr(calls, "AFTER_FINISH", 0.1)

    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("Hello", "stop"))
        while not to.server.over.wait(0.02):
            to.wfile.write(b"8\r\n: ping\n\n\r\n")

    with serving(answer) as server:
        outcome, _ = await call(config(server, timeout=60.0))
    assert outcome == Outcome(Status.SUCCEEDED, reply="Hello")


async def test_text_after_a_finish_reason_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says "stop" in every event is believed once only: a pause is no end then."""
    monkeypatch.setattr(calls, "AFTER_FINISH", pause := 0.3 * SLACK)

    def answer(to: Scripted) -> None:
        to.begin()
        first, second = (json.dumps(delta(text, "stop")) for text in ("Hello", " wide"))
        to.event(f"{first}\n\ndata: {second}")  # in one piece: nothing comes between them
        to.server.over.wait(3 * pause)
        to.event(delta(" world", "stop"))
        to.event("[DONE]")

    with serving(answer) as server:
        outcome, _ = await call(config(server, timeout=60.0))
    assert outcome.reply == "Hello wide world"


@pytest.mark.parametrize("last", ["[DONE]", delta("", "stop")])
async def test_the_answer_is_read_to_its_end(last: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway stores usage, and logs a client that goes before it has sent all."""
    monkeypatch.setattr(calls, "AFTER_DONE", DEADLINE)  # this machine may be slower than most
    whole = threading.Event()

    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("Hello", "stop"))
        to.event(last)
        to.server.over.wait(0.1)
        to.event({"choices": [], "usage": {"total_tokens": 3}})
        to.wfile.write(b"0\r\n\r\n")
        to.connection.settimeout(DEADLINE)
        # Closed before, there would be a reset, or nothing that was read of it.
        if to.connection.recv(1) == b"":
            whole.set()

    with serving(answer) as server:
        outcome, _ = await call(config(server))
        assert outcome.reply == "Hello"
        assert await trio.to_thread.run_sync(whole.wait, DEADLINE)


async def test_comments_keep_a_slow_start_alive() -> None:
    def answer(to: Scripted) -> None:
        to.begin()
        until = time.monotonic() + 1.6 * timeout
        while time.monotonic() < until:
            to.server.over.wait(timeout / 10)
            to.wfile.write(b"8\r\n: ping\n\n\r\n")
        to.event(delta("Hello", "stop"))
        to.event("[DONE]")

    with serving(answer) as server:
        for timeout in TIMEOUTS:
            with contextlib.suppress(RunFailed):
                outcome, _ = await call(config(server, timeout=timeout))
                break
    assert outcome.reply == "Hello"


async def test_comments_alone_have_a_bound() -> None:
    def answer(to: Scripted) -> None:
        to.begin()
        while not to.server.over.wait(0.01):
            to.wfile.write(b"8\r\n: ping\n\n\r\n")

    with serving(answer) as server:
        message = await failure(config(server, timeout=0.05))
    assert "timed out" in message


# ---- what keeps a call from leaving ------------------------------------------------------


@pytest.fixture
def no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificates are read anew."""
    monkeypatch.setattr(http_trust, "_context", None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


ENVIRONMENT = [
    ("ALL_PROXY", "socks5://user:hunter22@127.0.0.1:1080", "ALL_PROXY names a SOCKS proxy"),
    ("all_proxy", "socks5h://127.0.0.1:1080", "all_proxy names a SOCKS proxy"),
    ("HTTPS_PROXY", "socks4://hunter22@h", "HTTPS_PROXY names a proxy of a kind that is not"),
    ("NO_PROXY", "localhost,[::1]", "NO_PROXY holds '[::1]', which cannot be read; write ::1"),
    ("no_proxy", "fe80::/10", "no_proxy holds 'fe80::/10', which cannot be read; remove it"),
    ("SSL_CERT_FILE", "/no/such.pem", "SSL_CERT_FILE: /no/such.pem: No such file or directory"),
    ("SSL_CERT_FILE", "/etc/passwd", "SSL_CERT_FILE: /etc/passwd holds no certificates"),
    ("SSLKEYLOGFILE", "/no/such/keys", "SSLKEYLOGFILE: /no/such/keys cannot be written"),
]


@pytest.mark.parametrize(("name", "value", "said"), ENVIRONMENT)
async def test_an_environment_that_stops_every_chat(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, no_context: None
) -> None:
    if "socks5" in value:  # whether it is installed here or not
        monkeypatch.setattr(outgoing, "find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(RunFailed) as caught:
        await call(config(1))
    assert str(caught.value).startswith(f"runctld's environment: {said}")
    assert "; " in str(caught.value)
    assert "hunter22" not in str(caught.value)
    problems = [*outgoing.proxy_problems({name: value})]
    problems += outgoing.certificate_problems({name: value})
    assert [p.said for p in problems if said.startswith(p.said[:20])]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "localhost,127.0.0.0/8,::1,.corp,x:80"},
        {"HTTP_PROXY": "proxy:3128", "https_proxy": "https://u:p@proxy"},
        {"ALL_PROXY": "socks4://x", "NO_PROXY": "*"},
        {"SSL_CERT_DIR": "/etc"},
    ],
)
def test_an_environment_that_is_fine(environ: dict[str, str]) -> None:
    assert not [*outgoing.proxy_problems(environ), *outgoing.certificate_problems(environ)]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"HTTP_PROXY": "http://"}, "HTTP_PROXY is no URL of a proxy"),
        ({"HTTP_PROXY": "http://h:x"}, "HTTP_PROXY is no URL of a proxy"),
        ({"http_proxy": "ftp://h", "HTTP_PROXY": "http://h"}, "http_proxy names a proxy"),
        ({"SSL_CERT_DIR": "/no/such"}, "SSL_CERT_DIR: /no/such is no directory"),
    ],
)
def test_an_environment_that_only_doctor_looks_at(environ: dict[str, str], said: str) -> None:
    problems = [*outgoing.proxy_problems(environ), *outgoing.certificate_problems(environ)]
    assert [p.said.startswith(said) for p in problems] == [True]


class Quiet(Server):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A handshake that fails is what is tested."""


@contextmanager
def encrypted(folder: Path, *hosts: str) -> Iterator[Server]:
    """An endpoint with TLS, whose CA is in ``folder``."""
    certificates = Certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.make("endpoint", *hosts))

    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("Hello", "stop"))

    server = Quiet(answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        yield server


@pytest.mark.parametrize(
    ("hosts", "trusted", "said"),
    [
        (("127.0.0.1",), True, ""),
        (("127.0.0.1",), False, "its certificate is not trusted (unable to get local issuer"),
        (("elsewhere",), True, "its certificate is not trusted (IP address mismatch"),
    ],
)
async def test_a_certificate_that_is_not_trusted(
    hosts: tuple[str, ...],
    trusted: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_context: None,
) -> None:
    with encrypted(tmp_path, *hosts) as server:
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        url = f"https://127.0.0.1:{server.server_port}/v1"
        runner = config(server, base_url=url, retry=60.0)
        if not said:
            assert (await call(runner))[0].reply == "Hello"
            return
        message = await failure(runner)  # at once: it does not heal
    assert f"cannot connect: {said}" in message
    assert "SSL_CERT_FILE in runctld's environment" in message


async def test_tls_with_a_server_that_has_none() -> None:
    with serving(lambda to: None) as server:
        url = f"https://127.0.0.1:{server.server_port}/v1"
        message = await failure(config(server, base_url=url, retry=60.0))
    assert "cannot connect: TLS failed (" in message
    assert "http:// and https://?" in message


async def test_a_name_that_is_none() -> None:
    message = await failure(config(1, base_url="http://no.such.invalid/v1"))
    assert "cannot connect (" in message
    assert "cannot connect ()" not in message


async def test_a_proxy_that_refuses(monkeypatch: pytest.MonkeyPatch, no_context: None) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_response(407)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Proxy)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:hunter22@127.0.0.1:{server.server_port}")
        message = await failure(config(1, base_url="https://127.0.0.1:1/v1"))
    assert "the proxy that runctld's environment names does not connect (407" in message
    assert "hunter22" not in message


async def test_a_key_file_without_an_end() -> None:
    runner = ChatRunner("chat", "http://127.0.0.1:1/v1", "m", api_key_file=Path("/dev/zero"))
    with pytest.raises(RunFailed, match="/dev/zero cannot be read: it holds more than 64 KiB"):
        await call(runner)
