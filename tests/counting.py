"""An endpoint on loopback that counts what it generates, and can go on with a cut reply."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from conftest import DEADLINE


class Generation:
    """A reply as it comes into being, of ``tokens``: one more each ``pause`` seconds, but no
    more than ``upto``, which grows."""

    def __init__(self, name: str, tokens: list[str], pause: float) -> None:
        self.name = name
        self.tokens = tokens
        self.pause = pause
        self.events: list[dict[str, Any]] = []
        self.status = "in_progress"
        #: How its stream ends, and with what.
        self.end: tuple[str, dict[str, Any]] = ("completed", {})

    def add(self, kind: str, **more: Any) -> None:
        self.events.append({"type": kind, "sequence_number": len(self.events), **more})

    def describe(self, status: str, **more: Any) -> dict[str, Any]:
        return {"id": self.name, "object": "response", "status": status, "output": [], **more}


class Endpoint(ThreadingHTTPServer):
    """``reply``: the tokens of every reply. ``pause``: seconds before each; ``upto``: so many are
    generated in all, until it is raised. ``repeats``: an answer begins with what was sent of it.

    ``generated``: every token that was generated, in order; ``requests``: every request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, reply: list[str], pause: float = 0.0) -> None:
        self.reply = reply
        self.pause = pause
        self.upto = len(reply)
        self.repeats = False
        #: An answer to a request to go on, in place of going on: its status and its body.
        self.refuses: tuple[int, bytes] | None = None
        #: Breaks connections off so many tokens after they began.
        self.cut_after: int | None = None
        #: Reasoning that comes before each answer.
        self.reasons = ""
        self.finish = "stop"
        self.generated: list[str] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.generations: list[Generation] = []
        self.cancelled: list[str] = []
        #: Holds the first event of a new response back.
        self.named = threading.Event()
        self.named.set()
        self.changed = threading.Condition()
        self.over = False
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def allow(self, upto: int) -> None:
        with self.changed:
            self.upto = upto
            self.changed.notify_all()

    def wait(self, what: Any) -> None:
        """With ``changed`` held."""
        assert self.changed.wait_for(lambda: self.over or what(), DEADLINE)
        if self.over:
            raise ConnectionAbortedError

    def generate(self, token: str, look: Callable[[], None] = lambda: None) -> None:
        """``look`` raises ConnectionError when nobody listens any more."""
        if self.pause:
            time.sleep(self.pause)
        with self.changed:
            self.wait(lambda: len(self.generated) < self.upto)
            look()
            self.generated.append(token)
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.over = True
            self.changed.notify_all()
        self.named.set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        self._serve("POST", json.loads(self.rfile.read(size) or b"null"))

    def do_GET(self) -> None:
        self._serve("GET", None)

    def _serve(self, method: str, body: Any) -> None:
        self.close_connection = True
        self.server.requests.append((method, self.path, body))
        path, _, query = self.path.partition("?")
        with suppress(ConnectionError):
            if method == "POST" and path == "/v1/chat/completions":
                self._complete(body)
            elif method == "POST" and path == "/v1/responses":
                self._respond(body)
            elif path.startswith("/v1/responses/"):
                name, _, verb = path.removeprefix("/v1/responses/").partition("/")
                self._known(name, verb, dict(urllib.parse.parse_qsl(query)))
            else:
                self._refuse(404, b"{}")

    # ---- chat completions ----------------------------------------------------------------------

    def _complete(self, body: Any) -> None:
        server, last = self.server, body["messages"][-1]
        begun = last["content"] if last["role"] == "assistant" else ""
        if begun and server.refuses is not None:
            self._refuse(*server.refuses)
            return
        whole = "".join(server.reply)
        assert whole.startswith(begun)
        place, at = 0, 0
        while at < len(begun):
            at += len(server.reply[place])
            place += 1
        tokens = server.reply[place:]
        if at > len(begun):  # it was cut amid a token
            tokens.insert(0, whole[len(begun) : at])
        self._begin()
        if server.reasons:
            self._delta({"reasoning_content": server.reasons})
        if begun and server.repeats:
            self._delta({"role": "assistant", "content": begun})
        for count, token in enumerate(tokens):
            if count == server.cut_after:
                server.cut_after = None
                return
            server.generate(token, self._look)
            self._delta({"content": token})
        self._delta({}, server.finish)
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _look(self) -> None:
        there = select.select([self.connection], [], [], 0)[0]
        if there and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the caller went away")

    def _delta(self, delta: Any, finish: str | None = None) -> None:
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    # ---- responses -----------------------------------------------------------------------------

    def _respond(self, body: Any) -> None:
        server = self.server
        made = Generation(f"resp_{len(server.generations) + 1}", server.reply, server.pause)
        server.generations.append(made)
        made.add("response.created", response=made.describe("queued"))
        made.add("response.in_progress", response=made.describe("in_progress"))
        if server.reasons:
            made.add("response.reasoning_summary_text.delta", delta=server.reasons)
        thread = threading.Thread(target=self._generate, args=[made], daemon=True)
        thread.start()
        server.named.wait(DEADLINE)
        self._send_events(made, -1)

    def _generate(self, made: Generation) -> None:
        server = self.server
        text = ""
        with suppress(ConnectionAbortedError):
            for token in made.tokens:
                if made.status != "in_progress":
                    break
                server.generate(token)
                text += token
                with server.changed:
                    made.add("response.output_text.delta", delta=token, item_id="msg_1")
                    server.changed.notify_all()
            with server.changed:
                status, more = made.end if made.status == "in_progress" else (made.status, {})
                part = {"type": "output_text", "text": text}
                output = [{"type": "message", "content": [part]}]
                made.status = status
                response = {**made.describe(status, **more), "output": output}
                made.add(f"response.{status}", response=response)
                server.changed.notify_all()

    def _known(self, name: str, verb: str, params: dict[str, str]) -> None:
        server = self.server
        made = next((x for x in server.generations if x.name == name), None)
        if verb == "cancel" and made is not None:
            with server.changed:
                made.status = "cancelled"
                server.cancelled.append(name)
                server.changed.notify_all()
            self._refuse(200, json.dumps(made.describe("cancelled")).encode())
        elif server.refuses is not None:
            self._refuse(*server.refuses)
        elif made is None:
            self._refuse(404, b'{"error": {"message": "Response not found."}}')
        else:
            assert params.get("stream") == "true", params
            self._send_events(made, int(params.get("starting_after", "-1")))

    def _send_events(self, made: Generation, after: int) -> None:
        server, sent = self.server, 0
        self._begin()
        at = after + 1
        while True:
            with server.changed:
                server.wait(lambda at=at: len(made.events) > at)
                event = made.events[at]
            if event["type"].endswith("text.delta"):
                if sent == server.cut_after:
                    server.cut_after = None
                    return
                sent += 1
            self._event(event)
            at += 1
            if event["type"] in ("response.completed", "response.failed", "response.incomplete"):
                break
            if event["type"] == "response.cancelled":
                break
        self.wfile.write(b"0\r\n\r\n")

    # ---- HTTP ----------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, data: Any) -> None:
        raw = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))

    def _refuse(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def counting(reply: list[str], pause: float = 0.0) -> Iterator[Endpoint]:
    server = Endpoint(reply, pause)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.close()
        server.shutdown()
        thread.join()
        server.server_close()
