"""The least that a server of events does, for ``gateway``: a loop in uvicorn.

``python -m bench.sse_floor PORT COUNT LINES INTERVAL`` sends an event with the time (ns) to all,
again and again, once COUNT are connected.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import uvicorn


class Floor:
    def __init__(self, count: int, lines: int, interval: float) -> None:
        self._count, self._lines, self._interval = count, lines, interval
        self._sends: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._sends.append(send)
        if len(self._sends) == self._count:
            asyncio.create_task(self._publish())  # noqa: RUF006  # the process ends after it
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _publish(self) -> None:
        await asyncio.sleep(1)
        for n in range(self._lines):
            stamp = b'{"type":"chunk","seq":%d,"data":"%d\\n"}' % (n, time.time_ns())
            body = b"id: 1.%d\nevent: chunk\ndata: %s\n\n" % (n, stamp)
            for send in self._sends:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(self._interval)


def main(port: int, count: int, lines: int, interval: float) -> None:
    app = Floor(count, lines, interval)
    uvicorn.run(app, port=port, lifespan="off", http="httptools", log_level="error")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
