"""A runner of kind ``push``, for a run that was submitted when it was one of another kind."""

from __future__ import annotations

from collections.abc import Sequence

from ....config.schema import PushRunner
from ....protocol.errors import RunFailed
from ....protocol.model import Outcome, RunSpec
from .protocol import ALONE, Emit, Surroundings, Turn


class Push:
    """Runs that were submitted for it are ``PushedRuns``'s."""

    def __init__(self, config: PushRunner) -> None:
        self._config = config

    async def run(
        self,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        history: Sequence[Turn],
        around: Surroundings = ALONE,
    ) -> Outcome:
        raise RunFailed(
            f"runner {self._config.name!r} takes pushes by now, and this run was to do its work"
            " itself; submit it anew"
        )
