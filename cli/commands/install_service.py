"""``runctl install-service`` and ``uninstall-service``: the daemon under systemd."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import click

from ...config.load import find_file
from ...protocol.errors import ConfigError, Refused
from ..common import REFUSED
from ..display import render
from .managed_files import LEFT, File, put, take

UNIT = "runctld.service"
TEMPLATE = "runctld@.service"
GATEWAY = "runctl-gateway.service"
#: What commands need on top, and what they need to be another user's.
DROP_INS = ("commands.conf", "users.conf")
#: What may be running of it.
ACTIVE = ("runctld", "runctld@*", "runctl-gateway")
#: The first lines of a new configuration.
HEAD = """\
# The configuration of runctld under systemd. What it comes to: runctld -c {config} --check
# After a change: {systemctl} reload runctld (the log says what needs a restart instead).

"""


@dataclass(frozen=True)
class Place:
    """Where the system's, or a user's, service has its files; all of it below ``root``."""

    user: bool
    root: Path

    @property
    def units(self) -> Path:
        return self._config_home / "systemd/user" if self.user else self.root / "etc/systemd/system"

    @property
    def config(self) -> Path:
        folder = self._config_home if self.user else self.root / "etc"
        return folder / "runctl/runctld.toml"

    @property
    def _config_home(self) -> Path:
        found = os.environ.get("XDG_CONFIG_HOME", "")
        path = Path(found) if found.startswith("/") else Path.home() / ".config"
        return self.root / path.relative_to("/")

    @property
    def systemctl(self) -> str:
        return "systemctl --user" if self.user else "systemctl"


def _files(place: Place, program: Path, drop_ins: Iterable[str]) -> list[File]:
    units = place.units
    if place.user:
        files = [File(units / UNIT, _unit("user.service", program))]
    else:
        files = [File(units / name, _unit(name, program)) for name in (UNIT, TEMPLATE)]
        files.append(File(units / GATEWAY, _unit(GATEWAY, program.with_name("runctl"))))
        for drop_in in drop_ins:
            looser = _shipped(drop_in)
            files += [File(units / f"{name}.d/{drop_in}", looser) for name in (UNIT, TEMPLATE)]
        for folder in ("sysusers", "tmpfiles"):
            path = place.root / f"etc/{folder}.d/runctl.conf"
            files.append(File(path, _shipped(f"{folder}.conf")))
    # Root's alone until systemd-tmpfiles gives it to the daemon's group: keys will stand in it.
    return [*files, File(place.config, _config(place), 0o600, keep=True, closed=True)]


def _shipped(name: str) -> str:
    return (resources.files("runctl.systemd") / name).read_text(encoding="utf-8")


def _unit(name: str, program: Path) -> str:
    quoted = str(program).replace("\\", "\\\\").replace("%", "%%")
    quoted = f'"{quoted}"' if " " in quoted else quoted
    return re.sub(r"(?m)^ExecStart=\S+", lambda _: f"ExecStart={quoted}", _shipped(name))


def _config(place: Place) -> str:
    text = (resources.files("runctl.config") / "example.toml").read_text(encoding="utf-8")
    if not place.user:  # a restored or renamed machine must not take up another one's runs
        text = text.replace('#executor_id = "box-1"', f'executor_id = "{socket.gethostname()}"')
        text = text.replace('#state_dir = "/var/lib/runctl"', 'state_dir = "/var/lib/runctl"')
    shown = "/" / place.config.relative_to(place.root)
    return HEAD.format(config=shown, systemctl=place.systemctl) + text


def _program(place: Place) -> Path:
    """The daemon that belongs to this command. Raises Refused."""
    beside = Path(sys.executable).with_name("runctld")
    found = str(beside) if beside.exists() else shutil.which("runctld")
    if found is None:
        raise Refused("there is no runctld beside this runctl: install runctl with pip")
    program, python = Path(os.path.abspath(found)), Path(sys.executable).resolve()
    way = (program, *program.parents, python, *python.parents)
    closed = next((p for p in way if not _open_to_all(p)), None)
    if not place.user and place.root == Path("/") and closed is not None:
        raise Refused(
            f"the user runctl could not start {program}, since {closed} is closed to others;"
            " install runctl in a place such as /opt/runctl (python3 -m venv /opt/runctl), and"
            " run /opt/runctl/bin/runctl install-service"
        )
    return program


def _open_to_all(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IXOTH)


user_option = click.option(
    "--user", is_flag=True, help="Use your own systemd instead of the system's; needs no root."
)
dry_option = click.option(
    "--dry-run", "dry", is_flag=True, help="Print what would be done, but do nothing."
)
force_option = click.option(
    "--force", is_flag=True, help="Replace or remove files even if they have been modified."
)
root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/"),
    metavar="DIR",
    help="Use DIR as the root directory, for building an image.  [default: /]",
)


@click.command(
    short_help="Install the daemon as a systemd service.",
    epilog="""\b
