"""Packages that only some configurations need: named before anything is started."""

from __future__ import annotations

from importlib.util import find_spec

from ..config.schema import Config
from .errors import ConfigError


def require(config: Config) -> None:
    """Raises ConfigError, when ``config`` asks for what is not installed."""
    if config.metrics.listen is not None and not _there("prometheus_client"):
        raise ConfigError(
            f"{config.source}: metrics.listen: needs a package that is not installed:"
            " pip install prometheus-client, or remove the key"
        )
    if config.traces.endpoint is not None and not all(
        map(_there, ("opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"))
    ):
        raise ConfigError(
            f"{config.source}: traces.endpoint: needs packages that are not installed:"
            " pip install 'runctl[traces]', or remove the key"
        )


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False
