"""What others send, and files that they name, are read as far as they can be meant: bombs, and
bodies without an end."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE
from runctl.config import connection, files
from runctl.config.files import read_bounded
from runctl.config.schema import Nats

MIB = 1024 * 1024
#: What a reader may grow by, and what a bomb unpacks to.
GROWS, UNPACKED = 64 * MIB, 400 * MIB


def bomb() -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(4 * MIB)
    packed = b"".join(packer.compress(block) for _ in range(UNPACKED // len(block)))
    return packed + packer.flush()


class Hostile:
    """Answers each POST with 200 and ``body``, or with one that has no end."""

    def __init__(self, body: bytes | None, kind: str = "text/plain") -> None:
        self.asked: list[str | None] = []
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append(self.headers["Accept-Encoding"])
                self.send_response(200)
                self.send_header("Content-Type", kind)
                if body is not None:
                    self.send_header("Content-Encoding", "gzip")
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body or b"")
                    while body is None:
                        outer.sent += self.connection.send(bytes(64 * 1024))

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/x"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def hostile(body: bytes | None) -> Iterator[Hostile]:
    server = Hostile(body)
    try:
        yield server
    finally:
        server.close()


GROWN = """
import resource, sys
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
"""
HOOK = (
    GROWN
    + """
import msgspec, trio
from runctl.config.schema import Config, Hooks as Settings
from runctl.supervisor.upkeep.hooks import Hooks
settings = msgspec.structs.replace(Settings(), on_end=sys.argv[1], timeout=20.0)
hooks = object.__new__(Hooks)
hooks._config = settings
import httpx
before = peak()
trio.run(hooks._post, sys.argv[1], b"{}", "x.hook")
print(peak() - before)
"""
)
TRACES = (
    GROWN
    + """
from runctl.supervisor.host import traces
traces.watch(sys.argv[1])
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
exporter = OTLPSpanExporter(endpoint=sys.argv[1])
before = peak()
print(exporter.export([]).name, file=sys.stderr)
print(exporter.export([]).name, file=sys.stderr)
print(peak() - before)
"""
)


@pytest.mark.parametrize("reader", [HOOK, TRACES], ids=["hook", "traces"])
@pytest.mark.parametrize("body", ["bomb", "endless"])
def test_an_answer_is_not_read_whole(reader: str, body: str) -> None:
    with hostile(bomb() if body == "bomb" else None) as server:
        done = subprocess.run(
            [sys.executable, "-c", reader, server.url],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            preexec_fn=_little_memory,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < GROWS
        assert "FAILURE" not in done.stderr
        assert set(server.asked) == {"identity"}
        assert server.sent < GROWS


def _little_memory() -> None:
    """So that what reads without an end fails, and takes nothing from the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (2048 * MIB, 2048 * MIB))


@contextlib.contextmanager
def nats_that_says(
    words: Callable[[], bytes], after: bytes = b""
) -> Iterator[tuple[str, list[int]]]:
    """Its URL, and how many bytes it got rid of."""
    sent = [0]
    info = json.dumps({"server_id": "x", "version": "2.11.0", "max_payload": MIB, "headers": True})
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            link, _ = listener.accept()
            with link, contextlib.suppress(OSError):
                link.sendall(f"INFO {info}\r\n".encode())
                heard = b""
                while b"PING\r\n" not in heard:
                    if not (data := link.recv(4096)):
                        return
                    heard += data
                link.sendall(b"PONG\r\n" + after)
                while True:
                    sent[0] += link.send(words())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"nats://127.0.0.1:{listener.getsockname()[1]}", sent
        listener.close()
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.mark.parametrize("after", [b"", b"-ERR ", b"INFO {", b"MSG x 1 99999999999\r\n"])
def test_nats_does_not_send_without_an_end(after: bytes) -> None:
    import asyncio

    async def main(url: str) -> None:
        client = connection.new_client(Nats(url))
        closed = asyncio.Event()

        async def on_closed() -> None:
            closed.set()

        await client.connect(url, allow_reconnect=False, closed_cb=on_closed)
        async with asyncio.timeout(DEADLINE):
            await closed.wait()

    with nats_that_says(lambda: b"A" * 65536, after) as (url, sent):
        asyncio.run(main(url))
    assert sent[0] < GROWS


def test_errors_of_nats_are_short() -> None:
    import asyncio

    said: list[str] = []

    async def main(url: str) -> None:
        client = connection.new_client(Nats(url))
        heard = asyncio.Event()

        async def on_error(error: Exception) -> None:
            said.append(str(error))
            heard.set()

        await client.connect(url, allow_reconnect=False, error_cb=on_error)
        async with asyncio.timeout(DEADLINE):
            await heard.wait()
        await client.close()

    words = iter([b"-ERR 'Permissions Violation for Publish to \"" + b"x" * 900_000 + b"\"'\r\n"])
    with nats_that_says(lambda: next(words, b"PING\r\n")) as (url, _):
        asyncio.run(main(url))
    assert max(map(len, said)) < 3000


#: Where a file is named, and whose words tell of it.
FILES = {
    "": "configuration",
    '[nats]\nurl = "tls://127.0.0.1:1"\ncredentials = "/dev/zero"\n': "nats.credentials",
    '[nats]\nurl = "tls://127.0.0.1:1"\ntls_ca = "/dev/zero"\n': "nats.tls_ca",
    '[nats]\nurl = "tls://127.0.0.1:1"\nnkey = "/dev/zero"\n': "nats.nkey",
    '[nats]\ncontext = "/dev/zero"\n': "nats.context",
    '[database]\nurl_file = "/dev/zero"\n': "database.url_file",
}


@pytest.mark.parametrize("text", FILES, ids=FILES.values())
def test_a_file_without_an_end(tmp_path: Path, text: str) -> None:
    file = Path("/dev/zero")
    if text:
        file = tmp_path / "runctld.toml"
        file.write_text(f'executor_id = "x"\nstate_dir = "{tmp_path}/state"\n{text}')
    # What a connection needs is read when one is made.
    command = ["runctl.supervisor.main", "-c", str(file), "--check"]
    if "url = " in text:
        command = ["runctl.cli.main", "-c", str(file), "list"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        preexec_fn=_little_memory,
    )
    assert done.returncode not in (0, 1), done.stderr
    (said,) = done.stderr.splitlines()
    assert "it holds more than" in said
    assert not text or FILES[text] in said


def test_a_pipe_is_read_as_far_as_somebody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIPE", 0.2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is a pipe that has not ended within"):
        read_bounded(pipe, 100)  # nobody is there
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, b"some")
    with pytest.raises(OSError, match="it is a pipe that has not ended within"):
        read_bounded(pipe, 100)  # nor does this one end
    monkeypatch.setattr(files, "PIPE", 60.0)
    os.write(writer, b"x" * 101)
    with pytest.raises(OSError, match="it holds more than"):
        read_bounded(pipe, 100)
    os.close(writer)
    with subprocess.Popen(
        ["sh", "-c", "printf a; sleep 0.1; printf b"], stdout=subprocess.PIPE
    ) as p:
        assert p.stdout is not None
        assert read_bounded(Path(f"/dev/fd/{p.stdout.fileno()}"), 100) == b"ab"
