"""Many clients of one event stream in a process, for ``gateway``.

``python -m bench.sse_crowd PORT PATH COUNT LINES`` says a line when all are connected, and a line
of JSON, every latency in ms, when each has seen so many events that hold the time (ns) at which
they were written. The connections stay; a last line says how long, in ms, it took until all had
been closed by the server.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

_STAMP = re.compile(rb'"data":"(\d+)\\n"')


class Crowd:
    def __init__(self, count: int, lines: int) -> None:
        self.left = count
        self.wanted = count * lines
        self.connecting = count
        self.latencies: list[float] = []
        self.all_there, self.all_seen, self.all_left = (asyncio.Event() for _ in range(3))
        self.first_left = 0.0


class Client(asyncio.Protocol):
    def __init__(self, crowd: Crowd, request: bytes) -> None:
        self._crowd = crowd
        self._request = request
        self._rest = b""
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now, crowd = time.time_ns(), self._crowd
        if not self._answered:
            assert data.startswith(b"HTTP/1.1 200 "), data
            self._answered = True
            crowd.connecting -= 1
            if not crowd.connecting:
                crowd.all_there.set()
        *frames, self._rest = (self._rest + data).split(b"\n\n")
        for frame in frames:
            if (found := _STAMP.search(frame)) is not None:
                crowd.latencies.append((now - int(found[1])) / 1e6)
        if len(crowd.latencies) >= crowd.wanted:
            crowd.all_seen.set()

    def connection_lost(self, error: Exception | None) -> None:
        crowd = self._crowd
        crowd.first_left = crowd.first_left or time.monotonic()
        crowd.left -= 1
        if not crowd.left:
            crowd.all_left.set()


async def main(port: int, path: str, count: int, lines: int) -> None:
    crowd = Crowd(count, lines)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.create_connection(lambda: Client(crowd, request), "127.0.0.1", port)
    await crowd.all_there.wait()
    print("there", flush=True)
    await crowd.all_seen.wait()
    print(json.dumps(crowd.latencies), flush=True)
    await crowd.all_left.wait()
    print((time.monotonic() - crowd.first_left) * 1e3, flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
