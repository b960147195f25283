"""Nurseries, start order, shutdown: the only file that knows all parts.

Start: lease, keeper (nothing of an earlier daemon is alive after it), NATS, stream,
DBOS with recovery, control plane, ready. Stop: the reverse; rows of unfinished runs
stay as they are and are replayed by the next daemon of this executor ID.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
import warnings
from contextlib import AsyncExitStack
from typing import Any

import trio
import trio_asyncio

from ..config.schema import ChatRunner, CommandRunner, Config
from ..config.secrets import masker
from .broker import Broker
from .connect import connect
from .control import Control
from .durable import Durable
from .errors import Fenced, LeaseLost, RunFailed, Unavailable, shortened
from .extras import require
from .hooks import Hooks
from .lease import (
    Lease,
    executor_id,
    hold_database_lease,
    hold_file_lease,
)
from .members import Members
from .metrics import Meters, Prometheus
from .model import Outcome, RunSpec, Status
from .order import Order
from .private import UMASK, inherited, prepare_state_dir
from .processes import Keeper, open_keeper
from .registry import Live, Registry
from .retention import Retention
from .room import Room
from .runners.chat import Chat
from .runners.command import Command
from .runners.protocol import Runner, Turn
from .scrape import Scrape
from .stored import Stored
from .stream import Attempt, Streams
from .takeover import Takeover
from .windows import Alive, Window, asks

log = logging.getLogger("runctld")


async def run(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Raises: ConfigError, LeaseHeld, LeaseLost, Unavailable."""
    umask = os.umask(UMASK)
    require(config)
    prepare_state_dir(config.state_dir)
    executor = executor_id(config)
    with hold_file_lease(config.state_dir, executor), warnings.catch_warnings():
        # DBOS sets its own default executor; to_thread then uses trio's threads.
        warnings.filterwarnings("ignore", message="executor .* is not supported by trio-asyncio")
        async with trio_asyncio.open_loop() as loop:
            loop.set_exception_handler(_log_stray)
            async with AsyncExitStack() as stack:
                lease = None
                if not config.database.embedded:
                    lease = await stack.enter_async_context(hold_database_lease(config, executor))
                keeper = await stack.enter_async_context(
                    open_keeper(
                        config.state_dir,
                        config.start_timeout,
                        inherited(config.withheld, umask),
                    )
                )
                nursery = await stack.enter_async_context(trio.open_nursery())
                if lease is not None:
                    nursery.start_soon(_watch_lease, lease)
                await _Daemon(config, executor, keeper, loop).run()
                nursery.cancel_scope.cancel()


async def _watch_lease(lease: Lease) -> None:
    """End the process at once when the lease is lost: a peer may take the runs over, and
    whatever still waits for the database here would delay an orderly end. The keeper
    kills all runs when it sees us gone."""
    try:
        await lease.watch()
    except LeaseLost as error:
        print(f"runctld: {error}", file=sys.stderr, flush=True)
        logging.shutdown()
        os._exit(75)


