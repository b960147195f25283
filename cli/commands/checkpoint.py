"""``runctl checkpoint``: inside a run, store what it needs to go on from here."""

from __future__ import annotations

import os
import sys

import click

from ...protocol.model import MAX_CHECKPOINT_BYTES
from ..common import App, PatientVerb, pass_app


@click.command(
    cls=PatientVerb,
    short_help="Inside a run: store a checkpoint, from which it can continue.",
    epilog="""\b
Examples:
  runctl checkpoint --data "$step"
  tar cz state/ | runctl checkpoint
  [ -z "$RUNCTL_RESUME" ] || step=$(cat "$RUNCTL_CHECKPOINT_FILE")""",
)
@click.option("--data", metavar="TEXT", help="What to store; without it, stdin, or nothing.")
@pass_app
def checkpoint(app: App, data: str | None) -> None:
    """Store up to 64 KiB from which the run can go on, with all that it has written before.

    Returns when both are durable. An attempt after an interruption finds RUNCTL_RESUME=1, the
    data in the file RUNCTL_CHECKPOINT_FILE, and the output up to there in the file
    RUNCTL_PREVIOUS_OUTPUT; what was written behind the checkpoint is void.
    """
    from ...client import run

    content = os.fsencode(data) if data is not None else _read_stdin()
    run.checkpoint(content, wait=run.WAIT if app.wait is None else app.wait)


def _read_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        return b""
    return sys.stdin.buffer.read(MAX_CHECKPOINT_BYTES + 1)
