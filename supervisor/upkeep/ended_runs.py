"""What is known of a run once it has ended, for whoever is told of that."""

from __future__ import annotations

import logging

import trio

from ...protocol import messages, subjects
from ..execution.aborted_ends import Endings
from ..execution.registry import Registry
from ..output.inventory import Stored
from ..queue.attempt_log import sum_usage
from ..queue.engine import Durable

log = logging.getLogger("runctld.hooks")

#: For JetStream to say how much of the output is stored, seconds.
PATIENCE = 2.0


class EndedRuns:
    def __init__(
        self, registry: Registry, endings: Endings, durable: Durable, stored: Stored
    ) -> None:
        self._registry = registry
        self._endings = endings
        self._durable = durable
        self._stored = stored

    async def wait_ended(self, run: str) -> messages.RunDetails | None:
        """The run, once it has ended: it may be about to, here or on another executor. None when
        the database has no such run."""
        live = self._registry.get(run)
        if live is not None:
            await live.gone.wait()
        await self._endings.noted(run)
        pause = 0.01
        while True:
            found = await self._durable.rows.get(run)
            if found is None:
                return None
            spec, row = found
            if row.status.terminal:
                break
            await trio.sleep(pause)  # the database has no event for it
            pause = min(2 * pause, 1.0)
        output = None
        with trio.move_on_after(PATIENCE):
            try:
                (output,) = await self._stored.outputs([subjects.out_subject(row.thread, run)])
            except Exception as error:
                log.debug("output of %s: %r", run, error)
        attempts = await self._durable.attempts.log.describe(row)
        return messages.RunDetails(
            *(row, list(spec.argv), spec.prompt, spec.cwd, spec.retry_of, output),
            attempts=attempts,
            usage=sum_usage(attempts),
        )
