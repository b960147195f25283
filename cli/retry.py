"""``runctl retry``: run a failed, aborted or dead run again."""

from __future__ import annotations

import click

from ..supervisor import wire
from ..supervisor.model import check_run_id
from . import render
from .client import ask_once
from .common import App, Verb, pass_app, run
from .names import RunName


@click.command(
    cls=Verb,
    short_help="Run a failed, aborted or dead run again.",
    epilog="""\b
Examples:
  runctl retry 01jx...
  runctl wait "$(runctl retry 01jx...)\"""",
)
@click.argument("run_id", metavar="RUN", type=RunName("failed", "aborted", "dead"))
@pass_app
def retry(app: App, run_id: str) -> None:
    """Queue the work of RUN again, as a new run of its thread; prints the new run's id."""
    check_run_id(run_id)
    done = run(lambda: ask_once(app.config, wire.Retry(run_id), wire.Submitted))
    if app.json:
        render.out_json({"thread": done.thread, "run": done.run, "status": done.status})
    else:
        render.out(done.run)
