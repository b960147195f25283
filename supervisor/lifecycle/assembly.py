"""What a daemon does from its connection to NATS on: builds the parts that need DBOS, and runs
them until it is to stop. Imported while the nats-server starts: DBOS takes half a second.

Each part is built once, when all that it needs is there, and handed on.
"""

from __future__ import annotations

import gc
import logging
import os
import sqlite3
import time
from dataclasses import dataclass
from functools import partial

import trio

from ...config.accounts import switched
from ...config.schema import Config
from ...protocol.errors import Unavailable
from ..api.abort import ANSWER, abort_limit
from ..api.announce import Announcer
from ..api.context import Context
from ..api.metrics_endpoint import Scrape
from ..api.presence import Presence
from ..api.server import Control
from ..cluster.absence import Absence
from ..cluster.database_lease import PROBE_LIMIT
from ..cluster.members import TREES_GONE, Members
from ..execution.aborted_ends import Endings
from ..execution.attempt import Attempts
from ..execution.found_runs import FoundRuns
from ..execution.pushed_runs import PushedRuns
from ..execution.registry import Registry
from ..execution.runners.run_files import RunFiles
from ..execution.settings import Settings
from ..execution.thread_order import Order
from ..execution.wait_reasons import Waiting
from ..execution.work import Work
from ..host.database_files import DatabaseFiles, database_path
from ..host.metrics import Meters, Prometheus
from ..host.private_files import inherited
from ..host.stop_times import longest_stop
from ..messaging.connection import Connection, connect
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
from ..upkeep.ended_runs import EndedRuns
from ..upkeep.history_retention import Housekeeping
from ..upkeep.hooks import Hooks
from ..upkeep.output_retention import Retention
from .core import Core
from .foundation import Foundation
from .reload import Reload
from .runner_factory import RunnerFactory
from .shutdown import Shutdown
from .signals import Wishes

