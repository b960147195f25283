"""``runctld``: arguments, logging, exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import click

from ..config.load import describe, load
from ..config.schema import Config
from ..config.secrets import masker
from . import __version__
from .errors import ConfigError, LeaseHeld, LeaseLost, RunctlError, Unavailable
from .extras import require
from .private import close_process
from .report import MaskedFormatter, mask_tracebacks

EXIT = ((ConfigError, 78), (LeaseHeld, 75), (LeaseLost, 75), (Unavailable, 69))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), help="TOML file.")
@click.option("--check", is_flag=True, help="Validate, print the effective configuration, exit.")
@click.option("-v", "--verbose", is_flag=True, help="Log at debug level.")
@click.version_option(__version__, prog_name="runctld")
def main(file: Path | None, check: bool, verbose: bool) -> None:
    """The run supervisor daemon. Runs in the foreground and logs to stderr.

    Without --config: $RUNCTL_CONFIG, /etc/runctl/runctld.toml,
    ~/.config/runctl/runctld.toml, then built-in defaults.

    Exit codes: 0 stopped by SIGTERM or SIGINT, 69 NATS or database unreachable, 75 the
    executor ID is held by another daemon, 78 configuration error.
    """
    close_process()
    try:
        config = load(file)
    except ConfigError as error:
        _fail(error)
    if check:
        try:
            require(config)
        except ConfigError as error:
            _fail(error)
        click.echo(describe(config))
        return
    hide = masker(config)
    mask_tracebacks(hide)
    handler = logging.StreamHandler()
    handler.setFormatter(MaskedFormatter(hide))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    for library in ("nats", "httpx", "httpcore", "asyncio", "trio-asyncio", "sqlalchemy"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        _run(config)
    except* RunctlError as group:
        _fail(_first(group), hide)


def _run(config: Config) -> None:
    import trio

    from .daemon import run

    trio.run(run, config, strict_exception_groups=True)


def _first(group: BaseExceptionGroup[RunctlError]) -> RunctlError:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _fail(error: RunctlError, hide: Callable[[str], str] = str) -> None:
    print(hide(f"runctld: {error}"), file=sys.stderr)
    sys.exit(next((code for kind, code in EXIT if isinstance(error, kind)), 1))


if __name__ == "__main__":
    main()
