"""[hooks] on_end: a command is run, or JSON is posted, when a run has ended.

``durable`` stores that a run is to be told of, and calls ``tell`` until it succeeds or is
given up; so it happens at least once, and each time with the same id. A command is run as
a run's is, by the keeper.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ...config import schema
from ...config.integrations import shown_target
from ...config.schema import CommandRunner
from ...protocol import __version__, json_text, messages
from ...protocol.errors import RunFailed
from ...protocol.model import Run, RunSpec, Status
from ..execution.runners.chat.body import unwinding
from ..execution.runners.command import Command
from ..execution.settings import Settings
from ..host.failure_reasons import why
from ..host.http_trust import tls_context
from ..host.metrics import Meters
from ..processes.keeper_client import Keeper
from .ended_runs import EndedRuns

if TYPE_CHECKING:
    import httpx

    from ...protocol.records import StreamName

log = logging.getLogger("runctld.hooks")

#: Tries at once on this executor.
AT_ONCE = 10
#: How much of what a command says last is quoted.
QUOTED = 200
#: Of an answer only its status counts. So much of what follows is read, bytes and seconds: some
#: take a connection that ends before for one that broke.
ANSWER, ANSWER_TIME = 64 * 1024, 1.0


class Failed(Exception):
    """This try failed, in words for the log."""


class Hooks:
    def __init__(
        self,
        config: schema.Hooks,
        settings: Settings,
        keeper: Keeper,
        meters: Meters,
        ended: EndedRuns,
    ) -> None:
        self._config = config
        self._settings = settings
        self._keeper = keeper
        self._meters = meters
        self._ended_runs = ended
        self._limit = trio.CapacityLimiter(AT_ONCE)
        self._scopes: set[trio.CancelScope] = set()
        self._failing: set[str] = set()
        self._changed = trio.Event()
        self._stopping = False
        self.on: Collection[str] = frozenset(config.on)
        self.tries = config.tries
        self.backoff = config.backoff
        self.delivered = 0
        self.failed = 0

    async def tell(self, run: str, hook: str) -> None:
        """One try. Raises Failed. When the daemon stops it neither returns nor raises."""
        failed = None
        done = False
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            if self._stopping:
                scope.cancel()
            try:
                failed = await self._try(run, hook)
                done = True
            finally:
                self._scopes.discard(scope)
                self._changed.set()
                self._changed = trio.Event()
        if not done or (failed is not None and (self._stopping or self._keeper.gone)):
            await trio.sleep_forever()  # it is told again by the next daemon
        if failed is None:
            self._failing.discard(run)
            return
        if run not in self._failing:
            self._failing.add(run)
            log.warning("the hook of run %s: %s; %d tries in all", run, failed, self.tries)
        raise failed

    def given_up(self, run: str, error: BaseException) -> None:
        self._failing.discard(run)
        self.failed += 1
        self._meters.hook(delivered=False)
        errors = getattr(error, "errors", None)
        if errors or isinstance(error, Failed):
            last = errors[-1] if errors else error
            log.error("the hook of run %s is given up after %d tries: %s", run, self.tries, last)
        else:
            log.error("the hook of run %s cannot be told: %s", run, error)

    async def stop(self) -> None:
        """End what is being tried, and wait until it is gone."""
        self._stopping = True
        for scope in list(self._scopes):
            scope.cancel()
        while self._scopes:
            await self._changed.wait()

    async def _try(self, run: str, hook: str) -> Failed | None:
        try:
            details = await self._ended_runs.wait_ended(run)
            if details is None:
                return Failed("the run is no longer in the database")
            if details.run.status in self.on:
                async with self._limit:
                    await self._send(details, hook)
                self.delivered += 1
                self._meters.hook(delivered=True)
        except Exception as error:
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            if isinstance(error, Failed | RunFailed):
                return Failed(str(error))
            return Failed(f"{shown_target(self._config)}: {type(error).__name__}: {error}")
        return None

    async def _send(self, details: messages.RunDetails, hook: str) -> None:
        body = json_text.encode(messages.details_json(details) | {"hook": hook})
        with trio.move_on_after(self._config.timeout) as limit:
            if isinstance(self._config.on_end, str):
                await self._post(self._config.on_end, body, hook)
            else:
                await self._command(details.run, body, hook)
        if limit.cancelled_caught:
            raise Failed(
                f"{shown_target(self._config)} did not end within {self._config.timeout:g} s"
            )

    async def _command(self, run: Run, body: bytes, hook: str) -> None:
        runner = CommandRunner(
            "hook",
            cwd=Path("/"),
            env={**self._config.env, "RUNCTL_STATUS": run.status, "RUNCTL_HOOK": hook},
        )
        said = b""

        async def emit(_: StreamName, data: bytes) -> None:
            nonlocal said
            said = (said + data)[-QUOTED:]

        # As a submitter's: "{prompt}" has no meaning in it.
        argv = self._config.on_end if isinstance(self._config.on_end, tuple) else ()
        spec = RunSpec(run.run, run.thread, "hook", prompt=body.decode(), argv=argv)
        outcome = await Command(runner, self._keeper, self._settings.queue.stop_grace).run(
            spec, run.attempt, emit, []
        )
        if outcome.status is not Status.SUCCEEDED:
            words = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise Failed(f"{outcome.error}{f' ({ascii(words)[1:-1]})' if words else ''}")

    async def _post(self, url: str, body: bytes, hook: str) -> None:
        tls = await tls_context()  # which imports httpx, off the event loop
        import httpx

        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"runctl/{__version__}",
            "Accept-Encoding": "identity",
            "Idempotency-Key": hook,
            **self._config.headers,
        }
        where = shown_target(self._config)
        try:
            async with (
                httpx.AsyncClient(verify=tls, timeout=None, trust_env=False) as client,
                client.stream("POST", url, content=body, headers=headers) as answer,
            ):
                await _hear_out(answer)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise Failed(f"{where}: {why(error)}") from None
        if not answer.is_success:
            raise Failed(f"{where} answered {answer.status_code}")


async def _hear_out(answer: httpx.Response) -> None:
    """The rest of ``answer``, as it comes: what it would be unpacked has no bound."""
    import httpx

    size = 0
    with trio.move_on_after(ANSWER_TIME):
        try:
            async with unwinding(answer.aiter_raw()) as parts:
                async for part in parts:
                    size += len(part)
                    if size > ANSWER:
                        break
        except httpx.HTTPError as error:  # the status was there
            log.debug("the answer of a hook: %r", error)
