"""Packages that only some configurations need, or that must be of one version: named before
anything is started."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ...config.connection import find_missing_package
from ...config.schema import AcpRunner, Config
from ...protocol.errors import ConfigError

#: Of these we use what is private to them: another minor version may have it no more.
PINNED = {"dbos": "3.4", "nats-py": "2.16"}


def require(config: Config) -> None:
    """Raises ConfigError, when ``config`` asks for what is not installed, or what is
    installed cannot be used."""
    for package, wanted in PINNED.items():
        _require_version(package, wanted)
    if config.metrics.listen is not None and not _there("prometheus_client"):
        raise ConfigError(
            f"{config.source}: metrics.listen: needs a package that is not installed:"
            " pip install prometheus-client, or remove the key"
        )
    require_of_runners(config)
    if config.gateway.listen is not None and not all(
        map(_there, ("httptools", "starlette", "uvicorn"))
    ):
        raise ConfigError(
            f"{config.source}: gateway.listen: needs packages that are not installed:"
            " pip install 'runctl[gateway]', or remove the key"
        )
    if (missing := find_missing_package(config.nats)) is not None:
        raise ConfigError(f"{config.source}: {missing}")
    if config.traces.endpoint is not None and not all(
        map(_there, ("opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"))
    ):
        raise ConfigError(
            f"{config.source}: traces.endpoint: needs packages that are not installed:"
            " pip install 'runctl[traces]', or remove the key"
        )


def require_of_runners(config: Config) -> None:
    """The same of its runners alone."""
    for name, runner in config.runners.items():
        if isinstance(runner, AcpRunner) and not _there("acp.connection"):
            raise ConfigError(
                f"{config.source}: runners.{name}.kind: needs a package that is not installed:"
                " pip install 'runctl[acp]', or remove the runner"
            )


def _require_version(package: str, wanted: str) -> None:
    fix = (
        f"pip install '{package}~={wanted}.0', or install runctl anew in an environment of its own"
    )
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ConfigError(f"{package} is not installed: {fix}") from None
    if found.split(".")[:2] != wanted.split("."):
        raise ConfigError(f"{package} {found} is installed, and runctl needs {wanted}: {fix}")


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False
