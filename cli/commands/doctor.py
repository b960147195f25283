"""``runctl doctor``: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

import click
import msgspec

from ...config import submitters
from ...config.files import MOST_SECRET, read_bounded
from ...config.load import load
from ...config.schema import Config, ConfigError
from ...config.secrets import Masker
from ...protocol import messages
from ..common import FAILED, OK, App, Verb, pass_app, run
from ..display import render
from ..health import local_checks, process_limits, programs, remote_checks, systemd_unit
from ..health.finding import Finding, ok, split, warn

_SHOWN = {"ok": "ok   ", "warn": "WARN ", "fail": "FAIL "}


@click.command(
    cls=Verb,
    short_help="Find problems, and say how to fix them.",
    epilog="""\b
Examples:
  runctl doctor
  runctl --json doctor | jq -r '.findings[] | select(.state != "ok") | .fix'
\b
Exit codes: 0 no FAIL, 1 at least one FAIL, 2 usage.""",
)
@click.pass_context
@pass_app
def doctor(app: App, ctx: click.Context) -> None:
    """Check the configuration, runners, permissions, disk, limits, cgroups, ports, proxies,
    NATS, the database, clocks and the daemon.

    Works whether or not the daemon is running, and changes nothing. Each line says ok, WARN
    or FAIL; a line below it says what to do. Run it as the user that runs runctld. A daemon
    that is not running is a warning."""
    found = list(_look(app))
    failed = any(finding.state == "fail" for finding in found)
    if app.json:
        render.out_json({"ok": not failed, "findings": msgspec.to_builtins(found)})
    else:
        wide = max(len(finding.check) for finding in found)
        for finding in found:
            said = render.printable(finding.said)
            render.out(f"{_SHOWN[finding.state]} {finding.check:{wide}}  {said}")
            if finding.fix:
                render.out(f"{'':{wide + 8}}-> {render.printable(finding.fix)}")
    ctx.exit(FAILED if failed else OK)


def _look(app: App) -> Iterator[Finding]:
    try:
        config = load(app.config_file)
        yield ok("config", f"{config.source or 'the built-in defaults'}")
    except ConfigError as error:
        try:
            config = load(app.config_file, client=True)
        except ConfigError:
            yield split("config", "fail", str(error))
            return
        if "environment variable" in str(error):
            # The daemon may have what this shell has not.
            said, _, _ = str(error).rpartition(": ")
            yield warn("config", said, "run doctor with the daemon's environment to check the rest")
        else:
            yield split("config", "fail", str(error))
    for name, runner in config.runners.items():
        yield ok(f"runner {name}", submitters.described(runner))
    for name, said, fix in submitters.warnings(config, local_checks.find_daemons_user(config)):
        yield warn(f"runner {name}", said, fix)
    if config.executor_id is None and config.nats.embedded:
        config = msgspec.structs.replace(config, executor_id=_kept(config))
    yield from programs.check_programs(config)
    yield from local_checks.check_state_dir(config)
    yield from local_checks.check_access(config)
    yield from local_checks.check_key_files(config)
    yield from local_checks.check_metrics(config)
    yield local_checks.check_disk(config)
    holder = local_checks.find_holder(config)
    status, reached, asked = run(lambda: remote_checks.nats(config, holder))
    here = status.pid if status is not None and holder is not None else None
    yield from process_limits.check_limits(config, here)
    yield from process_limits.check_users(config, here)
    yield from process_limits.check_run_limits(
        config, here, status is not None and bool(status.cgroups)
    )
    yield from local_checks.check_outgoing(config, here)
    yield from local_checks.check_transport(config, here)
    yield from systemd_unit.check_unit(config, here)
    if status is not None and status.cgroups:
        yield ok("cgroups", "each run has one of its own")
    else:
        yield process_limits.check_cgroups(here)
    if holder is None:
        yield from local_checks.check_keeper(config)
        yield from local_checks.check_ports(config, ours=reached)
    yield from asked
    yield from _database(config, status)


def _database(config: Config, status: messages.DaemonStatus | None) -> Iterator[Finding]:
    if config.database.embedded and status is not None and status.database.kind != "sqlite":
        yield warn("database", "the daemon's, not checked", "give its environment to doctor")
    elif config.database.embedded:
        yield remote_checks.sqlite(config)
    else:
        hide = Masker(config)
        yield from remote_checks.postgres(config, status is not None, hide)


def _kept(config: Config) -> str | None:
    try:
        kept = read_bounded(config.state_dir / "executor-id", MOST_SECRET)
        return kept.decode().strip() or None
    except (OSError, ValueError):
        return None
