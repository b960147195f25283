"""What a daemon does from its connection to NATS on: builds the parts that need DBOS, runs
them, and stops them in order. Imported while the nats-server starts: DBOS takes half a second.

Rows of unfinished runs stay as they are and are replayed by the next daemon of this
executor ID.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
import trio_asyncio

from ...config.accounts import switched
from ...config.run_limits import Plan, controllers, plan
from ...config.schema import ChatRunner, CommandRunner, Config, Queue
from ...config.schema import Runner as RunnerConfig
from ...config.secrets import Masker
from ...protocol.errors import Unavailable
from ...protocol.model import Outcome, Status
from ..api.abort import ANSWER, abort_limit
from ..api.announce import Announcer
from ..api.context import Context
from ..api.metrics_endpoint import Scrape
from ..api.server import Control
from ..cluster.absence import Absence
from ..cluster.database_lease import PROBE_LIMIT
from ..cluster.lease_guard import Fence
from ..cluster.members import TREES_GONE, Members
from ..execution.aborted_ends import Endings
from ..execution.attempt import Attempts
from ..execution.registry import Registry
from ..execution.runners.chat import Chat
from ..execution.runners.command import Command
from ..execution.runners.protocol import Runner
from ..execution.settings import Settings
from ..execution.thread_order import Order
from ..execution.wait_reasons import Waiting
from ..host.database_files import DatabaseFiles, database_path
from ..host.metrics import Meters, Prometheus
from ..host.private_files import inherited
from ..host.stop_times import LEFT, STOPPED, longest_stop
from ..host.systemd_notify import Notifier
from ..messaging.connection import connect
from ..messaging.embedded_server import Broker
from ..messaging.storage_limit import fit_to_disk
from ..output.backpressure import Backpressure
from ..output.inventory import Stored
from ..output.publisher import Streams
from ..peers.remote import Others
from ..peers.takeover import Takeover
from ..processes.keeper_client import Keeper
from ..processes.terminal_size import Window, make_alive_check
from ..queue.admission import Backlog
from ..queue.engine import Durable
from ..upkeep.history_retention import Housekeeping
from ..upkeep.hooks import Hooks
from ..upkeep.output_retention import Retention
from .reload import Reload
from .signals import Wishes

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("runctld")
aio = trio_asyncio.aio_as_trio


class Service:
    def __init__(
        self,
        config: Config,
        file: Path | None,
        executor: str,
        keeper: Keeper,
        loop: asyncio.AbstractEventLoop,
        fence: Fence,
        notifier: Notifier,
        broker: Broker | None,
        home: str,
        hide: Masker,
    ) -> None:
        """``broker``: the embedded nats-server, which runs; None for an external one.
        ``home``: what names the state directory."""
        self._config = fit_to_disk(config)
        self._hide = hide
        self._notifier = notifier
        self._broker = broker
        self._executor = executor
        self._keeper = keeper
        self._loop = loop
        self._registry = Registry()
        self._fence = fence
        self._file = file
        self._settings = Settings(config, self._make)
        self._scrape: Scrape | None = None
        self._meters = Meters()
        self._hooks: Hooks | None = None
        if config.metrics.listen is not None:
            self._meters = Prometheus(executor, lambda: self._settings.runners)
        if config.hooks.on_end is not None:
            self._hooks = Hooks(config, keeper, self._registry, self._meters)
        self._durable = Durable(
            *(config, executor, fence.wait_clear_in_thread, self._meters, self._hooks),
            lease_held=fence.holds,
        )
        if isinstance(self._meters, Prometheus):
            self._scrape = Scrape(
                *(config, self._meters, self._registry, self._durable),
                lambda: self._keeper.silent,
            )
        self._housekeeping = Housekeeping(
            config.history, self._durable, lambda: self._settings.runners
        )
        self._streams: Streams
        self._endings: Endings
        self._retention: Retention
        self._order: Order
        self._members = None if config.database.embedded else Members(config, executor, home)
        self._database: DatabaseFiles | None = None

    def _make(self, runner: RunnerConfig, queue: Queue) -> Runner:
        if isinstance(runner, ChatRunner):
            return Chat(runner)
        return Command(runner, self._keeper, queue.stop_grace, self._limits(runner))

    def _limits(self, runner: CommandRunner) -> Plan:
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

    def _apply(self, config: Config) -> None:
        """What is not asked for each time is told."""
        self._order.grace = self._settings.longest_grace
        self._notifier.end = longest_stop(self._settings.longest_grace)
        if self._hooks is not None:
            self._hooks.grace = config.queue.stop_grace
        self._durable.max_queued_per_thread = config.queue.max_queued_per_thread
        self._durable.set_max_running(config.queue.max_running)
        self._keeper.users |= {account.uid for _, account in switched(config)}
        self._keeper.inherited = inherited(
            config.withheld, self._keeper.inherited.umask, config.source
        )

    async def run(
        self, wishes: Wishes, start: trio.CancelScope, began: float, *, cgroups: bool
    ) -> None:
        """``began``: when the daemon did, on the monotonic clock. A wish to stop cancels
        ``start`` until DBOS is launched; from then on there are runs, and it is done in
        order."""
        async with trio.open_nursery() as nursery:
            endpoint = renew = None
            if self._broker is not None:
                broker = self._broker
                endpoint, renew = (lambda: broker.endpoint), broker.renew
                nursery.start_soon(broker.supervise, self._meters)
            if self._scrape is not None:
                await nursery.start(self._scrape.run)
            async with (
                connect(
                    *(self._config, self._executor, endpoint),
                    *(self._disconnected, self._reconnected),
                ) as connection,
                connect(self._config, f"{self._executor} for watchers", endpoint) as watchers,
            ):
                nursery.start_soon(connection.watch)
                nursery.start_soon(watchers.watch)
                client = connection.client
                room, stored = Backpressure(), Stored(client)
                self._streams = Streams(client, room, self._fence.wait_clear, renew, self._meters)
                if self._hooks is not None:
                    self._hooks.durable, self._hooks.stored = self._durable, stored
                await self._streams.open(self._config)
                self._retention = Retention(
                    self._config.stream, stored, self._durable, self._registry, room
                )
                self._endings = Endings(self._streams, self._durable, self._registry)
                if self._hooks is not None:
                    self._hooks.noted = self._endings.noted
                absence = Absence(client, self._members)
                self._order = Order(
                    self._durable,
                    self._streams,
                    self._endings,
                    absence,
                    self._config.queue.stop_grace,
                )
                if self._members is not None:
                    await self._announce(self._members, absence, client)
                attempts = Attempts(
                    self._settings,
                    self._registry,
                    self._order,
                    self._streams,
                    self._durable,
                    self._keeper,
                    executor=self._executor,
                    meters=self._meters,
                    hide=self._hide,
                    open_window=partial(Window, make_alive_check(client)),
                    on_end=[
                        self._retention.hear_end,
                        self._endings.hear_end,
                        self._housekeeping.hear_end,
                        lambda end: self._meters.run_ended(end.outcome.status, end.spec.runner),
                    ],
                )
                wishes.keep(start)
                await self._durable.launch(self._loop, attempts.dispatch)
                if self._config.database.embedded:
                    self._database = self._guard_database()
                context = self._context(client, stored, cgroups)
                control = Control(context)
                takeover = self._takeover(context.announcer)
                with wishes.until_stop():
                    await control.start(nursery, watchers.client)
                    connection.started()
                    watchers.started()
                    if takeover is not None:
                        nursery.start_soon(takeover.watch)
                    nursery.start_soon(self._retention.run)
                    nursery.start_soon(self._housekeeping.run)
                    nursery.start_soon(self._endings.run)
                    nursery.start_soon(self._streams.life.run)
                    nursery.start_soon(self._mend_stream)
                    nursery.start_soon(self._durable.strays.watch)
                    nursery.start_soon(
                        self._durable.thread_index.make_patiently, self._config.start_timeout
                    )
                    nursery.start_soon(self._endings.mend, self._config.stream.max_age)
                    nursery.start_soon(self._watch_keeper)
                    if self._broker is not None:
                        nursery.start_soon(self._broker.watch, partial(_contact, client))
                    reload = Reload(
                        *(self._settings.config, self._file, self._settings, self._apply),
                        *(self._hide, self._notifier.reloading),
                    )
                    nursery.start_soon(reload.run, wishes.wait_reload)
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
                    gc.freeze()  # no pause of a run's output for a look at all that was imported
                    gc.enable()
                    await self._notifier.ready(await self._words())
                    nursery.start_soon(self._notifier.show, self._registry.changed, self._words)
                await wishes.stop.wait()
                with trio.CancelScope(shield=True):
                    await self._stop(control, takeover, wishes)
            nursery.cancel_scope.cancel()

    async def _announce(self, members: Members, absence: Absence, client: Client) -> None:
        lease = self._fence.lease
        assert lease is not None
        lease.contact = partial(_contact, client)
        if lease.predecessor is not None:
            log.warning(
                "executor ID %s was another state directory's: waiting until the daemon there,"
                " which may go on without its lease, has surely ended",
                ascii(self._executor),
            )
            await absence.wait_predecessor(self._executor, lease.predecessor.grace)
            await trio.sleep(TREES_GONE)
        await members.announce()

    async def _words(self) -> str:
        """What is going on here, in one line."""
        try:
            queued = f"{await self._durable.rows.count_runs('ENQUEUED')} queued"
        except Exception as error:  # the database is away for the moment
            log.debug("status: %s", error)
            queued = "the database does not answer"
        running = len(self._registry) + len(self._durable.list_unfinished())
        return f"{running} running, {queued}"

    def _context(self, client: Client, stored: Stored, cgroups: bool) -> Context:
        return Context(
            config=self._config,
            executor=self._executor,
            client=client,
            settings=self._settings,
            registry=self._registry,
            durable=self._durable,
            streams=self._streams,
            stored=stored,
            endings=self._endings,
            others=Others(
                *(self._executor, client, self._durable, self._streams, self._endings),
                *(self._members, self._meters, lambda: abort_limit(self._settings) + ANSWER),
            ),
            waiting=Waiting(self._registry, self._keeper.held),
            backlog=Backlog(
                lambda: self._settings.queue,
                lambda: self._durable.rows.count_runs("ENQUEUED"),
                lambda: self._durable.rows.weigh_queued(),
            ),
            announcer=Announcer(client, self._registry, self._settings),
            meters=self._meters,
            hooks=self._hooks,
            hide=self._hide,
            keeper_silent=lambda: self._keeper.silent,
            cgroups=cgroups,
        )

    def _takeover(self, announcer: Announcer) -> Takeover | None:
        if self._members is None or not self._config.takeover.enabled:
            return None
        return Takeover(
            self._config, self._executor, self._members, self._durable, announcer.tell_others
        )

    async def _stop(self, control: Control, takeover: Takeover | None, wishes: Wishes) -> None:
        with trio.move_on_after(self._settings.longest_grace + STOPPED) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hurry, wishes, limit)
                if self._scrape is not None:
                    self._scrape.stopping()
                await control.stop()
                self._registry.mark_stopping()
                await self._durable.stop_claiming()
                async with trio.open_nursery() as ending:
                    ending.start_soon(self._registry.stop_all)
                    ending.start_soon(self._keeper.end_kept, self._settings.queue.stop_grace)
                # A run that ended by itself meanwhile may have left some more.
                await self._keeper.end_kept(self._settings.queue.stop_grace)
                if self._hooks is not None:
                    await self._hooks.stop()
                nursery.cancel_scope.cancel()
        self._fence.leave_if_away()
        if not limit.cancelled_caught:
            await self._leave(takeover)
        if self._members is not None:
            self._members.close()
        self._fence.leave_if_away()
        self._fence.guard(None)  # SQLite removes the log itself when all is closed
        with trio.move_on_after(1):
            await self._durable.close()
        if self._database is not None:
            self._database.close()

    def _guard_database(self) -> DatabaseFiles:
        """Raises Unavailable."""
        try:
            database = DatabaseFiles(database_path(self._config))
        except (OSError, sqlite3.Error) as error:
            raise Unavailable(f"the database cannot be opened: {error}") from None
        self._fence.guard(database)
        return database

    async def _hurry(self, wishes: Wishes, limit: trio.CancelScope) -> None:
        await wishes.hurry.wait()
        self._keeper.hasten()
        limit.deadline = min(limit.deadline, trio.current_time() + STOPPED)

    async def _has_rows(self) -> bool:
        return self._executor in await self._durable.rows.list_owners(hooks=True)

    async def _leave(self, takeover: Takeover | None) -> None:
        """Nothing of ours runs any more: say so to the other executors."""
        with trio.move_on_after(LEFT):
            try:
                if takeover is not None:
                    await takeover.hand_over()
                elif self._members and not await self._has_rows():
                    await self._members.leave()
                elif self._members:
                    await self._members.rest()
            except Exception as error:  # what is not handed over is taken over, or replayed
                log.warning("the runs were not handed over: %s", error)

    async def _disconnected(self) -> None:
        if hasattr(self, "_streams"):  # not before they are opened
            self._streams.fail_pending_acks()

    async def _reconnected(self) -> None:
        """The server may have come back without what it had."""
        if hasattr(self, "_streams"):
            self._streams.life.request_check()

    async def _mend_stream(self) -> None:
        """What others than the running runs are to write after a loss of the stream."""
        life, number = self._streams.life, self._streams.life.number
        while True:
            news = life.next_change  # what comes while we are at it is news as well
            if life.unfit is None:
                await self._streams.store_deferred_ends(self._paid)
                if life.number != number:
                    number = life.number
                    await self._endings.mend(self._config.stream.max_age)
            await news.wait()

    def _paid(self, run: str, outcome: Outcome) -> None:
        if outcome.status is Status.ABORTED:
            self._endings.stored(run, outcome.ended_ms)

    async def _watch_keeper(self) -> None:
        await self._keeper.dead.wait()
        killed = "the process keeper was killed; restarting is the way to a known state"
        raise Unavailable(self._keeper.stopped or killed)


async def _contact(client: Client) -> None:
    """Returns when NATS has answered; raises when it does not in time."""
    if not client.is_connected:  # nats-py's flush returns at once then
        raise ConnectionError("not connected")
    await aio(client.flush)(round(PROBE_LIMIT))
    if not client.is_connected:
        raise ConnectionError("the connection broke")
