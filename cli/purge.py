"""``runctl purge``: delete stored output."""

from __future__ import annotations

import sys

import click

from ..supervisor import wire
from ..supervisor.model import check_thread
from . import render
from .client import ask_once
from .common import FAILED, App, Duration, Verb, pass_app, run
from .names import THREAD


@click.command(
    cls=Verb,
    short_help="Delete the stored output of threads.",
    epilog="""\b
Examples:
  runctl purge support-42
  runctl purge build nightly --older-than 7d --yes""",
)
@click.argument("threads", nargs=-1, required=True, metavar="THREAD...", type=THREAD)
@click.option(
    "--older-than", type=Duration(), metavar="D", help="Only of runs that ended D ago: 90m, 7d."
)
@click.option("--force", is_flag=True, help="Even while a run is in flight; the run goes on.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@pass_app
def purge(
    app: App, threads: tuple[str, ...], older_than: float | None, force: bool, yes: bool
) -> int | None:
    """Delete the stored output of each THREAD; the runs themselves stay listed.

    Refused (exit 6) while a run of the thread is in flight, unless --force is given.
    """
    for thread in threads:
        check_thread(thread)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("purge deletes stored output: confirm it with --yes")
        what = ", ".join(render.printable(thread) for thread in threads)
        if not click.confirm(f"Delete the stored output of {what}?", err=True):
            render.note("nothing was purged")
            return FAILED
    request = wire.Purge(list(threads), older_than, force)
    done = run(lambda: ask_once(app.config, request, wire.Purged))
    if app.json:
        render.out_json({"runs": done.runs})
    else:
        render.out(f"purged the output of {done.runs} run{'' if done.runs == 1 else 's'}")
    return None
