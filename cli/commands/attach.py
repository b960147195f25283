"""``runctl attach``: the output of runs, from their first chunk, live."""

from __future__ import annotations

import re
import sys

import click

from ...client.locate import locate
from ...protocol.model import check_run_id, check_thread
from ..common import App, DaemonVerb, Duration, pass_app, run
from ..completion.argument_types import RUN, THREAD
from ..display import render
from ..display.lines import Style
from ..display.patience import make_client
from ..following.follow import Options, Standing
from ..following.session import follow_one, make_output, run_interruptibly


@click.command(
    cls=DaemonVerb,
    short_help="Watch a run's output live, from its beginning.",
    epilog="""\b
Examples:
  runctl attach support-42
  runctl attach support-42 --no-follow > reply.txt
  runctl attach build --tail 20 --follow-thread
  runctl attach build deploy support-42      (side by side)
  runctl attach --all -f --grep 'error|warn' (whatever runs)
  runctl --json attach support-42 | jq -r 'select(.type=="chunk").data'""",
)
@click.argument("threads", nargs=-1, metavar="THREAD...", type=THREAD)
@click.option("--all", "everything", is_flag=True, help="Watch all running threads.")
@click.option(
    "--run",
    "run_id",
    metavar="RUN",
    type=RUN,
    help="Watch this run instead of the current or latest one.",
)
@click.option("--no-follow", is_flag=True, help="Print what is stored so far, and exit.")
@click.option(
    "--tail",
    type=click.IntRange(min=0),
    metavar="N",
    help="Show only the last N stored lines (with --json: chunks), then what comes.",
)
@click.option(
    "--follow-thread",
    "-f",
    is_flag=True,
    help="Continue with the thread's next runs, until Ctrl-C.",
)
@click.option(
    "--since",
    type=Duration(),
    metavar="D",
    help="Show only output of the last D, such as 90s or 5m.",
)
@click.option("--timestamps", is_flag=True, help="Print the time (UTC) before each line.")
@click.option("--grep", metavar="REGEX", help="Show only lines that match REGEX.")
@click.option("--raw", is_flag=True, help="Print the bytes exactly as they were written.")
@click.option(
    "--timeout",
    type=Duration(),
    metavar="D",
    help="Stop watching after D, such as 90s or 5m (exit 1). The run goes on.",
)
@pass_app
def attach(
    app: App,
    threads: tuple[str, ...],
    everything: bool,
    run_id: str | None,
    no_follow: bool,
    tail: int | None,
    follow_thread: bool,
    since: float | None,
    timestamps: bool,
    grep: str | None,
    raw: bool,
    timeout: float | None,
) -> int:
    """Show the output of THREAD's current run, or of its latest one, live and from the start.

    With several threads, or --all, each line begins with the name of its thread.

    Exits with 0 if the run succeeded, 1 if it failed or is dead, 5 if it was aborted. With
    several threads the worst result wins: 1, then 5, then 0. Ctrl-C detaches (exit 130)
    and does not stop the run.

    Any number of watchers may attach, and attaching survives restarts of the daemon. An
    interrupted run is executed again: at a terminal, if the replay prints the same output,
    the display continues; otherwise a separator is printed and it starts again.
    """
    names = list(dict.fromkeys(threads))
    if everything and names:
        raise click.UsageError("--all already means every running thread; leave the names out")
    if not everything and not names:
        raise click.UsageError("name a thread, or give --all")
    several = everything or len(names) > 1
    if run_id is not None and several:
        raise click.UsageError("--run can only be used with a single thread")
    if no_follow and follow_thread:
        raise click.UsageError("--no-follow and --follow-thread cannot be combined")
    if raw and (timestamps or grep is not None or several):
        raise click.UsageError("--raw needs a single thread, and no --timestamps or --grep")
    if app.json and (timestamps or grep is not None or raw):
        raise click.UsageError("--json cannot be combined with --timestamps, --grep or --raw")
    for name in names:
        check_thread(name)
    if run_id is not None:
        check_run_id(run_id)
    style = _style(timestamps, grep)
    options = Options(not no_follow, follow_thread, tail, since)
    if several:
        from ..following import many

        watching = many.Many(app, options, style, timeout)
        return run_interruptibly(
            names, watching, lambda: run(lambda: watching.attach(names or None))
        )
    output = make_output(app, headers=follow_thread, style=style, raw=raw)
    standing = Standing()

    async def main() -> int:
        async with make_client(app) as client:
            target = await locate(
                client.links, names[0], run_id, follow_thread=options.follow_thread
            )
            return await follow_one(app, target, options, output, client.links, timeout, standing)

    return run_interruptibly(names, output, lambda: run(main), standing, options)


def _style(timestamps: bool, grep: str | None) -> Style | None:
    if not timestamps and grep is None:
        return None
    try:
        pattern = None if grep is None else re.compile(grep)
    except re.error as error:
        raise click.UsageError(f"--grep {grep!r} is not a regular expression: {error}") from None
    return Style(timestamps, pattern, sys.stdout.isatty() and render.colours())
