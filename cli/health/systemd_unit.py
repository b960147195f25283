"""What ``doctor`` looks at of the systemd unit that the daemon runs in: whether commands go on
without it, as docs/systemd.md says."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ...config.schema import Config
from .finding import Finding, ok, warn

#: For systemctl's answer, seconds.
PATIENCE = 5
FIX = "in the unit; compare it with runctl install-service --dry-run"

_PROPERTIES = (
    "MainPID",
    "KillMode",
    "FileDescriptorStoreMax",
    "NotifyAccess",
    "Restart",
    "ExecStop",
    "PrivateTmp",
    "RemoveIPC",
)


class Unit(NamedTuple):
    """``manager``: what systemctl is told to ask the manager that has it."""

    name: str
    manager: str


def check_unit(config: Config, pid: int | None) -> Iterator[Finding]:
    """Of process ``pid``, the daemon; nothing of one that systemd did not start."""
    if not pid or not config.queue.outlive:
        return
    try:
        unit = find_unit(Path(f"/proc/{pid}/cgroup").read_text())
    except OSError:
        return
    if unit is None:
        return
    argv = ["systemctl", unit.manager, "show", unit.name, f"--property={','.join(_PROPERTIES)}"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        return
    except (OSError, subprocess.SubprocessError) as error:
        yield warn("unit", f"{unit.name} cannot be looked at: {error}", "run doctor again")
        return
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"systemctl ended with {done.returncode}"])[-1]
        yield warn("unit", f"{unit.name} cannot be looked at: {said}", "run doctor as its user")
        return
    has = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    if has.get("MainPID") != str(pid):  # it is something else, below which the daemon was started
        return
    lacking = list(judge_unit(has))
    for said, fix in lacking:
        yield warn("unit", f"{unit.name}: {said}", f"{fix} {FIX}")
    if not lacking:
        yield ok("unit", f"{unit.name} lets commands go on when the daemon crashes or restarts")


def find_unit(groups: str) -> Unit | None:
    """The service that a process with these cgroups, the text of /proc/PID/cgroup, is of."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "name=systemd"):
            continue
        services = [part for part in path.split("/") if part.endswith(".service")]
        if services:  # above a user's service is that user's manager, which is one of the system
            return Unit(services[-1], "--user" if len(services) > 1 else "--system")
    return None


def judge_unit(has: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What its properties, by their names, take from commands, and the setting that does not."""
    if (mode := has.get("KillMode")) not in ("process", "none"):
        yield f"KillMode={mode} ends commands with a daemon that crashes", "KillMode=process"
    if has.get("Restart") == "no":
        yield "Restart=no ends commands with a daemon that crashes", "Restart=always"
    if has.get("NotifyAccess") == "none":
        yield "systemd is told nothing, nor keeps anything for the keeper", "Type=notify"
    elif has.get("FileDescriptorStoreMax", "0") == "0":
        said = "it keeps nothing for the keeper, which does not hear that no daemon will come"
        yield said, "FileDescriptorStoreMax=8"
    if "USR1" not in has.get("ExecStop", ""):
        yield "systemctl restart ends commands, as a stop does", "an ExecStop= that sends USR1"
    if (private := has.get("PrivateTmp", "no")) != "no":
        yield f"PrivateTmp={private} empties /tmp below commands at a restart", "PrivateTmp=no"
    if has.get("RemoveIPC") == "yes":
        yield "RemoveIPC=yes takes commands' shared memory at a restart", "RemoveIPC=no"