Examples:
  runctl install-service --user
  sudo /opt/runctl/bin/runctl install-service""",
)
@user_option
@click.option(
    "--chat-only",
    is_flag=True,
    help="Leave out the drop-in for commands: hardened, for chat runners only.",
)
@click.option(
    "--run-as", is_flag=True, help="Add the drop-in that lets commands run as other users."
)
@dry_option
@force_option
@root_option
def install_service(
    user: bool, chat_only: bool, run_as: bool, dry: bool, force: bool, root: Path
) -> int:
    """Write unit files and a first configuration for the daemon, and say what to run next.

    Safe to repeat: unmodified files are updated; modified files are kept unless you confirm
    (without a terminal: exit 6, unless --force), and the configuration is always kept.
    """
    if run_as and (user or chat_only):
        raise click.UsageError(
            "--run-as is for commands under the system's systemd: leave out"
            f" {'--user' if user else '--chat-only'}"
        )
    place = Place(user, root.absolute())
    drop_ins = () if chat_only else DROP_INS if run_as else DROP_INS[:1]
    files = _files(place, _program(place), drop_ins)
    _check_rights(place, files, dry)
    left = _tell(put(files, dry=dry, may=_ask(force, "Replace")), dry)
    _next(place, [] if user else ["systemd-sysusers", "systemd-tmpfiles --create runctl.conf"])
    return left


def _next(place: Place, before: Iterable[str]) -> None:
    ctl = place.systemctl
    steps = [
        *before,
        f"{ctl} daemon-reload",
        f"{ctl} enable --now runctld",
        f"{ctl} status runctld",
    ]
    if place.user:
        steps.append("loginctl enable-linger   # runs go on when you log out")
        if place.root == Path("/") and not _taken_by_default(place.config):
            path = shlex.quote(str(place.config))
            steps.append(f"export RUNCTL_CONFIG={path}   # else runctl takes the system's")
    render.out("\nNext, after checking the configuration:")
    for step in steps:
        render.out(f"  {step}")
    if not place.user:
        render.out(f"\nFor HTTP, and a page: {ctl} enable --now runctl-gateway (docs/http.md)")


def _taken_by_default(config: Path) -> bool:
    """Whether ``runctl`` without --config finds it. A system's file comes first."""
    try:
        return find_file() in (config, None)
    except ConfigError:
        return False


@click.command(
    short_help="Remove the systemd service.",
    epilog="""\b
Examples:
  runctl uninstall-service --user""",
)
@user_option
@dry_option
@force_option
@root_option
def uninstall_service(user: bool, dry: bool, force: bool, root: Path) -> int:
    """Remove the unit files that install-service wrote; keeps configuration, runs and output.

    Refused (exit 6) while the service is running.
    """
    place = Place(user, root.absolute())
    files = _files(place, Path("/runctld"), DROP_INS)
    if not dry and root == Path("/") and (unit := _find_active(place)) is not None:
        raise Refused(f"{unit} is running: first run {place.systemctl} disable --now {unit}")
    _check_rights(place, files, dry)
    left = _tell(take(files, dry=dry, may=_ask(force, "Remove")), dry)
    render.out(f"\nNext:\n  {place.systemctl} daemon-reload")
    state = "~/.local/state/runctl" if user else "/var/lib/runctl"
    render.out(f"Runs and their output stay in {state}.")
    return left


def _find_active(place: Place) -> str | None:
    """A service of ours that runs. No answer, such as in a container, is none."""
    for unit in ACTIVE:
        command = [*place.systemctl.split(), "is-active", "--quiet", unit]
        try:
            if subprocess.run(command, stderr=subprocess.DEVNULL, timeout=10).returncode == 0:
                return unit
        except (OSError, subprocess.TimeoutExpired):
            return None
    return None


def _check_rights(place: Place, files: list[File], dry: bool) -> None:
    if dry or place.user:
        return
    for file in files:
        folder = next(p for p in file.path.parents if p.exists())
        if not os.access(folder, os.W_OK):
            raise Refused(f"{folder} is not writable: run this as root, or with --user")


def _ask(force: bool, what: str) -> Callable[[Path], bool]:
    def may(path: Path) -> bool:
        if force or not sys.stdin.isatty():
            return force
        return click.confirm(f"{path} was changed since it was written. {what} it?", err=True)

    return may


def _tell(done: Iterable[tuple[str, Path]], dry: bool) -> int:
    """Say what was done; the exit code."""
    kept = []
    for what, path in done:
        render.out(f"{'would be ' if dry and what not in STAYS else ''}{what:<9} {path}")
        if what == LEFT:
            kept.append(path)
    if kept and not dry:
        render.note(f"{kept[0]} has been modified and was kept; use --force to override")
        return REFUSED
    return 0


STAYS = ("unchanged", "kept", LEFT)
