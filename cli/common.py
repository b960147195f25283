"""What the verbs share: the invocation's settings, option types, and how one runs."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from ..config.schema import Config
from .interrupts import interrupt

T = TypeVar("T")

OK = 0
FAILED = 1
USAGE = 2
NOT_FOUND = 3
UNAVAILABLE = 4
ABORTED = 5
REFUSED = 6
DETACHED = 130

STATUS_EXIT = {"succeeded": OK, "failed": FAILED, "dead": FAILED, "aborted": ABORTED}
STATUSES = ("queued", "running", "succeeded", "failed", "aborted", "dead")


class ReaderGone(Exception):
    """Whoever read our output has gone (``runctl list | head``): end quietly. Not a
    BrokenPipeError, since a socket raises those as well."""


class WriteFailed(Exception):
    """What was asked for cannot be written: a full disk, a terminal that is gone. The text is
    one line."""


class App:
    """One invocation: what the global options said. ``config`` raises ConfigError."""

    def __init__(self) -> None:
        self.config_file: Path | None = None
        self.json = False
        #: So long a verb waits for a daemon that restarts, seconds; None: as long as usual.
        self.wait: float | None = None

    @cached_property
    def config(self) -> Config:
        from ..config.load import load

        return load(self.config_file, client=True)


pass_app = click.make_pass_decorator(App, ensure=True)


def _json_given(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(App).json = True


def _wait_given(ctx: click.Context, _: click.Parameter, value: float | None) -> None:
    if value is not None:
        ctx.ensure_object(App).wait = value


class Verb(click.Command):
    """A command that takes ``--json`` as well, so that it works on either side of the verb."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--json"],
                is_flag=True,
                expose_value=False,
                callback=_json_given,
                help="Print JSON.",
            )
        )


class DaemonVerb(Verb):
    """A command that needs a daemon, and is told how long it waits for one that restarts."""

    #: How long that is unless it is told otherwise, as it would be told.
    usual = "5s"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--wait"],
                type=Duration(),
                metavar="D",
                expose_value=False,
                callback=_wait_given,
                help="Wait at most D for a daemon that restarts; 0: do not wait. "
                f" [default: {self.usual}]",
            )
        )


class PatientVerb(DaemonVerb):
    """One that a program runs within its own run: it can as well wait."""

    usual = "1m"


class Duration(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # 8.3 made it generic
    """Seconds, written like "90s", "5m", "24h", "7d" or a bare number."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        from ..config.units import parse_duration

        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


def mute_libraries() -> None:
    """nats-py and asyncio log tracebacks of what is reported here in one line."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("nats").setLevel(logging.CRITICAL + 1)


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main`` in a new event loop. Ctrl-C raises KeyboardInterrupt, even
    when a write to a pipe that nobody reads holds the loop (asyncio's own handler
    would wait for the loop)."""
    mute_libraries()
    old = signal.signal(signal.SIGINT, _interrupt)
    try:
        return asyncio.run(_run(main))
    finally:
        signal.signal(signal.SIGINT, old)


async def _run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """asyncio itself cancels what is left once, and waits for it for ever."""
    try:
        return await main()
    finally:
        from ..client.cancellation import end_tasks

        await end_tasks(asyncio.all_tasks() - {asyncio.current_task()})


def _interrupt(_: int, __: FrameType | None) -> None:
    interrupt(KeyboardInterrupt())
