"""The workflow that tells of a run's end: "RUN.hook" on the queue "hooks"."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from typing import Any, Protocol

import trio_asyncio
from dbos import DBOS, SetWorkflowID

from . import outcomes, retries
from .row_access import HOOKS_QUEUE
from .row_status import HOOK, hook_id


class Hook(Protocol):
    """What is told of runs that end as one of ``on``."""

    on: Collection[str]
    tries: int
    backoff: float

    async def tell(self, run: str, hook: str) -> None:
        """One try, in trio. Raises what went wrong; must not return when the daemon stops."""

    def given_up(self, run: str, error: BaseException) -> None: ...


class HookWorkflow:
    """Known to DBOS from here on, which must not be launched yet."""

    def __init__(
        self,
        hook: Hook,
        loop: asyncio.AbstractEventLoop,
        stopping: threading.Event,
        kick: Callable[[], None],
    ) -> None:
        """``kick`` has what is queued looked at."""
        self._hook = hook
        self._stopping = stopping
        self._kick = kick
        trio_loop: Any = loop

        async def tell_in_trio(run: str) -> None:
            # DBOS schedules from threads of its own, whose context knows no loop.
            trio_asyncio.current_loop.set(loop)
            await hook.tell(run, hook_id(run))

        async def tell_step(run: str) -> None:
            await trio_loop.trio_as_future(tell_in_trio, run)

        step = DBOS.step(
            name="tell",
            retries_allowed=hook.tries > 1,
            max_attempts=hook.tries,
            interval_seconds=hook.backoff,
        )(tell_step)

        async def tell_hook(run: str, unread: str | None = None) -> bool:
            try:
                if unread is not None:
                    raise ValueError(unread)
                await step(run)
            except Exception as error:  # a row that fails would be logged as an error of ours
                hook.given_up(run, error)
                return False
            return True

        self._workflow: Any = DBOS.workflow(name=HOOK, max_recovery_attempts=None)(tell_hook)

    async def store(self, run: str, status: str) -> None:
        """In asyncio, before the run's row turns terminal as ``status``. Once per run."""
        if status not in self._hook.on:
            return
        with SetWorkflowID(hook_id(run)):
            await DBOS.enqueue_workflow_async(HOOKS_QUEUE, self._workflow, run)
        self._kick()

    async def store_until_done(self, run: str, status: str) -> None:
        """``store``, as often as it takes; when the daemon stops before, this does not return."""
        retries.until.set(0.0)
        await retries.until_done(
            lambda: self.store(run, status),
            retries.Complaint(f"the hook of run {run}"),
            self._stopping,
            pause=outcomes.sleep_in_asyncio,
        )
