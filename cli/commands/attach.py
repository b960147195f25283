"""``runctl attach``: the output of runs, from their first chunk, live."""

from __future__ import annotations

import re
import sys

import click

from ...client.link import dial
from ...client.locate import locate
from ...protocol.model import check_run_id, check_thread
from ..common import App, Duration, Verb, pass_app, run
from ..completion.argument_types import RUN, THREAD
from ..display import render
from ..display.lines import Style
from ..following.follow import Options, Standing
from ..following.session import follow_one, make_output, run_interruptibly


@click.command(
    cls=Verb,
    short_help="Watch runs, live, from their first chunk.",
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
@click.option("--all", "everything", is_flag=True, help="All threads that are running.")
@click.option(
    "--run",
    "run_id",
    metavar="RUN",
    type=RUN,
    help="This run, not the current or latest one.",
)
@click.option("--no-follow", is_flag=True, help="Print what is stored, and stop.")
@click.option(
    "--tail",
    type=click.IntRange(min=0),
    metavar="N",
    help="Of what is stored, show the last N lines only (with --json: chunks).",
)
@click.option(
    "--follow-thread", "-f", is_flag=True, help="Go on to the thread's next runs, until Ctrl-C."
)
@click.option(
    "--since", type=Duration(), metavar="D", help="Only output of the last D; as in 90s, 5m."
)
@click.option("--timestamps", is_flag=True, help="Put the time (UTC) before each line.")
@click.option("--grep", metavar="REGEX", help="Only lines in which REGEX is found.")
@click.option("--raw", is_flag=True, help="The bytes as they were written, without our colours.")
@click.option(
    "--timeout", type=Duration(), metavar="D", help="Stop watching after D (exit 1); as in 90s, 5m."
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
    """Show the current run of THREAD (or its latest) from the first chunk on, live.

    With several threads, or --all, each line begins with the name of its thread.

    Exits with 0 if the run succeeded, 1 if it failed or is dead, 5 if it was aborted; of
    several, 1 goes before 5, and 5 before 0. Ctrl-C detaches (exit 130); the run goes on.
    Any number of watchers may attach, and attaching survives restarts of the daemon: at a
    terminal, an interrupted run's reply goes on where it was if it repeats itself, else it
    starts over behind a rule.
    """
    names = list(dict.fromkeys(threads))
    if everything and names:
        raise click.UsageError("--all means every running thread: name none")
    if not everything and not names:
        raise click.UsageError("name a thread, or give --all")
    several = everything or len(names) > 1
    if run_id is not None and several:
        raise click.UsageError("--run goes with one thread")
    if no_follow and follow_thread:
        raise click.UsageError("--no-follow and --follow-thread exclude each other")
    if raw and (timestamps or grep is not None or several):
        raise click.UsageError("--raw goes with one thread, without --timestamps and --grep")
    if app.json and (timestamps or grep is not None or raw):
        raise click.UsageError("--json has events as they are: leave --timestamps, --grep, --raw")
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
        link = await dial(app.config)
        try:
            target = await locate(link, names[0], run_id, follow_thread=options.follow_thread)
        except BaseException:
            await link.close()
            raise
        return await follow_one(app, target, options, output, link, timeout, standing)

    return run_interruptibly(names, output, lambda: run(main), standing, options)


def _style(timestamps: bool, grep: str | None) -> Style | None:
    if not timestamps and grep is None:
        return None
    try:
        pattern = None if grep is None else re.compile(grep)
    except re.error as error:
        raise click.UsageError(f"--grep {grep!r} is not a regular expression: {error}") from None
    return Style(timestamps, pattern, sys.stdout.isatty() and render.colours())
