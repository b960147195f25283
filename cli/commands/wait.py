"""``runctl wait``: block until a run ends."""

from __future__ import annotations

import click

from ...client.attachment import RunEvent
from ...client.events import Connection, Continue, Event, Reset
from ...client.locate import find_predecessor
from ...client.waiting import wait_for_end
from ...protocol.model import Run, Status
from ..common import (
    DETACHED,
    FAILED,
    STATUS_EXIT,
    App,
    DaemonVerb,
    Duration,
    ReaderGone,
    WriteFailed,
    pass_app,
    run,
)
from ..completion.argument_types import RUN
from ..display import render
from ..display.patience import make_client
from ..display.status_line import progress
from ..following.follow import Standing


@click.command(
    cls=DaemonVerb,
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
    async with make_client(app) as client:
        found = (await client.find_run(standing.run, "wait")).run
        if found.status.terminal:
            return found
        name = standing.run = found.run
        standing.queued = found.status is Status.QUEUED
        state = found.status.value
        if standing.queued:
            behind = await find_predecessor(client.links, name, found.thread)
            if behind is not None and behind.run != name:
                state = f"queued behind run {behind.run}"

        def describe(passed: float) -> str:
            return f"runctl: run {name}: {state}; waited {render.seconds(passed)}"

        async with progress(describe) as line:

            def notice(event: Event) -> None:
                nonlocal state
                if isinstance(event, RunEvent) and standing.queued:
                    standing.queued, state = False, "running"
                if isinstance(event, Reset | Continue):
                    state = f"running, attempt {event.attempt}"
                elif isinstance(event, Connection):
                    lost = "runctl: connection lost; waiting for runctld to come back"
                    line.set("connection", None if event.up else lost)

            return await wait_for_end(
                app.config, client.links, found, timeout=timeout, notice=notice
            )
