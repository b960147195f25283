"""What ``doctor`` looks at of what the daemon may use, and give to its runs: open files,
processes, other users, cgroups."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from ...config.accounts import MAY_SWITCH, lacking, switched
from ...config.run_limits import plan
from ...config.schema import CommandRunner, Config
from .finding import Finding, fail, ok, warn
from .local_checks import find_daemons_user

#: Of the daemon itself: NATS, the database, its keeper.
OWN_FILES = 100
#: A run's pipes, and its share of what passes by.
FILES_A_RUN = 6


def check_limits(config: Config, pid: int | None) -> Iterator[Finding]:
    """Of process ``pid``, the daemon's, or of this one."""
    whose = "of runctld" if pid else "of this shell, which a service's may differ from"
    runs = config.queue.max_running
    try:
        files, _ = resource.prlimit(pid or 0, resource.RLIMIT_NOFILE)
        processes, _ = resource.prlimit(pid or 0, resource.RLIMIT_NPROC)
    except (OSError, AttributeError):
        yield warn("limits", f"those of pid {pid} may not be read", "be root, or its user")
        return
    wanted = OWN_FILES + FILES_A_RUN * runs
    if 0 <= files < wanted:
        yield warn(
            "open files",
            f"limit {files} ({whose}); {runs} runs at once may need {wanted}",
            f"LimitNOFILE={wanted} in the unit or ulimit -n {wanted}; or a lower queue.max_running",
        )
    else:
        yield ok("open files", f"limit {'none' if files < 0 else files} ({whose})")
    most, where = (processes if processes >= 0 else None), "limit"
    pids = _read_pids_max(pid)
    if pids is not None and (most is None or pids < most):
        most, where = pids, "the cgroup's pids.max"
    if most is not None and most < runs + 50:
        yield warn(
            "processes",
            f"{where} {most} ({whose}); {runs} runs at once need more",
            f"TasksMax={2 * runs + 50} in the unit, or a lower queue.max_running",
        )
    else:
        yield ok("processes", f"{where} {'none' if most is None else most} ({whose})")


def check_users(config: Config, pid: int | None) -> Iterator[Finding]:
    """Whether process ``pid``, the daemon, or this one may run commands as those whom runners
    name."""
    try:
        others = list(switched(config, pid))
        missing = lacking(pid) if others else []
    except OSError as error:
        yield warn("users", f"what runctld may do is not known: {error.strerror}", "be its user")
        return
    if others and pid is None and find_daemons_user(config) != os.geteuid():
        names = ", ".join(sorted({account.name for _, account in others}))
        yield ok("users", f"whether runctld may run commands as {names} is seen when it runs")
        return
    for runner, account in others if missing else ():
        said = f"its user {account.name}: %s may not run commands as others, for it lacks"
        said += f" {', '.join(missing)}"
        if pid is not None:
            yield fail(f"runner {runner.name}", said % "runctld", MAY_SWITCH)
        else:
            fix = f"nothing, if the service of runctld may; else {MAY_SWITCH}"
            yield warn(f"runner {runner.name}", said % "this shell", fix)


def check_run_limits(config: Config, pid: int | None, made: bool) -> Iterator[Finding]:
    """Which limits of runners no cgroup keeps. ``made``: whether daemon ``pid`` makes them."""
    there = _find_controllers(pid) if made else ()
    for runner in config.runners.values():
        if not isinstance(runner, CommandRunner) or not (gaps := plan(runner, there).gaps):
            continue
        whose = "" if pid else ", as far as this shell tells"
        yield warn(
            f"runner {runner.name}",
            f"no cgroup keeps its limits{whose}: {'; '.join(gaps)}",
            "run runctld as a service with Delegate=yes, in cgroup v2: docs/systemd.md",
        )


def _find_controllers(pid: int | None) -> list[str]:
    """By what the cgroups that process ``pid`` makes may be limited."""
    folder = _find_cgroup(pid)
    if folder is None:
        return []
    if folder.name == "supervisor":  # where the daemon itself is
        folder = folder.parent
    try:
        return (folder / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _find_cgroup(pid: int | None) -> Path | None:
    """The cgroup v2 folder of ``pid``, or ours."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("0::"):
            for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                folder = Path(root + line[3:])
                if (folder / "cgroup.procs").exists():
                    return folder
    return None


def _read_pids_max(pid: int | None) -> int | None:
    folder = _find_cgroup(pid)
    try:
        text = (folder / "pids.max").read_text().strip() if folder else "max"
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def check_cgroups(pid: int | None) -> Finding:
    """Whether the daemon may make cgroups below its own."""
    way = "runs are ended by their process trees instead"
    folder = _find_cgroup(pid)
    if folder is None:
        return warn("cgroups", f"no cgroup v2 here; {way}", "mount cgroup v2, if that matters")
    writable = all(os.access(folder / n, os.W_OK) for n in (".", "cgroup.procs"))
    unit = folder.name if folder.name.endswith((".service", ".scope")) else ""
    delegated = any(_has_attribute(folder, name) for name in ("user.delegate", "trusted.delegate"))
    if writable and (delegated or not unit):
        return ok("cgroups", "each run gets one of its own under Delegate=yes: docs/systemd.md")
    what = "is not delegated" if writable else "may not be written"
    fix = "Delegate=yes in the unit" if unit else "delegate one, or run it as a service"
    return warn("cgroups", f"{folder} {what}; {way}", fix)


def _has_attribute(folder: Path, name: str) -> bool:
    try:
        return os.getxattr(folder, name) == b"1"
    except OSError:
        return False
