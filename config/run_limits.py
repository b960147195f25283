"""How the limits of a runner are put on its runs: by a cgroup each where one is to be had, by
what the kernel counts of each process, or of its user, otherwise."""

from __future__ import annotations

import os
import resource
from collections.abc import Collection
from dataclasses import dataclass, field

from .schema import CommandRunner, Limits

#: Microseconds in which a run may use so many of them, and cores times as many.
PERIOD = 100_000
#: The controllers by which a cgroup limits them.
CONTROLLERS = {"memory": "memory", "processes": "pids", "cpu": "cpu"}


@dataclass(frozen=True, slots=True)
class Plan:
    """``files``: what is written to the files of a run's cgroup, by their names. ``each``:
    (resource, value) of every process. ``gaps``: what this is not, in words."""

    files: dict[str, str] = field(default_factory=dict)
    each: list[tuple[int, int]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


def controllers(limits: Limits) -> set[str]:
    """The controllers by which a cgroup would keep ``limits``."""
    return {name for key, name in CONTROLLERS.items() if getattr(limits, key) is not None}


def plan(runner: CommandRunner, there: Collection[str]) -> Plan:
    """``there``: the controllers that runs' cgroups have."""
    limits, made = runner.limits, Plan()
    if limits.files is not None:
        made.each.append((resource.RLIMIT_NOFILE, limits.files))
    if limits.memory is not None:
        if "memory" in there:
            # Without swap, or it would be a limit of what is in memory alone; and all of a run
            # is killed, or a part that is missing would be taken for a fault of the work.
            made.files.update(
                {"memory.max": str(limits.memory), "memory.swap.max": "0", "memory.oom.group": "1"}
            )
        else:
            made.each.append((resource.RLIMIT_AS, limits.memory))
            made.gaps.append("memory is limited for each process, not for a run")
    if limits.processes is not None:
        if "pids" in there:
            made.files["pids.max"] = str(limits.processes)
        elif runner.account is not None and runner.account.uid not in (0, os.geteuid()):
            made.each.append((resource.RLIMIT_NPROC, limits.processes))
            made.gaps.append(f"processes are counted for all that {runner.user} has")
        else:
            made.gaps.append("processes are not limited without a user")
    if limits.cpu is not None:
        if "cpu" in there:
            made.files["cpu.max"] = f"{round(limits.cpu * PERIOD)} {PERIOD}"
        else:
            made.gaps.append("cpu is not limited")
    return made
