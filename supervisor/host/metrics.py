"""What the daemon counts. ``Meters`` counts nothing; ``Prometheus`` is one that does.

Names and labels are an interface (docs/hooks-and-metrics.md). Labels are bounded by the
configuration: runners and statuses, never threads or runs.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping

from ...protocol import __version__
from ...protocol.model import Status


class Meters:
    """Each method is called where it happens, once. Times are seconds."""

    def run_ended(self, status: Status, runner: str) -> None: ...

    def waited(self, seconds: float, runner: str) -> None:
        """From a run's submit to its first dispatch."""

    def dispatched(self, seconds: float) -> None:
        """From an attempt's claim to the start of its work."""

    def stored(self, chunks: int, size: int) -> None: ...

    def reset(self) -> None: ...

    def fenced(self) -> None: ...

    def adopted(self) -> None: ...

    def went_on(self) -> None: ...

    def aborted(self, seconds: float) -> None:
        """From an abort's request to the verified end of its processes."""

    def broker_restarted(self) -> None: ...

    def ready(self, recovered: int, seconds: float) -> None: ...

    def hook(self, delivered: bool) -> None: ...


_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Prometheus(Meters):
    """With a registry of its own; ``render`` is what Prometheus reads."""

    def __init__(self, executor: str, runners: Callable[[], Collection[str]]) -> None:
        """``runners``: the names of those that are configured now."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        from prometheus_client.process_collector import ProcessCollector

        own = self._registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self._runners = runners
        Gauge("runctl_build_info", "1.", ("version", "python", "executor"), registry=own).labels(
            __version__, platform.python_version(), executor
        ).set(1)
        self._ended = Counter(
            "runctl_runs_ended", "Runs that ended here.", ("status", "runner"), registry=own
        )
        for runner in runners():  # so that rates see the first one
            for status in Status:
                if status.terminal:
                    self._ended.labels(status, runner)
        self._running = Gauge(
            "runctl_runs_running", "Runs in flight on this executor.", ("runner",), registry=own
        )
        self._waited = Histogram(
            "runctl_queue_wait_seconds",
            "From a run's submit to its first dispatch.",
            ("runner",),
            buckets=_WAITS,
            registry=own,
        )
        self._dispatched = Histogram(
            "runctl_dispatch_latency_seconds",
            "From an attempt's claim to the start of its work.",
            buckets=_FAST,
            registry=own,
        )
        self._chunks = Counter("runctl_output_chunks", "Chunks stored.", registry=own)
        self._bytes = Counter("runctl_output_bytes", "Bytes of output stored.", registry=own)
        self._resets = Counter("runctl_resets", "Attempts that began.", registry=own)
        self._fenced = Counter(
            "runctl_fenced_writes", "Writes refused for a newer attempt's.", registry=own
        )
        self._adopted = Counter(
            "runctl_adopted_ends", "Ends found in the stream by a replay.", registry=own
        )
        self._went_on = Counter(
            "runctl_adopted_runs",
            "Runs that outlived an earlier daemon and went on.",
            registry=own,
        )
        self._aborted = Histogram(
            "runctl_abort_seconds",
            "From an abort's request to the end of the processes.",
            buckets=_FAST,
            registry=own,
        )
        self._broker = Counter(
            "runctl_broker_restarts", "Restarts of the embedded nats-server.", registry=own
        )
        self._recovered = Gauge(
            "runctl_recovered_runs", "Unfinished runs found at the start.", registry=own
        )
        self._recovery = Gauge(
            "runctl_recovery_seconds", "From the start of the daemon to ready.", registry=own
        )
        self._hooks = Counter("runctl_hooks", "Hooks of ended runs.", ("result",), registry=own)
        for result in ("delivered", "failed"):
            self._hooks.labels(result)
        #: Read when Prometheus asks; not a number when it could not be.
        self._read = {
            name: Gauge(f"runctl_{name}", text, registry=own)
            for name, text in (
                ("runs_queued", "Runs that wait, of all executors of the database."),
                ("hooks_waiting", "Hooks that wait or are tried, of all executors."),
                ("stream_bytes", "Size of all stored output."),
                ("stream_max_bytes", "[stream] max_bytes."),
                ("nats_connected", "1 when connected to NATS."),
                ("ready", "1 when the daemon is ready, as /healthz says."),
            )
        }

    def run_ended(self, status: Status, runner: str) -> None:
        self._ended.labels(status, self._known(runner)).inc()

    def waited(self, seconds: float, runner: str) -> None:
        self._waited.labels(self._known(runner)).observe(max(0.0, seconds))

    def dispatched(self, seconds: float) -> None:
        self._dispatched.observe(seconds)

    def stored(self, chunks: int, size: int) -> None:
        self._chunks.inc(chunks)
        self._bytes.inc(size)

    def reset(self) -> None:
        self._resets.inc()

    def fenced(self) -> None:
        self._fenced.inc()

    def adopted(self) -> None:
        self._adopted.inc()

    def went_on(self) -> None:
        self._went_on.inc()

    def aborted(self, seconds: float) -> None:
        self._aborted.observe(seconds)

    def broker_restarted(self) -> None:
        self._broker.inc()

    def ready(self, recovered: int, seconds: float) -> None:
        self._recovered.set(recovered)
        self._recovery.set(seconds)

    def hook(self, delivered: bool) -> None:
        self._hooks.labels("delivered" if delivered else "failed").inc()

    def render(self, running: Mapping[str, int], read: Mapping[str, float]) -> bytes:
        """In Prometheus's text format. ``running``: by runner."""
        from prometheus_client import generate_latest

        counts = dict.fromkeys(self._runners(), 0)
        for runner, count in running.items():
            name = self._known(runner)
            counts[name] = counts.get(name, 0) + count
        self._running.clear()
        for runner, count in counts.items():
            self._running.labels(runner).set(count)
        for name, gauge in self._read.items():
            gauge.set(read.get(name, float("nan")))
        return generate_latest(self._registry)

    def _known(self, runner: str) -> str:
        """A run may be left of a runner that is no longer configured."""
        return runner if runner in self._runners() else "other"
