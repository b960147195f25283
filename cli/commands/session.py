"""``runctl session``: the agent sessions of a thread."""

from __future__ import annotations

from typing import Literal

import click

from ...protocol import messages
from ...protocol.model import check_thread
from ..common import App, DaemonVerb, pass_app, run
from ..completion.argument_types import THREAD
from ..display import render
from ..display.patience import make_client


@click.command(
    cls=DaemonVerb,
    short_help="Show or forget by which name an agent knows a thread.",
    epilog="""\b
Examples:
  runctl session show support-42
  runctl session forget support-42""",
)
@click.argument("what", metavar="show|forget", type=click.Choice(["show", "forget"]))
@click.argument("thread", type=THREAD)
@pass_app
def session(app: App, what: Literal["show", "forget"], thread: str) -> None:
    """Show by which name the agents of THREAD know its conversation, one for each runner that has
    a `session`. "forget": the next run begins another one; what the agent has stored stays."""
    check_thread(thread)

    async def main() -> list[messages.ThreadSession]:
        async with make_client(app) as client:
            request = messages.Session(thread, what == "forget")
            return (await client.links.ask(request, messages.Sessions)).sessions

    found = run(main)
    if app.json:
        render.out_json(
            [{"runner": x.runner, "session": x.session, "made_at": x.made_at} for x in found]
        )
        return
    for one in found:
        render.out(f"{one.runner}: {one.session}")
    if not found:
        render.note(f"thread {thread} has no session")
    elif what == "forget":
        render.note("forgotten: the next run begins a new one")
