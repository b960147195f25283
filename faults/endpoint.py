"""A chat endpoint that keeps the work's journal: what each call was sent, and when."""

from __future__ import annotations

import itertools
import json
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .work import Journal, text


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # chunked, so that a cut is not taken for an end
    server: Endpoint

    def do_POST(self) -> None:
        self.close_connection = True
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        messages = body["messages"]
        wanted = json.loads(messages[-1]["content"])
        label = f"c{next(self.server.calls)}"
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        self.server.histories[label] = said
        journal = Journal(str(self.server.journal), wanted["run"], label, label)
        try:
            self._stream(wanted, label, journal)
        except ConnectionError:
            journal.note("cut")
        finally:
            journal.close()

    def _stream(self, wanted: dict[str, object], label: str, journal: Journal) -> None:
        run, parts = str(wanted["run"]), int(str(wanted["parts"]))
        pause, size = float(str(wanted["pause"])), int(str(wanted["size"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        journal.note("begin")
        at = 0.0
        for part in range(1, parts + 1):
            at = time.monotonic()
            self._look()
            journal.note("part", part, size, at)
            delta = {"content": text(run, label, part, size)}
            finish = "stop" if part == parts else None
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            self._send(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            if part < parts:
                time.sleep(pause)
        journal.note("end", at=at)  # the caller is done with what says so
        self._send(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _look(self) -> None:
        """Raises ConnectionError when the caller is gone: writing to it would not tell
        until later."""
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(
            1, socket.MSG_PEEK
        ):
            raise ConnectionResetError("the caller went away")

    def _send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, format: str, *args: object) -> None:
        pass


class Endpoint(ThreadingHTTPServer):
    """On loopback. ``journal``: where calls are noted, a round's own. ``histories``: the
    earlier replies that each call was given."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.calls = itertools.count(1)
        self.histories: dict[str, list[str]] = {}
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
