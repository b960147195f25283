"""``runctl abort``: end a thread's run and its processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import NoReturn

import click

from ...client.cancellation import end_tasks
from ...client.requests import ask_once
from ...protocol import messages
from ...protocol.errors import RunctlError
from ...protocol.model import check_run_id, check_thread
from ..common import App, DaemonVerb, pass_app, run
from ..completion.argument_types import THREAD, RunName
from ..display import render
from ..display.patience import make_client
from ..display.status_line import PATIENCE, StatusLine, progress


@click.command(
    cls=DaemonVerb,
    short_help="Stop a thread's running run for good.",
    epilog="""\b
Examples:
  runctl abort support-42
  runctl abort support-42 --queued         (and what waits behind it)
  runctl abort support-42 --run 01jx...""",
)
@click.argument("thread", type=THREAD)
@click.option(
    "--run",
    "run_id",
    metavar="RUN",
    type=RunName("running", "queued"),
    help="Abort this run, whether running or queued.",
)
@click.option("--queued", is_flag=True, help="Abort the thread's queued runs as well.")
@pass_app
def abort(app: App, thread: str, run_id: str | None, queued: bool) -> None:
    """Abort the running run of THREAD; returns when all of its processes are gone.

    They get TERM, and KILL after the configured grace (queue.stop_grace). Queued runs stay
    queued, unless --queued is given. Exits with 6 if there is nothing to abort. If a process
    is still there 15 s after the grace, it is named and the exit code is 1.
    """
    check_thread(thread)
    if run_id is not None:
        check_run_id(run_id)

    async def main() -> Sequence[str]:
        what = f"runctl: ending the processes of {thread}"
        async with (
            make_client(app) as client,
            progress(lambda passed: f"{what}; {render.seconds(passed)}") as line,
        ):
            news = asyncio.create_task(_report_obstacles(app, thread, run_id, line))
            try:
                return await client.abort(thread, run=run_id, queued=queued)
            finally:
                await end_tasks([news])

    done = run(main)
    if app.json:
        render.out_json({"runs": done})
    else:
        render.out("\n".join(f"aborted {name}" for name in done))


async def _report_obstacles(
    app: App, thread: str, run_id: str | None, line: StatusLine
) -> NoReturn:
    """Processes that cannot be ended, and why: the abort is answered when they are gone."""
    said = None
    while True:
        await asyncio.sleep(PATIENCE)
        with contextlib.suppress(RunctlError):  # the abort itself says what is wrong
            found = await ask_once(app.config, messages.Locate(thread, run_id), messages.RunDetails)
            reason = found.waits_for
            # Without one, the run after it waits, and that is no news here.
            if reason is not None and reason != said and "process" in reason:
                said = reason
                line.hide()
                render.note(f"waits for {reason}")
                line.show_again()
