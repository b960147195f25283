"""What DBOS's OpenTelemetry spans need of us. Only imported with [traces] endpoint."""

from __future__ import annotations

import io
import logging
import time
from typing import Any

import requests
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import trace_exporter

from ...config.secrets import hide_secrets
from ...protocol.model import RunSpec

log = logging.getLogger("runctld.traces")

#: A collector that is away is told of this often, seconds.
TOLD = 60.0
#: Bytes of a collector's answer that are read, if it says that it has no more.
ANSWER = 4096


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
    _read_little()
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    # DBOS misses an endpoint for logs, which are ours to write.
    logging.getLogger("dbos").addFilter(lambda x: "OTLP is enabled" not in x.getMessage())


def _read_little() -> None:
    """Have DBOS make exporters that do not read, and unpack, whatever a collector answers."""
    module: Any = trace_exporter
    own = module.OTLPSpanExporter

    def exporter(**arguments: Any) -> Any:
        return own(**arguments, session=_session())

    module.OTLPSpanExporter = exporter


def _session() -> requests.Session:
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    session.hooks["response"].append(_shorten)
    return session


def _shorten(answer: Any, **_: object) -> None:
    """Before ``requests`` reads it."""
    raw, left = answer.raw, getattr(answer.raw, "length_remaining", None)
    words = b""
    if left is not None and left <= ANSWER and not answer.headers.get("Content-Encoding"):
        words = raw.read(ANSWER, decode_content=False)
        raw.release_conn()
    else:
        raw.close()
    answer.raw = io.BytesIO(words)


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
