"""What DBOS's OpenTelemetry spans need of us. Only imported with [traces] endpoint."""

from __future__ import annotations

import logging
import time

from opentelemetry import trace

from ..config.secrets import hide_secrets
from .model import RunSpec

log = logging.getLogger("runctld.traces")

#: A collector that is away is told of this often, seconds.
TOLD = 60.0


class _Seldom(logging.Handler):
    """The exporter complains at each of its tries."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(logging.WARNING)
        self._endpoint = hide_secrets(endpoint)
        self._last = -TOLD

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() - self._last >= TOLD:
            self._last = time.monotonic()
            words = " ".join(record.getMessage().split())
            log.warning("traces are not taken by %s: %s", self._endpoint, words[:300])


def watch(endpoint: str) -> None:
    library = logging.getLogger("opentelemetry")
    library.propagate = False
    library.handlers = [_Seldom(endpoint)]
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    # DBOS misses an endpoint for logs, which are ours to write.
    logging.getLogger("dbos").addFilter(lambda x: "OTLP is enabled" not in x.getMessage())


def describe(run: RunSpec, attempt: int) -> None:
    """On the span that DBOS has opened for the workflow we are in."""
    span = trace.get_current_span()
    span.set_attribute("runctl.run", run.run)
    span.set_attribute("runctl.thread", run.thread)
    span.set_attribute("runctl.runner", run.runner)
    span.set_attribute("runctl.attempt", attempt)


def flush() -> None:
    """Send what has ended; takes long when nobody answers."""
    getattr(trace.get_tracer_provider(), "shutdown", lambda: None)()
