"""A watcher over HTTP: it comes back as browsers do, to one gateway or another, and shows the last
event that it has seen."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx

#: Seconds until it comes back. A gateway that is stopped says nothing for some seconds.
PAUSE, SILENCE = 0.1, 8.0
#: Nobody there; not known yet; not for now.
AGAIN = (404, 429, 503)


class HttpWatcher:
    """Of ``run``, at the gateways of these ``ports``. It breaks its connection after so many events
    each as ``cuts`` has, as if it had been without a network."""

    def __init__(self, run: str, ports: Sequence[int], cuts: Sequence[int] = ()) -> None:
        self._run = run
        self._ports = itertools.cycle(ports)
        self._last = ""
        self._cuts = [*cuts]
        #: How often it has come back behind an event.
        self.returns = 0

    async def watch(self, hear: Callable[[dict[str, Any]], None]) -> None:
        """Until the run's end; ``hear`` gets what ``attach --json`` prints. Raises RuntimeError
        for an answer that makes no sense."""
        timeout = httpx.Timeout(SILENCE, read=2 * SILENCE)
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            while True:
                try:
                    async for event in self._connect(client):
                        hear(event)
                        if event["type"] == "end":
                            return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(PAUSE)

    async def _connect(self, client: httpx.AsyncClient) -> AsyncIterator[dict[str, Any]]:
        """The events of one connection."""
        url = f"http://127.0.0.1:{next(self._ports)}/v1/runs/{self._run}/events"
        shown = {"Last-Event-ID": self._last} if self._last else {}
        async with client.stream("GET", url, headers=shown) as answer:
            if answer.status_code in AGAIN:
                return
            self.returns += bool(shown)
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                raise RuntimeError(f"{url} after {self._last!r}: {answer.status_code} {text}")
            rest, left = b"", self._cuts[0] if self._cuts else 0
            async for data in answer.aiter_bytes():
                *frames, rest = (rest + data).split(b"\n\n")
                for frame in frames:
                    fields = dict(
                        line.split(": ", 1)
                        for line in frame.decode().split("\n")
                        if ": " in line and not line.startswith(":")
                    )
                    self._last = fields.get("id", self._last)
                    if "data" in fields:
                        yield json.loads(fields["data"])
                        left -= 1
                        if not left:
                            del self._cuts[0]
                            return
