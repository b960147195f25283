"""``runctl restart``: replace the daemon's program under running runs."""

from __future__ import annotations

import asyncio
import time

import click

from ...client import Client
from ...protocol import messages
from ...protocol.errors import BadRequest, RequestError, Unavailable
from ..common import App, DaemonVerb, pass_app, run
from ..display import render
from ..display.patience import make_client
from ..display.status_line import progress

#: So long the daemon may take to be back, seconds.
PATIENCE = 60.0
PAUSE = 0.05


@click.command(
    cls=DaemonVerb,
    short_help="Replace the daemon's program under running runs.",
    epilog="""\b
Examples:
  pip install --upgrade runctl && runctl restart
  runctl restart && runctl status""",
)
@pass_app
def restart(app: App) -> None:
    """Have the daemon start its program again, as it is installed by now, and wait until it is
    back. Commands go on, and their watchers see no more than a pause; chats are replayed. With
    queue.outlive = 0 commands are ended in order, and replayed as well.

    Of several executors the one that is restarted is executor_id of the configuration.
    """

    async def main() -> messages.DaemonStatus:
        async with make_client(app) as client, progress(lambda _: "runctl: runctld restarts"):
            return await _restart(app, client)

    found = run(main)
    if app.json:
        render.out_json({"executor_id": found.executor_id, "pid": found.pid})
        return
    runs = "1 run goes" if found.running == 1 else f"{found.running} runs go"
    render.out(f"restarted: executor {found.executor_id}, pid {found.pid}; {runs} on")


async def _restart(app: App, client: Client) -> messages.DaemonStatus:
    request = messages.StatusRequest(brief=True)
    executor = app.config.executor_id
    if executor is None:
        if not app.config.nats.embedded:
            raise BadRequest("several executors may be there: set executor_id to that one's")
        executor = (await client.links.ask(request, messages.DaemonStatus)).executor_id
    asked = time.monotonic()
    await client.links.ask(messages.Restart(), messages.Restarting, executor=executor)
    while True:
        try:
            found = await client.links.ask(request, messages.DaemonStatus, executor=executor)
            if found.uptime < time.monotonic() - asked:
                return found
        except (Unavailable, RequestError):
            if time.monotonic() > asked + PATIENCE:
                raise
        await asyncio.sleep(PAUSE)