log = logging.getLogger("runctld")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What stands on the connection, and runs for as long as it does."""

    connection: Connection
    streams: Streams
    stored: Stored
    endings: Endings
    retention: Retention
    housekeeping: Housekeeping
    absence: Absence
    pushed: PushedRuns
    hooks: Hooks | None


async def serve(base: Foundation, wishes: Wishes, start: trio.CancelScope) -> None:
    """Run until there is a wish to stop. One cancels ``start`` until DBOS is launched; from then
    on there are runs, and the end is in order.

    Raises: ConfigError, LeaseLost, Unavailable."""
    core = _make_core(base)
    async with trio.open_nursery() as nursery:
        endpoint = None
        if (broker := base.broker) is not None:
            endpoint = lambda: broker.endpoint  # noqa: E731  # it changes
            nursery.start_soon(broker.supervise, core.meters)
        if core.scrape is not None:
            await nursery.start(core.scrape.run)
        async with (
            connect(core.config, base.executor, endpoint) as connection,
            connect(core.config, f"{base.executor} for watchers", endpoint) as watchers,
        ):
            nursery.start_soon(connection.watch)
            nursery.start_soon(watchers.watch)
            output = await _open_output(core, connection)
            announcer = Announcer(connection.client, core.registry, core.settings)
            await _launch(core, output, announcer, wishes, start)
            database = _guard_database(base) if core.config.database.embedded else None
            control = Control(_make_context(core, output, announcer, wishes))
            takeover, presence = _make_takeover(core, announcer), _make_presence(core, output)
            with wishes.until_stop():
                await control.start(nursery, watchers.client)
                connection.started()
                watchers.started()
                if takeover is not None:
                    nursery.start_soon(takeover.watch)
                if presence is not None:
                    nursery.start_soon(presence.keep)
                _start_upkeep(nursery, core, output, wishes)
                await _tell_ready(nursery, core, output)
            await wishes.stop.wait()
            with trio.CancelScope(shield=True):
                end = Shutdown(core, control, output.hooks, takeover, database, presence)
                await end.run(wishes)
        nursery.cancel_scope.cancel()


def _make_core(base: Foundation) -> Core:
    """Raises ConfigError."""
    config, registry, scrape = base.config, Registry(), None
    settings = Settings(config, RunnerFactory(base.keeper, RunFiles(config.state_dir)).make)
    counted = config.metrics.listen is not None
    meters = Prometheus(base.executor, lambda: settings.runners) if counted else Meters()
    durable = Durable(
        *(config, base.executor, base.fence.wait_clear_in_thread, meters),
        lease_held=base.fence.holds,
    )
    if isinstance(meters, Prometheus):
        scrape = Scrape(config, meters, registry, durable, lambda: base.keeper.silent)
    members = None if config.database.embedded else Members(config, base.executor, base.home)
    return Core(
        base=base,
        config=fit_to_disk(config),
        registry=registry,
        settings=settings,
        meters=meters,
        scrape=scrape,
        durable=durable,
        members=members,
    )


async def _open_output(core: Core, connection: Connection) -> Output:
    """Raises ConfigError, Unavailable."""
    base, config, client = core.base, core.config, connection.client
    room, stored = Backpressure(), Stored(client)
    replace_server = None if base.broker is None else base.broker.renew
    streams = Streams(client, room, base.fence.wait_clear, replace_server, core.meters)
    connection.on_break.append(streams.fail_pending_acks)
    # The server may have come back without what it had.
    connection.on_return.append(streams.life.request_check)
    await streams.open(config)
    pushed = PushedRuns(base.executor, streams, core.durable)
    connection.on_return.append(pushed.look)
    endings = Endings(streams, core.durable, core.registry, core.settings)
    hooks = None
    if config.hooks.on_end is not None:
        ended = EndedRuns(core.registry, endings, core.durable, stored)
        hooks = Hooks(config.hooks, core.settings, base.keeper, core.meters, ended)
    return Output(
        connection=connection,
        streams=streams,
        stored=stored,
        endings=endings,
        retention=Retention(config.stream, stored, core.durable, core.registry, room),
        housekeeping=Housekeeping(config.history, core.durable, lambda: core.settings.runners),
        absence=Absence(client, core.members),
        pushed=pushed,
        hooks=hooks,
    )


async def _launch(
    core: Core, output: Output, announcer: Announcer, wishes: Wishes, start: trio.CancelScope
) -> None:
    """From here on there are runs. Raises ConfigError, Unavailable."""
    base = core.base
    if core.members is not None:
        await _announce(core.members, base, output)
    order = Order(core.durable, output.streams, output.endings, output.absence, core.settings)
    open_window = partial(Window, make_alive_check(output.connection.client))
    work = Work(
        *(core.settings, core.durable, base.keeper, core.meters, base.hide, open_window),
        announcer.tell_changed,
    )
    on_end = [
        output.retention.hear_end,
        output.endings.hear_end,
        lambda end: core.meters.run_ended(end.outcome.status, end.spec.runner),
    ]
    found = FoundRuns(base.keeper)
    RunFiles(core.config.state_dir).sweep(found.list_attempts())
    attempts = Attempts(
        *(base.executor, core.registry, order, output.streams, core.durable, work, found),
        *(output.pushed, on_end),
    )
    wishes.keep(start)
    await core.durable.launch(base.loop, attempts.dispatch, output.hooks, found)


async def _announce(members: Members, base: Foundation, output: Output) -> None:
    lease = base.fence.lease
    assert lease is not None
    lease.contact = partial(output.connection.ask_server, PROBE_LIMIT)
    if lease.predecessor is not None:
        log.warning(
            "executor ID %s was another state directory's: waiting until the daemon there,"
            " which may go on without its lease, has surely ended",
            ascii(base.executor),
        )
        await output.absence.wait_predecessor(base.executor, lease.predecessor.grace)
        await trio.sleep(TREES_GONE)
    await members.announce()


def _guard_database(base: Foundation) -> DatabaseFiles:
    """Raises Unavailable."""
    try:
        database = DatabaseFiles(database_path(base.config))
    except (OSError, sqlite3.Error) as error:
        raise Unavailable(f"the database cannot be opened: {error}") from None
    base.fence.guard(database)
    return database


def _make_context(core: Core, output: Output, announcer: Announcer, wishes: Wishes) -> Context:
    base, client, durable, settings = (
        core.base,
        output.connection.client,
        core.durable,
        core.settings,
    )
    return Context(
        config=core.config,
        executor=base.executor,
        client=client,
        settings=settings,
        registry=core.registry,
        durable=durable,
        streams=output.streams,
        stored=output.stored,
        endings=output.endings,
        pushed=output.pushed,
        others=Others(
            *(base.executor, client, durable, output.streams, output.endings),
            *(core.members, lambda: abort_limit(settings) + ANSWER),
        ),
        waiting=Waiting(core.registry, base.keeper.held),
        backlog=Backlog(
            lambda: settings.queue,
            lambda: durable.rows.count_runs("ENQUEUED"),
            lambda: durable.rows.weigh_queued(),
        ),
        announcer=announcer,
        meters=core.meters,
        hooks=output.hooks,
        hide=base.hide,
        keeper=base.keeper,
        cgroups=base.cgroups,
        restart=wishes.restart,
        outlives=base.outlives,
    )


def _make_takeover(core: Core, announcer: Announcer) -> Takeover | None:
    if core.members is None or not core.config.takeover.enabled:
        return None
    return Takeover(
        *(core.config, core.base.executor, core.members, core.durable, announcer.tell_others)
    )


def _make_presence(core: Core, output: Output) -> Presence | None:
    """Clients of an embedded server see the state directory."""
    if core.config.nats.embedded:
        return None
    presence = Presence(output.connection.client, output.streams.life)
    output.connection.on_return.append(presence.renew)
    return presence


def _start_upkeep(nursery: trio.Nursery, core: Core, output: Output, wishes: Wishes) -> None:
    base, config = core.base, core.config
    nursery.start_soon(output.retention.run)
    nursery.start_soon(output.housekeeping.run)
    nursery.start_soon(output.endings.run)
    nursery.start_soon(output.streams.life.run)
    nursery.start_soon(output.endings.follow_stream, config.stream.max_age)
    nursery.start_soon(core.durable.strays.watch)
    nursery.start_soon(core.durable.thread_index.make_patiently, config.start_timeout)
    nursery.start_soon(output.endings.mend, config.stream.max_age)
    nursery.start_soon(_watch_keeper, base.keeper)
    if base.gateway is not None:
        nursery.start_soon(base.gateway.supervise)
    if base.broker is not None:
        nursery.start_soon(base.broker.watch, partial(output.connection.ask_server, PROBE_LIMIT))
    reload = Reload(
        *(core.settings.config, base.file, core.settings, partial(_apply, core)),
        *(base.hide, base.notifier.reloading),
    )
    nursery.start_soon(reload.run, wishes.wait_reload)


def _apply(core: Core, config: Config) -> None:
    """Tell those of a new configuration who do not ask for it each time."""
    base = core.base
    base.notifier.end = longest_stop(core.settings.longest_grace)
    core.durable.apply_limits(config.queue)
    base.keeper.users |= {account.uid for _, account in switched(config)}
    old = base.keeper.inherited
    base.keeper.inherited = inherited(config.withheld, old.umask, config.source, old.files)


async def _watch_keeper(keeper: Keeper) -> None:
    await keeper.dead.wait()
    killed = "the process keeper was killed; restarting is the way to a known state"
    raise Unavailable(keeper.stopped or killed)


async def _tell_ready(nursery: trio.Nursery, core: Core, output: Output) -> None:
    base, recovered = core.base, core.durable.recovered
    took = time.monotonic() - base.began
    if core.scrape is not None:
        core.scrape.ready(output.connection.client, output.streams)
    core.meters.ready(recovered, took)
    log.info(
        "ready: executor %s, pid %d, %d unfinished runs recovered, %.2f s",
        *(base.executor, os.getpid(), recovered, took),
    )
    gc.freeze()  # no pause of a run's output for a look at all that was imported
    gc.enable()
    describe = partial(_describe, core)
    await base.notifier.ready(await describe())
    nursery.start_soon(base.notifier.show, core.registry.changed, describe)


async def _describe(core: Core) -> str:
    """What is going on here, in one line."""
    try:
        queued = f"{await core.durable.rows.count_runs('ENQUEUED')} queued"
    except Exception as error:  # the database is away for the moment
        log.debug("status: %s", error)
        queued = "the database does not answer"
    running = len(core.registry) + len(core.durable.list_unfinished())
    return f"{running} running, {queued}"
