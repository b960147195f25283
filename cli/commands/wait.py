"""``runctl wait``: block until a run ends."""

from __future__ import annotations

import asyncio

import click
import msgspec

from ...client import consumer
from ...client.events import CaughtUp, Connection, End, Reset
from ...client.link import dial
from ...client.locate import find_predecessor
from ...client.run_end import make_end, push_lost_end, wait_until_recorded
from ...client.suggestions import dial_for, find_run
from ...protocol import subjects
from ...protocol.model import Run, Status
from ..common import (
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
from ..completion.argument_types import RUN
from ..display import render
from ..display.status_line import progress
from ..following.follow import BEGUN, Standing

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
    "--timeout",
    type=Duration(),
    metavar="D",
    help="Stop waiting after D, such as 90s or 5m (exit 1). The run goes on.",
)
@pass_app
def wait(app: App, run_id: str, timeout: float | None) -> int:
    """Block until RUN has ended, and print how: succeeded, failed, aborted or dead.

    Exits with 0 if it succeeded, 1 if it failed or is dead, 5 if it was aborted. Keeps
    waiting through restarts of the daemon.
    """
    standing = Standing(run_id)

    async def main() -> Run:
        return await _wait(app, standing, timeout)

    try:
        ended = run(main)
    except TimeoutError:
        render.note(standing.describe_timeout())
        return FAILED
    except KeyboardInterrupt:
        again = f"runctl wait {standing.run}"
        render.note(f"stopped waiting; {standing.describe_future()}. Wait again: {again}")
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


async def _wait(app: App, standing: Standing, timeout: float | None) -> Run:
    """The run that ``standing`` names, once it has ended. Raises TimeoutError: it has not within
    ``timeout`` seconds from the first answer on, which says where it stands."""
    link = await dial_for(app.config, standing.run)
    behind = None
    try:
        found = (await find_run(link, standing.run, "wait")).run
        name = standing.run = found.run
        standing.queued = found.status is Status.QUEUED
        if standing.queued:
            behind = await find_predecessor(link, name, found.thread)
    except BaseException:
        await link.close()
        raise
    if found.status.terminal:
        await link.close()
        return found
    subject = subjects.out_subject(found.thread, name)
    settling: asyncio.Task[None] | None = None
    watcher = consumer.Watcher(lambda: dial(app.config), subject, link=link, last_only=True)
    state = found.status.value
    if behind is not None and behind.run != name:
        state = f"queued behind run {behind.run}"

    def where(passed: float) -> str:
        return f"runctl: run {name}: {state}; waited {render.seconds(passed)}"

    try:
        async with asyncio.timeout(timeout) as limit, progress(where) as line, watcher:
            async for events in watcher:
                for event in events:
                    if isinstance(event, BEGUN) and standing.queued:
                        standing.queued, state = False, "running"
                    if isinstance(event, End):
                        limit.reschedule(None)  # it has ended, and that stays
                        return await _read_ended(app, watcher, found, event)
                    if isinstance(event, Reset):
                        state = f"running, attempt {event.attempt}"
                    elif isinstance(event, CaughtUp):
                        if settling is not None:
                            settling.cancel()
                        settling = asyncio.create_task(push_lost_end(app.config, name, watcher))
                    elif isinstance(event, Connection):
                        lost = "runctl: connection lost; waiting for runctld to come back"
                        line.set("connection", None if event.up else lost)
    finally:
        if settling is not None:
            settling.cancel()
    raise AssertionError("a watcher ends only with an error")


async def _read_ended(app: App, watcher: consumer.Watcher, found: Run, end: End) -> Run:
    """The run as the daemon has it once it is recorded as ended; else from its end."""
    try:
        async with asyncio.timeout(RECORD_TIMEOUT):
            row = await wait_until_recorded(app.config, watcher, found.run)
    except TimeoutError:
        row = None
    if row is not None and make_end(row).status == end.status:
        return row
    return msgspec.structs.replace(
        found,
        status=Status(end.status),
        attempt=end.attempt,
        exit_code=end.exit_code,
        error=end.error,
        note=end.note,
    )
