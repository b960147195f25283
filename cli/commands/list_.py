"""``runctl list``: threads, or one thread's runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import click

from ...client.api import Listing
from ...protocol import messages
from ...protocol.model import Run, Status, ThreadRow, check_thread
from ..common import STATUSES, App, DaemonVerb, pass_app, run
from ..completion.argument_types import THREAD
from ..display import render
from ..display.patience import make_client

#: How much of a run's output is stored, in words.
OUTPUT = {"stored": "stored", "partial": "partial", "none": "-"}


@click.command(
    "list",
    cls=DaemonVerb,
    short_help="List threads, or a thread's runs.",
    epilog="""\b
Examples:
  runctl list
  runctl list --status running
  runctl list support-42 --limit 10
  runctl --json list | jq -r '.[] | select(.queued > 0).thread'""",
)
@click.argument("thread", required=False, type=THREAD)
@click.option(
    "--status",
    type=click.Choice([*STATUSES, "idle"]),
    metavar="S",
    help="Show only: " + ", ".join(STATUSES) + "; for threads also idle.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Show at most N rows.")
@pass_app
def list_(app: App, thread: str | None, status: str | None, limit: int | None) -> None:
    """List all threads, a row each; with THREAD, that thread's runs, latest first.

    A thread's row shows its running run, or else the next one, or else the last. WORK is what the
    run says of itself, and its command or prompt. A narrow terminal shows fewer columns; a pipe
    gets all of them in full.
    """
    if thread is not None:
        check_thread(thread)

    async def main() -> Listing[ThreadRow] | Listing[messages.RunRow]:
        async with make_client(app) as client:
            if thread is None:
                return await client.list(status=status, limit=limit)
            return await client.list(thread, status=status, limit=limit)

    found = run(main)
    if app.json:
        render.out_json(found.rows)
    elif thread is None:
        _print_threads(cast("Sequence[ThreadRow]", found.rows), status)
    else:
        _print_runs(cast("Sequence[messages.RunRow]", found.rows), status)
    for executor in found.silent:
        render.note(render.describe_silence(executor))


def _print_threads(rows: Sequence[ThreadRow], status: str | None) -> None:
    if not rows:
        render.note(
            f"no thread is {status}"
            if status
            else "no threads yet; start one: runctl submit THREAD -- COMMAND"
        )
        return
    render.table(
        ("THREAD", "STATUS", "RUN", "ATTEMPT", "RUNNER", "AGE", "QUEUED", "WORK", "ERROR"),
        (
            (
                row.thread,
                _thread_status(row),
                row.run.run,
                str(row.run.attempt),
                row.run.runner,
                render.since(row.run.created_at),
                str(row.queued),
                row.run.work or "-",
                _describe_error(row.run),
            )
            for row in rows
        ),
        least={"THREAD": 9, "WORK": 14, "ERROR": 18},
        drop=("RUNNER", "RUN", "ATTEMPT", "AGE", "QUEUED", "WORK", "ERROR"),
    )


def _describe_error(run: Run) -> str:
    return " ".join((run.error or "-").split())


def _thread_status(row: ThreadRow) -> str:
    """An idle thread's row says how its latest run ended, unless it went well."""
    if row.status == "idle" and row.run.status is not Status.SUCCEEDED:
        return f"idle ({row.run.status})"
    return row.status


def _print_runs(rows: Sequence[messages.RunRow], status: str | None) -> None:
    if not rows:
        render.note(f"no run of this thread is {status}" if status else "no runs")
        return
    render.table(
        (
            "RUN",
            "STATUS",
            "OUTPUT",
            "ATTEMPT",
            "DURATION",
            "EXIT",
            "RUNNER",
            "EXECUTOR",
            "CREATED",
            "ERROR",
            "WORK",
        ),
        (
            (
                row.run,
                row.status,
                OUTPUT.get(row.output or "", "?"),
                str(row.attempt),
                render.duration(row.started_at, row.ended_at),
                "-" if row.exit_code is None else str(row.exit_code),
                row.runner,
                row.executor or "-",
                render.moment(row.created_at),
                _describe_error(row),
                row.work or "-",
            )
            for row in rows
        ),
        least={"ERROR": 16, "WORK": 14},
        drop=(
            "CREATED",
            "EXECUTOR",
            "RUNNER",
            "OUTPUT",
            "ATTEMPT",
            "EXIT",
            "DURATION",
            "WORK",
            "ERROR",
        ),
    )
