"""A small OpenAI-compatible server for demos and tests.

Every call to ``/v1/chat/completions`` streams ``--chunks`` deltas, ``--interval``
seconds apart. All deltas of one call carry the time at which that call began, so a
reply shows by itself which call it came from.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # chunked, so that a cut is not taken for an end
    server: MockServer

    def do_POST(self) -> None:
        self.close_connection = True
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
            if self.path.rstrip("/") != "/v1/chat/completions":
                self._refuse(404, "no such path; POST to /v1/chat/completions")
            elif not isinstance(body, dict) or not body.get("stream"):
                self._refuse(400, 'only {"stream": true} is served')
            else:
                self._stream(str(body.get("model")))
        except ValueError as error:
            self._refuse(400, f"not JSON: {error}")
        except ConnectionError:
            pass  # the client went away: what demos do

    def _stream(self, model: str) -> None:
        began, clock = time.time(), time.monotonic()
        wall = datetime.fromtimestamp(began).strftime("%H:%M:%S.%f")[:-3]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = self.server.chunks
        for n in range(1, count + 1):
            time.sleep(max(0.0, clock + (n - 1) * self.server.interval - time.monotonic()))
            choice = {
                "index": 0,
                "delta": {"content": f"chunk-{n} @ {wall} ({int(began * 1000)})\n"},
                "finish_reason": "stop" if n == count else None,
            }
            event = {"object": "chat.completion.chunk", "model": model, "choices": [choice]}
            self._send(f"data: {json.dumps(event)}\n\n".encode())
        self._send(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _refuse(self, status: int, message: str) -> None:
        data = json.dumps({"error": {"message": message}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the output belongs to whoever started this."""


class MockServer(ThreadingHTTPServer):
    """On loopback; ``server_port`` is where."""

    daemon_threads = True
    block_on_close = False  # a stream in flight does not hold up the end

    def __init__(self, port: int = 0, chunks: int = 20, interval: float = 0.5) -> None:
        self.chunks = chunks
        self.interval = interval
        super().__init__(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(prog="runctl.cli.commands.mock_endpoint", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds")
    options = parser.parse_args()
    with MockServer(options.port, options.chunks, options.interval) as server:
        print(f"ready {server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
