"""The ``acp`` runner: a command, which is our program that speaks with the agent
(``runctl.client.acp``). As a part of the run it outlives daemons."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath

import msgspec

from ....client.acp.stops import WORDS
from ....config.schema import AcpRunner, CommandRunner
from ....protocol.model import Outcome, RunSpec
from .command import Command
from .protocol import ALONE, Emit, Surroundings, Turn


class Acp:
    """``config``'s runs, as ``command`` runs what ``make_command`` makes of it."""

    def __init__(self, config: AcpRunner, command: Command) -> None:
        self._config = config
        self._command = command

    async def run(
        self,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        history: Sequence[Turn],
        around: Surroundings = ALONE,
    ) -> Outcome:
        """As ``Command.run``; how the agent's turn ended is said in words."""
        outcome = await self._command.run(spec, attempt, emit, history, around)
        words = WORDS.get(outcome.exit_code or 0)
        if words is None or outcome.note is not None:
            return outcome
        agent = PurePath(self._config.argv[0]).name
        return msgspec.structs.replace(outcome, error=f"{agent} {words}")


def make_command(config: AcpRunner) -> CommandRunner:
    """The command that ``config``'s runs are. Not its module's name alone: a run's directory is
    not where a program of ours is looked for."""
    argv = [sys.executable, "-P", "-m", "runctl.client.acp"]
    argv += [f"--permissions={config.permissions}", f"--output={config.output}"]
    if config.mode is not None:
        argv.append(f"--mode={config.mode}")
    values = {name: getattr(config, name) for name in CommandRunner.__struct_fields__}
    values |= {
        "kind": "command",
        "argv": (*argv, "--", *config.argv),
        "env": {**config.env, "RUNCTL_RESUME_PROMPT": config.resume_prompt},
        # Who does not wait for this signal ignores it: the agent goes on until our program has
        # cancelled its turn, or TERM comes.
        "stop_signal": "URG",
    }
    return CommandRunner(**values)
