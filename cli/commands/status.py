"""``runctl status``: the daemon, NATS, the database, counts and versions."""

from __future__ import annotations

import click
import msgspec

from ...protocol import __version__, messages
from ..common import App, DaemonVerb, pass_app, run
from ..display import render
from ..display.patience import make_client
from ..health import probe


@click.command(
    cls=DaemonVerb,
    short_help="Show the daemon's state.",
    epilog="""\b
Examples:
  runctl status
  runctl --json status | jq .running
  runctl status --probe ready          (in a container, beside its runctld)""",
)
@click.option(
    "--probe",
    "kind",
    type=click.Choice(["ready", "live"]),
    metavar="KIND",
    help="Check the executor that the configuration names, within 8 s, and report by the exit"
    " code. ready: it answers, and so do its NATS and its database. live: it answers; also"
    " succeeds while NATS is unreachable.",
)
@pass_app
def status(app: App, kind: str | None) -> None:
    """Show the state of the daemon, NATS and the database, with counts and versions. Exits
    with 4 when the daemon cannot be reached."""
    if kind is not None:
        said = run(lambda: probe.probe(app.config, live=kind == "live"))
        render.out_json({"probe": kind, "said": said}) if app.json else render.out(said)
        return

    async def main() -> messages.DaemonStatus:
        async with make_client(app) as client:
            return await client.links.ask(messages.StatusRequest(), messages.DaemonStatus)

    found = run(main)
    if app.json:
        value = msgspec.to_builtins(found)
        del value["reply"]
        render.out_json(value)
        return
    nats, database = found.nats, found.database
    version = found.version
    if version != __version__:
        version += f" (this runctl is {__version__})"
    kind = "embedded" if nats.embedded else "external"
    others = found.executors if len(found.executors) > 1 else []
    link = "" if nats.connected else ", NOT CONNECTED"
    render.fields(
        [
            ("runctld", f"{version}, pid {found.pid}, up {render.seconds(found.uptime)}"),
            ("executor", found.executor_id),
            *([("keeper", _keeper(found.keeper, found.version))] if found.keeper else []),
            ("runs", f"{found.running} running, {found.queued} queued"),
            ("nats", f"{nats.url} ({kind}, {nats.version or 'version unknown'}{link})"),
            (
                "stream",
                f"{render.size(nats.stream_bytes)} in {nats.stream_messages} records",
            ),
            *[("warning", line) for line in (found.keeper_warning,) if line],
            *[("warning", line) for line in nats.warnings],
            *[("unfinished", f"{x.run} ({x.status}): {x.why}") for x in found.unfinished],
            ("database", f"{database.url} ({database.kind})"),
            *([("runners", ", ".join(found.runners))] if found.runners else []),
            *([("metrics", f"http://{found.metrics}/metrics")] if found.metrics else []),
            *([("hooks", _hooks(found.hooks))] if found.hooks else []),
            *([] if found.cgroups is None else [("cgroups", "yes" if found.cgroups else "no")]),
            *[("also" if n else "executors", _executor(x)) for n, x in enumerate(others)],
        ]
    )


def _keeper(x: messages.KeeperStatus, version: str) -> str:
    older = x.version != version
    said = " (a new one comes with a restart at which no command runs)" if older else ""
    return f"{x.version or 'version unknown'}, pid {x.pid}{said}"


def _hooks(x: messages.HooksStatus) -> str:
    return f"{x.delivered} delivered, {x.failed} given up, {x.waiting} waiting"


def _executor(x: messages.ExecutorStatus) -> str:
    if x.state == "up":
        return f"{x.executor_id}: {x.running} running, {x.version}, up {render.seconds(x.uptime)}"
    if x.state == "silent":
        return f"{x.executor_id}: DID NOT ANSWER, but holds its lease"
    return f"{x.executor_id}: GONE"
