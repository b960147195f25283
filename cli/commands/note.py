"""``runctl note``: inside a run, say how far it is, what it has used, and its agent's session."""

from __future__ import annotations

import click

from ..common import App, PatientVerb, pass_app


@click.command(
    cls=PatientVerb,
    short_help="Inside a run: say how far it is, and what it has used.",
    epilog="""\b
Examples:
  runctl note "step 3 of 7"
  runctl note --usage input=1200 --usage output=300 --usage cost=0.0123
  runctl note "" """,
)
@click.argument("status", required=False)
@click.option(
    "--usage",
    multiple=True,
    metavar="NAME=NUMBER",
    help="What it has used since it said so last, such as input, output, cached and cost.",
)
@pass_app
def note(app: App, status: str | None, usage: tuple[str, ...]) -> None:
    """Say STATUS, a line that `list`, `top` and `show` have of the run while it works; "" for none
    any more.

    What it has used is added up, over all attempts, for `show` and hooks. Returns when all is
    durable.
    """
    from ...client import run

    if status is None and not usage:
        raise click.UsageError("nothing to say: give a STATUS, or --usage NAME=NUMBER")
    used: dict[str, float] = {}
    for part in usage:
        name, number = _read_usage(part)
        used[name] = used.get(name, 0) + number
    run.note(status, usage=used, wait=run.WAIT if app.wait is None else app.wait)


def _read_usage(part: str) -> tuple[str, float]:
    name, _, number = part.partition("=")
    try:
        value = float(number)
    except ValueError:
        raise click.UsageError(
            f"--usage {part[:80]!r} is no NAME=NUMBER, as in --usage input=1200"
        ) from None
    return name, int(value) if value.is_integer() else value
