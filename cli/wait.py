"""``runctl wait``: block until a run ends."""

from __future__ import annotations

import asyncio

import click
import msgspec

from ..supervisor import wire
from ..supervisor.model import Run, Status
from . import render, watch
from .client import dial
from .common import (
    DETACHED,
    FAILED,
    STATUS_EXIT,
    App,
    Duration,
    ReaderGone,
    Verb,
    WriteFailed,
    pass_app,
    run,
)
from .follow import end_of, recorded, settle
from .hints import dial_for, find_run
from .names import RUN
from .statusline import progress

#: How long the daemon may take to record an end that is in the stream already.
RECORD_TIMEOUT = 5.0


@click.command(
    cls=Verb,
    short_help="Block until a run ends; exit with its code.",
    epilog="""\b
Examples:
  runctl wait 01jx... && echo good
  runctl wait "$(runctl submit build -- make test)" --timeout 10m""",
)
@click.argument("run_id", metavar="RUN", type=RUN)
@click.option(
    "--timeout", type=Duration(), metavar="D", help="Stop waiting after D (exit 1); as in 90s, 5m."
)
@pass_app
def wait(app: App, run_id: str, timeout: float | None) -> int:
    """Block until RUN has ended, and print how: succeeded, failed, aborted or dead.

    Exits with 0 if it succeeded, 1 if it failed or is dead, 5 if it was aborted. Goes
    on waiting through restarts of the daemon.
    """
    async def main() -> Run:
        async with asyncio.timeout(timeout):
            return await _wait(app, run_id)

    try:
        ended = run(main)
    except TimeoutError:
        render.note(f"run {run_id} has not ended yet; it goes on")
        return FAILED
    except KeyboardInterrupt:
        render.note(f"stopped waiting; the run goes on. Wait again: runctl wait {run_id}")
        return DETACHED
    try:
        render.out_json(ended) if app.json else render.out(ended.status)
    except ReaderGone:
        pass  # how it ended is in the exit code as well
    except WriteFailed as error:
        render.note(str(error))
    if not app.json:
        if ended.error:
            render.note(f"run {run_id}: {ended.error}")
        if ended.note:
            render.note(f"run {run_id}: {ended.note}")
    return STATUS_EXIT[ended.status]


async def _wait(app: App, name: str) -> Run:
    link = await dial_for(app.config, name)
    try:
        found = (await find_run(link, name, "wait")).run
        name = found.run
    except BaseException:
        await link.close()
        raise
    if found.status.terminal:
        await link.close()
        return found
    subject = wire.out_subject(found.thread, name)
    settling: asyncio.Task[None] | None = None
    watcher = watch.Watcher(lambda: dial(app.config), subject, link=link, last_only=True)
    state = found.status.value

    def where(passed: float) -> str:
        return f"runctl: run {name}: {state}; waited {render.seconds(passed)}"

    try:
        async with progress(where) as line, watcher:
            async for events in watcher:
                for event in events:
                    if isinstance(event, watch.End):
                        return await _row(app, watcher, found, event)
                    if isinstance(event, watch.Reset):
                        state = f"running, attempt {event.attempt}"
                    elif isinstance(event, watch.CaughtUp):
                        if settling is not None:
                            settling.cancel()
                        settling = asyncio.create_task(settle(app.config, name, watcher))
                    elif isinstance(event, watch.Connection):
                        lost = "runctl: connection lost; waiting for runctld to come back"
                        line.set("connection", None if event.up else lost)
    finally:
        if settling is not None:
            settling.cancel()
    raise AssertionError("a watcher ends only with an error")


async def _row(app: App, watcher: watch.Watcher, found: Run, end: watch.End) -> Run:
    """The run as the daemon has it once it is recorded as ended; else from its end."""
    try:
        async with asyncio.timeout(RECORD_TIMEOUT):
            row = await recorded(app.config, watcher, found.run)
    except TimeoutError:
        row = None
    if row is not None and end_of(row).status == end.status:
        return row
    return msgspec.structs.replace(
        found,
        status=Status(end.status),
        attempt=end.attempt,
        exit_code=end.exit_code,
        error=end.error,
        note=end.note,
    )
