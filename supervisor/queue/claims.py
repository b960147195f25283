"""The workers of both queues, of runs and of their hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import trio
from dbos import DBOS

from ...config.schema import Config
from .claim_worker import ClaimedQueue, Worker
from .dbos_internals import System
from .row_access import APP_VERSION, HOOKS_QUEUE, QUEUE, Held, RowAccess
from .row_status import make_executable, make_tellable

#: Hooks at once on this executor, those that wait for a next try among them.
MAX_HOOKS = 100
#: The end waits so long for a claim that is being made, seconds.
LAST_CLAIM = 5.0


class Claims:
    """Nothing is claimed before ``start``."""

    def __init__(
        self,
        config: Config,
        system: System,
        rows: RowAccess,
        lease_held: Callable[[], bool],
        *,
        hooks: bool,
    ) -> None:
        """``lease_held``: whether something may be claimed now. ``hooks``: whether any are told.
        Blocking. Raises SQLAlchemyError."""
        self._rows = rows
        self._patience = config.start_timeout
        queues = [self._register(QUEUE, config.queue.max_running, partitioned=True)]
        if hooks:
            queues.append(self._register(HOOKS_QUEUE, MAX_HOOKS, partitioned=False))
        self._workers = {}
        for queue in queues:
            prepare = make_executable if queue.partitioned else make_tellable
            self._workers[queue.name] = Worker(
                system, queue, rows.executor, APP_VERSION, lease_held, prepare
            )
        system.report_executed(self._workers)
        self._list_executed = system.list_executed

    def _register(self, name: str, most: int, *, partitioned: bool) -> ClaimedQueue:
        def register() -> Any:
            # What is stored is of the executor that started last: these settings are ours.
            return DBOS.register_queue(
                name,
                worker_concurrency=most,
                partition_concurrency=1 if partitioned else None,
                on_conflict="always_update",
            )

        handle = self._rows.patiently(register, self._patience)
        return ClaimedQueue(name, handle, most, partitioned)

    def take_over(self, attempts: Mapping[str, int]) -> tuple[list[str], str]:
        """The runs of which these attempts go on, and the token of their claims. Blocking; before
        ``start``. Raises SQLAlchemyError."""
        return self._rows.patiently(
            lambda: self._workers[QUEUE].take_over(attempts), self._patience
        )

    def start(self) -> None:
        for worker in self._workers.values():
            worker.start()

    async def stop(self) -> None:
        for worker in self._workers.values():
            worker.stop()
        for worker in self._workers.values():
            await trio.to_thread.run_sync(worker.join, LAST_CLAIM)

    def kick(self) -> None:
        """Look for runs now."""
        self._workers[QUEUE].kick()

    def kick_hooks(self) -> None:
        if (worker := self._workers.get(HOOKS_QUEUE)) is not None:
            worker.kick()

    def kick_all(self) -> None:
        for worker in self._workers.values():
            worker.kick()

    def set_most(self, most: int) -> None:
        """So many runs at once from now on; what runs already goes on."""
        self._workers[QUEUE].set_most(most)

    def knows(self, held: Held) -> bool:
        """Whether what is running here by its row is known here."""
        if held.workflow in self._list_executed():
            return True
        return any(worker.knows(held.workflow, held.token) for worker in self._workers.values())

    def take_claimed(self, run: str) -> tuple[int, float] | None:
        """(which attempt this is, Unix seconds of the submit), once after each claim."""
        return self._workers[QUEUE].claimed.pop(run, None)
