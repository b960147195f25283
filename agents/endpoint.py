"""The model: it calls a tool unless it sees that one was called, and then answers slowly. It
counts."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .dialects import Ask, Dialect, completions, messages, responses

DIALECTS: tuple[Dialect, ...] = (messages, responses, completions)
#: Of an answer, and seconds between two of them.
WORDS, PAUSE = 20, 0.3
#: After so many words an answer is held, if answers are.
HALF = 5
#: Between two looks whether it still is, seconds.
LOOK = 0.05


@dataclass
class Generation:
    """What the model was asked for as an agent. ``calls``: the tool; else it answers.
    ``history``: what it was told, as JSON."""

    number: int
    calls: bool
    history: str

    @property
    def answer(self) -> str:
        return "".join(self.words())

    def words(self) -> Iterator[str]:
        for n in range(1, WORDS + 1):
            yield f"{' ' if n > 1 else ''}g{self.number}w{n}"


class Endpoint(ThreadingHTTPServer):
    """On loopback. ``command``: what the tool is to run. ``changed`` is called, in some thread,
    whenever something is news."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self, command: str, changed: Callable[[], None] = lambda: None, pause: float = PAUSE
    ) -> None:
        self.command = command
        self.pause = pause
        self.changed = changed
        self.generations: list[Generation] = []
        #: What was asked besides, such as titles: paths.
        self.asides: list[str] = []
        #: Hosts that somebody wanted to reach, as this is everyone's proxy.
        self.outside: set[str] = set()
        #: What cannot be answered here: a line each.
        self.strange: list[str] = []
        #: How many answers have come to their half, where they stop while they are held.
        self.halves = 0
        self.held = threading.Event()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def begin(self, ask: Ask) -> Generation:
        with self._lock:
            made = Generation(len(self.generations) + 1, not ask.has_result, ask.history)
            self.generations.append(made)
        self.changed()
        return made

    def note_half(self) -> None:
        with self._lock:
            self.halves += 1
        self.changed()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # who is killed amid a request

    def close(self) -> None:
        self.held.clear()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0]
        dialect = next((x for x in DIALECTS if path.endswith(x.PATH)), None)
        if dialect is None:
            self.server.asides.append(path)
            self._answer({"input_tokens": 10})  # how many a prompt has, or telemetry
            return
        ask = dialect.read(json.loads(data))
        if not ask.shell:
            self.server.asides.append(path)
            if ask.streams:
                self._stream(dialect.say(ask, ["A", " title"]))
            else:
                self._answer(dialect.whole(ask, "A title"))
        elif not ask.streams:
            self.server.strange.append(f"{path}: asked for an answer in one piece")
            self._answer({"error": {"message": "answers are streamed here"}}, 400)
        elif (made := self.server.begin(ask)).calls:
            self._stream(dialect.call(ask, self.server.command))
        else:
            self._stream(dialect.say(ask, self._speak(made)))

    def _speak(self, made: Generation) -> Iterator[str]:
        for n, word in enumerate(made.words(), 1):
            yield word
            time.sleep(self.server.pause)
            if n == HALF:
                self.server.note_half()
                while self.server.held.is_set():
                    self._look()
                    time.sleep(LOOK)

    def _look(self) -> None:
        """Raises ConnectionError when the caller is gone: writing to it would not tell
        until later."""
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(
            1, socket.MSG_PEEK
        ):
            raise ConnectionResetError("the caller went away")

    def _stream(self, events: Iterable[bytes]) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")  # so that a cut is not taken for an end
        self.end_headers()
        for data in events:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, value: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if "://" in self.path:
            self._refuse()
        else:
            self.server.asides.append(self.path)
            self._answer({"object": "list", "data": []})  # such as which models there are

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_CONNECT(self) -> None:
        self._refuse()

    def _refuse(self) -> None:
        self.close_connection = True
        self.server.outside.add(self.path.partition("://")[2] or self.path)
        self._answer({"error": "loopback only"}, 403)

    def log_message(self, format: str, *args: object) -> None:
        pass
