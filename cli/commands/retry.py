"""``runctl retry``: run a failed, aborted or dead run again."""

from __future__ import annotations

import click

from ...protocol import messages
from ..common import App, DaemonVerb, pass_app, run
from ..completion.argument_types import RunName
from ..display import render
from ..display.patience import make_client


@click.command(
    cls=DaemonVerb,
    short_help="Run a failed, aborted or dead run again.",
    epilog="""\b
Examples:
  runctl retry 01jx...
  runctl wait "$(runctl retry 01jx...)\"""",
)
@click.argument("run_id", metavar="RUN", type=RunName("failed", "aborted", "dead"))
@pass_app
def retry(app: App, run_id: str) -> None:
    """Submit the work of RUN again, as a new run of its thread, and print the new run's id."""

    async def main() -> messages.Submitted:
        async with make_client(app) as client:
            return await client.retry(run_id)

    done = run(main)
    render.submitted(done, app.json)
