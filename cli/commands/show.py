"""``runctl show``: one run's details."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import click

from ...protocol import messages
from ...protocol.model import AttemptRow
from ..common import App, DaemonVerb, pass_app, run
from ..completion.argument_types import RUN
from ..display import render
from ..display.patience import make_client

_OUTPUT = {
    "stored": "stored",
    "partial": "partial: its beginning is no longer stored",
    "none": "none is stored",
}


@click.command(
    cls=DaemonVerb,
    short_help="Show one run's details.",
    epilog="""\b
Examples:
  runctl show 01jx...
  runctl --json show 01jx... | jq .exit_code""",
)
@click.argument("run_id", metavar="RUN", type=RUN)
@pass_app
def show(app: App, run_id: str) -> None:
    """Show what RUN executes, its status and how it ended. A unique prefix of a run's id is
    enough."""

    async def main() -> messages.RunDetails:
        async with make_client(app) as client:
            return await client.show(run_id)

    details = run(main)
    row = details.run
    if app.json:
        render.out_json(messages.details_json(details))
        return
    pairs: list[tuple[str, str | None]] = [
        ("run", row.run),
        ("thread", row.thread),
        ("status", row.status),
        ("says", row.status_text),
        ("attempt", str(row.attempt)),
        ("adopted", _describe_adoptions(row.adopted_at)),
        ("runner", row.runner),
        ("executor", row.executor),
        ("command", shlex.join(details.argv) if details.argv else None),
        ("prompt", None if details.prompt is None else render.short(details.prompt, 200)),
        ("directory", details.cwd),
        ("retry of", details.retry_of),
        ("created", render.moment(row.created_at)),
        ("started", None if row.started_at is None else render.moment(row.started_at)),
        ("ended", None if row.ended_at is None else render.moment(row.ended_at)),
        ("duration", render.duration(row.started_at, row.ended_at) if row.started_at else None),
        ("exit code", None if row.exit_code is None else str(row.exit_code)),
        ("error", row.error),
        ("note", row.note),
        ("waits for", details.waits_for),
        ("session", details.session),
        ("output", _OUTPUT.get(details.output or "")),
        ("used", _describe_usage(details.usage)),
    ]
    if row.attempt > 1:
        pairs += [(f"attempt {x.attempt}", _describe_attempt(x)) for x in details.attempts]
    render.fields((key, value) for key, value in pairs if value is not None)


def _describe_adoptions(times: list[str]) -> str | None:
    """None when its daemon neither died nor was replaced meanwhile."""
    if not times:
        return None
    count = "once" if len(times) == 1 else f"{len(times)} times"
    last = render.moment(times[-1])
    return f"{count}, by a new daemon, last at {last}: it went on as it was"


_ENDS = {"died": "its daemon, or machine, died", "stopped": "its daemon was stopped"}


def _describe_attempt(attempt: AttemptRow) -> str:
    """When and where it was, what it repeats, and why it ended."""
    said = []
    if attempt.started_at is not None:
        said.append(render.moment(attempt.started_at))
        if attempt.ended_at is not None:
            said[0] += f", {render.duration(attempt.started_at, attempt.ended_at)}"
    if attempt.executor is not None:
        said.append(f"on {attempt.executor}")
    if attempt.after is not None:
        said.append(f"continued after chunk {attempt.after}")
    elif attempt.attempt > 1 and attempt.started_at is not None:
        said.append("started over")
    if attempt.void_bytes:
        said.append(f"{render.size(attempt.void_bytes)} of output void")
    if attempt.end is not None:
        said.append(_ENDS.get(attempt.end, attempt.end))
    return "; ".join(said) or "nothing is known of it"


def _describe_usage(usage: Mapping[str, float]) -> str | None:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(usage.items())) or None
