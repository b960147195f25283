"""``runctld``: arguments, logging, exit codes."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ...config.access import access_problems, check_access
from ...config.accounts import check_rights
from ...config.describe import describe
from ...config.load import load
from ...config.schema import Config
from ...config.secrets import Masker
from ...config.submitters import described, warnings
from ...config.transport import check_transport, transport_problems
from ...protocol import __version__
from ...protocol.errors import ConfigError, LeaseHeld, LeaseLost, RunctlError, Unavailable
from ...protocol.hardening import close_process
from ..host.logs import last_words, set_up
from ..host.memory import few_arenas
from ..host.traceback_mask import mask_tracebacks
from .early_signals import STOP, Early
from .optional_packages import require
from .program import start_again

EXIT = ((ConfigError, 78), (LeaseHeld, 75), (LeaseLost, 75), (Unavailable, 69))
#: Of disk or descriptors, as it may be met anywhere: the next start may find some.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), help="TOML file.")
@click.option("--check", is_flag=True, help="Validate, print the effective configuration, exit.")
@click.option("-v", "--verbose", is_flag=True, help="Log at debug level.")
@click.version_option(__version__, prog_name="runctld")
@click.pass_obj
def runctld(early: Early | None, file: Path | None, check: bool, verbose: bool) -> None:
    """The run supervisor daemon. Runs in the foreground and logs to stderr.

    Without --config: $RUNCTL_CONFIG, /etc/runctl/runctld.toml,
    ~/.config/runctl/runctld.toml, then built-in defaults.

    Signals: SIGTERM or SIGINT stops it, a second one without grace for the runs; SIGHUP
    reads the configuration again; SIGUSR2 starts its program again, and SIGUSR1 ends it, while
    commands go on (queue.outlive).

    Exit codes: 0 stopped by SIGTERM or SIGINT, 69 NATS or database unreachable, 75 the
    executor ID is held by another daemon, or was lost to one, 78 configuration error.
    """
    if check and early is not None:
        for number in STOP:  # 0 would say that the configuration is right
            signal.signal(number, signal.SIG_DFL)
    close_process()
    few_arenas()
    try:
        config = load(file)
        check_access(config)
        check_transport(config)
    except ConfigError as error:
        _fail(error)
    if check:
        try:
            require(config)
            check_rights(config)
        except ConfigError as error:
            _fail(error)
        click.echo(describe(config))
        for name, runner in config.runners.items():
            click.echo(f"# runner {name}: {described(runner)}")
        if config.nats.server is not None:
            click.echo(f"# nats.server: {config.nats.server} is compared with no recorded sum")
        for name, said, fix in warnings(config, os.geteuid()):
            last_words(f"runctld: warning: runner {name}: {said}; {fix}")
        for key, said, fix in (*access_problems(config), *transport_problems(config)):
            last_words(f"runctld: warning: {key}: {said}; {fix}")
        return
    hide = Masker(config)
    mask_tracebacks(hide)
    faulthandler.enable()  # a watchdog's SIGABRT then writes where each thread was, no values
    set_up(config.log, verbose=verbose, hide=hide)
    try:
        _run(config, file, early, hide)
    except (BaseExceptionGroup, RunctlError, OSError) as error:
        # Not except*: that of Python before 3.11.4 wraps the SystemExit.
        group = error if isinstance(error, BaseExceptionGroup) else BaseExceptionGroup("", [error])
        if (known := group.subgroup(RunctlError)) is not None:
            _fail(_first(known), hide)
        met = group.subgroup(lambda e: isinstance(e, OSError) and e.errno in NO_ROOM)
        if met is None:
            raise
        text = f"{_first(met).strerror}; make room for {config.state_dir}, or raise the limit"
        _fail(Unavailable(text), hide)


def _run(config: Config, file: Path | None, early: Early | None, hide: Masker) -> None:
    import trio

    from .startup import run

    if trio.run(run, config, file, early, hide, strict_exception_groups=True):
        start_again()


def _first(group: BaseExceptionGroup[Any]) -> Any:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _fail(error: RunctlError, hide: Callable[[str], str] = str) -> None:
    last_words(hide(f"runctld: {error}"))
    sys.exit(next((code for kind, code in EXIT if isinstance(error, kind)), 1))