def _log_stray(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Without a handler any unretrieved asyncio exception ends the whole trio.run.
    log.debug("asyncio: %s %r", context.get("message"), context.get("exception"))


class _Daemon:
    def __init__(
        self, config: Config, executor: str, keeper: Keeper, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._config = config
        self._executor = executor
        self._keeper = keeper
        self._loop = loop
        self._registry = Registry()
        self._scrape: Scrape | None = None
        self._meters = Meters()
        self._hooks: Hooks | None = None
        if config.metrics.listen is not None:
            self._meters = Prometheus(executor, lambda: self._config.runners)
        if config.hooks.on_end is not None:
            self._hooks = Hooks(config, keeper, self._registry, self._meters)
        self._durable = Durable(config, executor, self._dispatch, self._meters, self._hooks)
        if isinstance(self._meters, Prometheus):
            self._scrape = Scrape(config, self._meters, self._registry, self._durable)
        self._runners: dict[str, Runner] = {}
        self._streams: Streams
        self._retention: Retention
        self._order: Order
        self._alive: Alive
        self._members = None if config.database.embedded else Members(config, executor)
        for name, runner in config.runners.items():
            self._runners[name] = (
                Chat(runner)
                if isinstance(runner, ChatRunner)
                else Command(runner, keeper, config.queue.stop_grace)
            )

    async def run(self) -> None:
        began = time.monotonic()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                endpoint = None
                if self._scrape is not None:
                    await nursery.start(self._scrape.run)
                if self._config.nats.embedded:
                    broker = Broker(self._config, self._keeper, self._meters)
                    endpoint = await broker.start()
                    nursery.start_soon(broker.supervise)
                async with connect(
                    self._config, self._executor, endpoint, self._disconnected
                ) as connection:
                    nursery.start_soon(connection.watch)
                    client = connection.client
                    room, stored = Room(), Stored(client)
                    self._streams = Streams(client, room, self._meters)
                    if self._hooks is not None:
                        self._hooks.durable, self._hooks.stored = self._durable, stored
                    self._alive = asks(client)
                    await self._streams.open(self._config)
                    self._retention = Retention(
                        self._config.stream, stored, self._durable, self._registry, room
                    )
                    self._order = Order(
                        self._durable,
                        self._streams,
                        self._members,
                        self._config.queue.stop_grace,
                    )
                    if self._members is not None:
                        await self._members.announce()
                    await self._durable.launch(self._loop)
                    control = Control(
                        self._config,
                        self._executor,
                        client,
                        self._durable,
                        self._registry,
                        self._streams,
                        stored,
                        self._members,
                        self._meters,
                        self._hooks,
                    )
                    await control.start(self._loop)
                    connection.started()
                    takeover = self._takeover(control)
                    if takeover is not None:
                        nursery.start_soon(takeover.watch)
                    nursery.start_soon(self._retention.run)
                    nursery.start_soon(self._mend_ends)
                    nursery.start_soon(self._watch_keeper)
                    if self._scrape is not None:
                        self._scrape.ready(client, self._streams)
                    self._meters.ready(self._durable.recovered, time.monotonic() - began)
                    log.info(
                        "ready: executor %s, pid %d, %d unfinished runs recovered, %.2f s",
                        self._executor,
                        os.getpid(),
                        self._durable.recovered,
                        time.monotonic() - began,
                    )
                    async for number in signals:
                        log.info("%s: stopping", signal.Signals(number).name)
                        break
                    with trio.CancelScope(shield=True):
                        await self._stop(control, takeover)
                nursery.cancel_scope.cancel()
        log.info("stopped; unfinished runs will be replayed")

    def _takeover(self, control: Control) -> Takeover | None:
        if self._members is None or not self._config.takeover.enabled:
            return None
        return Takeover(
            self._config, self._executor, self._members, self._durable, control.tell_others
        )

    async def _stop(self, control: Control, takeover: Takeover | None) -> None:
        with trio.move_on_after(self._config.queue.stop_grace + 3) as limit:
            if self._scrape is not None:
                self._scrape.stopping()
            await control.stop()
            await self._durable.stop_claiming()
            await self._registry.stop_all()
            if self._hooks is not None:
                await self._hooks.stop()
        if not limit.cancelled_caught:
            await self._leave(takeover)
        if self._members is not None:
            self._members.close()
        with trio.move_on_after(1):
            await self._durable.close()

    async def _leave(self, takeover: Takeover | None) -> None:
        """Nothing of ours runs any more: say so to the other executors."""
        with trio.move_on_after(3):
            try:
                if takeover is not None:
                    await takeover.hand_over()
                elif self._members and self._executor not in await self._durable.owners(hooks=True):
                    await self._members.leave()
            except Exception as error:  # what is not handed over is taken over, or replayed
                log.warning("the runs were not handed over: %s", error)

    async def _disconnected(self) -> None:
        if hasattr(self, "_streams"):  # not before they are opened
            self._streams.lost()

    async def _watch_keeper(self) -> None:
        await self._keeper.dead.wait()
        raise Unavailable("the process keeper was killed; restarting is the way to a known state")

    async def _mend_ends(self) -> None:
        """End the streams of runs whose abort was cut by a crash before its end record."""
        since = time.time() - self._config.stream.max_age
        for run in await self._durable.aborted_since(since):
            await self._streams.end(
                run.thread, run.run, run.attempt, Outcome(Status.ABORTED, error=run.error)
            )

    # ---- one attempt ------------------------------------------------------------

    async def _dispatch(self, spec: RunSpec, attempt: int) -> Outcome:
        """Called by the durable core for each attempt. When the daemon stops it neither
        returns nor raises, so that the row stays unfinished."""
        # DBOS schedules from threads of its own, whose context knows no loop.
        trio_asyncio.current_loop.set(self._loop)
        with self._registry.start(spec, attempt) as live:
            outcome = None
            broken: Exception | None = None
            try:
                outcome = await self._attempt(live)
            except* Fenced as fenced:
                log.warning("run %s attempt %d: %s", spec.run, attempt, fenced.exceptions[0])
            except* Exception as group:
                broken = group
            if broken is not None:
                outcome = await self._broken(live, broken)
        if outcome is None:
            await trio.sleep_forever()
            raise AssertionError
        self._meters.run_ended(outcome.status, spec.runner)
        return outcome

    async def _broken(self, live: Live, error: Exception) -> Outcome | None:
        """The attempt was ended by a fault of our own: nobody must wait for it on."""
        if self._keeper.dead.is_set() or live.stopping:
            return None
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        spec = live.spec
        log.error("run %s attempt %d", spec.run, live.attempt, exc_info=error)
        decided = live.decide(self._internal(error))
        try:
            await self._streams.end(spec.thread, spec.run, live.attempt, decided)
        except Fenced as fenced:
            log.warning("run %s attempt %d: %s", spec.run, live.attempt, fenced)
            return None
        self._retention.ended(spec.thread)
        return decided

    async def _attempt(self, live: Live) -> Outcome | None:
        spec = live.spec
        runner = self._config.runners.get(spec.runner)
        if isinstance(runner, CommandRunner) and runner.tty:
            live.window = Window(self._alive)
        stream = Attempt(
            *(self._streams, spec.thread, spec.run, live.attempt, self._executor),
            tty=live.window is not None,
        )
        opened = False
        adopted = outcome = None
        async with trio.open_nursery() as nursery:
            with live.scope:
                for other in self._registry.before(live):
                    await other.gone.wait()
                if not await self._order.clear(spec):
                    live.wish_abort()
                    live.scope.cancel()
                adopted = await stream.open()
                if adopted is None:
                    opened = True
                    nursery.start_soon(stream.pump)
                    if live.window is not None:
                        nursery.start_soon(live.window.watch)
                    outcome = await self._work(live, stream)
            if live.window is not None:
                live.window.close()
            stream.close()
        if adopted is not None:
            return live.decide(adopted)
        if outcome is None and not live.aborting:
            return None
        decided = live.decide(outcome or Outcome(Status.ABORTED))
        if opened:
            await stream.end(decided)
            self._retention.ended(spec.thread)
        log.info("run %s on %s: %s", spec.run, ascii(spec.thread), decided.status)
        return decided

    async def _work(self, live: Live, stream: Attempt) -> Outcome:
        spec, limit = live.spec, self._config.queue.max_attempts
        if live.attempt > limit:
            return Outcome(
                Status.DEAD, error=f"its daemon died in each of {limit} attempts; not tried again"
            )
        runner = self._runners.get(spec.runner)
        if runner is None:
            return Outcome(
                Status.FAILED,
                error=f"runner {spec.runner!r} is no longer configured; add it, then retry",
            )
        log.info("run %s on %s: attempt %d", spec.run, ascii(spec.thread), live.attempt)
        self._meters.dispatched(time.monotonic() - live.began)
        try:
            history = await self._history(spec)
            return await runner.run(spec, live.attempt, stream.append, history, live.window)
        except RunFailed as error:
            return Outcome(Status.FAILED, error.exit_code, str(error))
        except (Fenced, trio.Cancelled):
            raise
        except Exception as error:
            if self._keeper.dead.is_set():  # the daemon is about to end: leave it to replay
                await trio.sleep_forever()
            log.exception("run %s", spec.run)
            return self._internal(error)

    async def _history(self, spec: RunSpec) -> list[Turn]:
        config = self._config.runners[spec.runner]
        if not isinstance(config, ChatRunner):
            return []
        pairs = await self._durable.turns(spec.thread, spec.run, config.history)
        return [Turn(prompt, reply) for prompt, reply in pairs]

    def _internal(self, error: Exception) -> Outcome:
        words = masker(self._config)(f"{type(error).__name__}: {error}")
        return Outcome(Status.FAILED, error=shortened(f"internal error: {words}"))
