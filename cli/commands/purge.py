"""``runctl purge``: delete stored output."""

from __future__ import annotations

import sys

import click

from ...client.shared_link import SharedLink
from ...protocol import messages
from ...protocol.errors import RequestError, Unavailable
from ...protocol.model import check_thread
from ..common import FAILED, App, DaemonVerb, Duration, pass_app, run
from ..completion.argument_types import THREAD
from ..display import render
from ..display.patience import make_client
from ..display.status_line import progress

#: A purge of many threads goes in so many steps, at least.
STEPS = 50


@click.command(
    cls=DaemonVerb,
    short_help="Delete the stored output of threads.",
    epilog="""\b
Examples:
  runctl purge support-42
  runctl purge build nightly --older-than 7d --yes""",
)
@click.argument("threads", nargs=-1, required=True, metavar="THREAD...", type=THREAD)
@click.option(
    "--older-than",
    type=Duration(),
    metavar="D",
    help="Purge only runs that ended at least D ago, such as 90m or 7d.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Also purge threads with a run in flight (the run is not stopped).",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.")
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
    names = list(dict.fromkeys(threads))
    done = run(lambda: _purge(app, names, older_than, force))
    if app.json:
        render.out_json({"runs": done})
    else:
        render.out(f"purged the output of {done} run{'' if done == 1 else 's'}")
    return None


async def _purge(app: App, threads: list[str], older_than: float | None, force: bool) -> int:
    """How many runs' output was deleted: of all threads, or of none if one is refused."""
    done = runs = 0
    size = max(1, len(threads) // STEPS)
    async with (
        progress(lambda _: f"runctl: purging: {done} of {len(threads)} threads") as line,
        make_client(app, line) as client,
    ):
        if len(threads) > 1:
            check = messages.Purge(threads, older_than, force, check=True)
            await client.links.ask(check, messages.Purged)
        while done < len(threads):
            batch = threads[done : done + size]
            request = messages.Purge(batch, older_than, force)
            runs += await _purge_batch(client.links, request, done, threads)
            done += len(batch)
    return runs


async def _purge_batch(
    links: SharedLink, request: messages.Purge, done: int, threads: list[str]
) -> int:
    try:
        return (await links.ask(request, messages.Purged)).runs
    except (RequestError, Unavailable) as error:
        if not done:
            raise
        # Something changed since all were checked.
        raise type(error)(
            f"{error} (purged before that: {done} of {len(threads)} threads;"
            f" not: {threads[done]!r} and those after it)"
        ) from None
