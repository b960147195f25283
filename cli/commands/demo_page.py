"""The gateway's page beside the demo: where it is, and what a browser that comes late is told."""

from __future__ import annotations

import json
import socket
import time
from importlib.util import find_spec
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from ...config.schema import RunctlError
from .gateway import NEEDED

#: Between two tries to connect, and for an answer, seconds.
PAUSE, ANSWER_WITHIN = 0.05, 20.0


class PageFailed(RunctlError):
    """The gateway does not answer as it should."""


class DemoPage:
    """On a free loopback port. ``there``: whether the gateway's packages are installed."""

    def __init__(self) -> None:
        self.there = all(map(find_spec, NEEDED))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self._opener = build_opener(ProxyHandler({}))

    @property
    def url(self) -> str:
        return f"http://{self._address}/"

    def configuration(self) -> str:
        """A section of TOML that has the daemon start it."""
        return f'[gateway]\nlisten = "{self._address}"\n' if self.there else ""

    def wait_ready(self, patience: float) -> None:
        """Until it serves the page, ``patience`` seconds at most. Raises PageFailed."""
        deadline = time.monotonic() + patience
        while True:
            try:
                self._get("")
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise PageFailed(f"no page at {self.url}: {error}") from error
                time.sleep(PAUSE)

    def read_chunks(self, run: str) -> list[str]:
        """The output of ``run``, which has ended, as a browser gets it now: its chunks behind the
        last reset. Raises PageFailed."""
        try:
            text = self._get(f"v1/runs/{run}/events")
        except OSError as error:
            raise PageFailed(f"no events of {run} at {self.url}: {error}") from error
        found: list[str] = []
        for line in text.split("\n"):
            if not line.startswith("data: "):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if event["type"] == "reset":
                found = []
            elif event["type"] == "chunk":
                found.append(event["data"])
        return found

    def _get(self, path: str) -> str:
        """Raises OSError."""
        try:
            with self._opener.open(self.url + path, timeout=ANSWER_WITHIN) as answer:
                return str(answer.read().decode())
        except URLError as error:
            raise OSError(str(error.reason)) from error
