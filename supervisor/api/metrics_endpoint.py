"""/metrics and /healthz: what is counted, and what is read when somebody asks."""

from __future__ import annotations

import hmac
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from ...config.integrations import read_token
from ...config.schema import Config, FileError
from ..execution.registry import Registry
from ..host.metrics import Prometheus
from ..output.publisher import Streams
from ..queue.engine import Durable

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("runctld.metrics")

#: For NATS and the database to answer, seconds.
PATIENCE = 2.0
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Scrape:
    """Answers from its start on: that the daemon is not ready, until ``ready``."""

    def __init__(
        self,
        config: Config,
        meters: Prometheus,
        registry: Registry,
        durable: Durable,
        keeper_silent: Callable[[], float],
    ) -> None:
        self._keeper_silent = keeper_silent
        self._config = config
        self._meters = meters
        self._registry = registry
        self._durable = durable
        self._parts: tuple[Client, Streams] | None = None
        #: Reads of the token at once: its file system may hang.
        self._reads = trio.CapacityLimiter(1)
        #: Why the token could not be read, as the log says already.
        self._unread: str | None = None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Raises ConfigError, Unavailable."""
        from .http_server import listen, serve  # and h11 with it

        address = self._config.metrics.listen
        assert address is not None
        listeners = await listen(address, "metrics.listen")
        log.info("metrics at http://%s/metrics", address)
        task_status.started()
        await serve(listeners, self._answer)

    def ready(self, client: Client, streams: Streams) -> None:
        self._parts = client, streams

    def stopping(self) -> None:
        self._parts = None

    async def _answer(self, path: str, authorization: bytes) -> tuple[int, str, bytes]:
        refused = await self._refused(authorization)
        if refused is not None:
            return refused
        if path == "/metrics":
            read = await self._read(self._config.hooks.on_end is not None)
            running = Counter(live.spec.runner for live in self._registry)
            return 200, _TEXT, self._meters.render(running, read)
        if path == "/healthz":
            ready = bool((await self._read(False))["ready"])
            return (200, _TEXT, b"ready\n") if ready else (503, _TEXT, b"not ready\n")
        return 404, _TEXT, b"try /metrics or /healthz\n"

    async def _refused(self, authorization: bytes) -> tuple[int, str, bytes] | None:
        """The answer to who does not show the token, where one is asked for; else None."""
        file = self._config.metrics.token_file
        if file is None:
            return None
        scheme, _, shown = authorization.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return 401, _TEXT, b"show the token of metrics.token_file: Authorization: Bearer\n"
        problem = f"{file} cannot be read: its file system has not answered for {PATIENCE:g} s"
        token = None
        with trio.move_on_after(PATIENCE):
            try:
                token = await trio.to_thread.run_sync(
                    read_token, file, abandon_on_cancel=True, limiter=self._reads
                )
            except FileError as error:
                problem = str(error)
        if token is None:
            if problem != self._unread:
                log.error("metrics.token_file: %s; until then nobody gets metrics", problem)
            self._unread = problem
            return 503, _TEXT, b"the token cannot be read: see the daemon's log\n"
        self._unread = None
        if not hmac.compare_digest(token, shown.strip()):
            return 401, _TEXT, b"this is not the token of metrics.token_file\n"
        return None

    async def _read(self, hooks: bool) -> dict[str, float]:
        """What could be read in time. Ready: started, not stopping, and both NATS and the
        database answer, and the stream takes records."""
        found: dict[str, float] = {
            "ready": 0,
            "nats_connected": 0,
            "stream_max_bytes": self._config.stream.max_bytes,
        }
        if self._parts is None:
            return found
        client, streams = self._parts
        found["nats_connected"] = int(client.is_connected)

        async def stream() -> None:
            with trio.move_on_after(PATIENCE):
                try:
                    found["stream_bytes"], _ = await streams.info()
                except Exception as error:
                    log.debug("stream: %r", error)

        async def database() -> None:
            with trio.move_on_after(PATIENCE):
                try:
                    rows = self._durable.rows
                    found["runs_queued"] = await rows.count_runs("ENQUEUED")
                    found["hooks_waiting"] = await rows.count_hooks() if hooks else 0
                except Exception as error:
                    log.debug("database: %r", error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream)
            nursery.start_soon(database)
        stores = found["nats_connected"] and streams.life.unfit is None
        stores = stores and self._keeper_silent() < PATIENCE
        if stores and {"stream_bytes", "runs_queued"} <= found.keys():
            found["ready"] = 1
        return found
