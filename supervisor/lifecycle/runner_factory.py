"""Makes a runner from its settings."""

from __future__ import annotations

import logging

from ...config.run_limits import Plan, controllers, plan
from ...config.schema import AcpRunner, ChatRunner, CommandRunner, PushRunner, Queue, Runner
from ..execution.runners import protocol
from ..execution.runners.acp import Acp, make_command
from ..execution.runners.chat import Chat
from ..execution.runners.command import Command
from ..execution.runners.push import Push
from ..execution.runners.run_files import RunFiles
from ..processes.keeper_client import Keeper
from ..processes.memory_files import can_move

log = logging.getLogger("runctld")


class RunnerFactory:
    def __init__(self, keeper: Keeper, files: RunFiles) -> None:
        self._keeper = keeper
        self._files = files
        self._spooled = can_move()

    def make(self, runner: Runner, queue: Queue) -> protocol.Runner:
        if isinstance(runner, ChatRunner):
            return Chat(runner)
        if isinstance(runner, PushRunner):
            return Push(runner)
        command = Command(
            *(make_command(runner) if isinstance(runner, AcpRunner) else runner, self._keeper),
            *(queue.stop_grace, self._plan_limits(runner)),
            files=self._files,
            spooled=self._spooled,
        )
        return Acp(runner, command) if isinstance(runner, AcpRunner) else command

    def _plan_limits(self, runner: CommandRunner) -> Plan:
        wanted, groups = controllers(runner.limits), self._keeper.cgroups
        made = plan(runner, groups.enable(wanted) if groups is not None else ())
        if made.gaps:
            log.warning(
                "runner %s: its limits are not kept by a cgroup for each run, for %s: %s; see"
                " docs/systemd.md",
                runner.name,
                "there is none to be had here" if groups is None else "those here lack controllers",
                "; ".join(made.gaps),
            )
        return made
