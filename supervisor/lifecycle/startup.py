"""Start order and the outermost nurseries.

Start: lease, keeper (nothing of an earlier daemon is alive after it), NATS, then what
``assembly`` builds: stream, DBOS with recovery, control plane, ready. Stop: the reverse.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from ...config.accounts import check_rights, switched
from ...config.schema import Config
from ...config.secrets import Masker
from ...protocol.errors import LeaseHeld, LeaseLost
from ..cluster.file_lease import FileLease, executor_id, hold_file_lease, home_of
from ..cluster.lease_guard import Fence
from ..cluster.lease_taking import hold_database_lease
from ..host.logs import name_executor
from ..host.open_files import raise_limit, restore_limit
from ..host.private_files import UMASK, Inherited, inherited, prepare_state_dir
from ..host.state_format import check_format, mark_format
from ..host.stop_times import longest_stop
from ..host.systemd_notify import Notifier, close_kept, open_notifier
from ..messaging.embedded_server import Broker
from ..messaging.gateway_process import GatewayProcess
from ..processes import cgroups
from ..processes.keeper_client import Keeper
from ..processes.keeper_start import open_keeper
from ..processes.memory_files import can_move
from .asyncio_loop import open_loop
from .early_signals import Early
from .foundation import Foundation
from .optional_packages import require
from .signals import Wishes, open_wishes

log = logging.getLogger("runctld")

Serve = Callable[[Foundation, Wishes, trio.CancelScope], Awaitable[None]]


async def run(config: Config, file: Path | None, early: Early | None, hide: Masker) -> bool:
    """Run the daemon until SIGTERM or SIGINT; whether to start it again. ``config`` came from
    ``file``, or from a default place. ``hide`` masks its secrets in what is logged.

    Raises: ConfigError, LeaseHeld, LeaseLost, Unavailable."""
    umask, files = os.umask(UMASK), raise_limit()
    close_kept()
    # The keeper, both leases, NATS, the database and its recovery have start_timeout each.
    begin = 6 * config.start_timeout
    end = longest_stop(config.queue.stop_grace)
    async with (
        open_wishes(early) as wishes,
        open_notifier(
            *(wishes.stop, begin, end),
            again=lambda: wishes.again,
            leaves=lambda: wishes.leave and config.queue.outlive > 0,
        ) as notifier,
    ):
        # Until DBOS is launched there is nothing to stop in order.
        with wishes.until_stop() as start:
            given = inherited(config.withheld, umask, config.source, files)
            await _run(config, file, given, wishes, start, notifier, hide)
    if wishes.again:
        os.umask(umask)
        restore_limit(files)
    elif not wishes.leave:
        log.info("stopped; unfinished runs will be replayed")
    return wishes.again


async def _run(
    config: Config,
    file: Path | None,
    given: Inherited,
    wishes: Wishes,
    start: trio.CancelScope,
    notifier: Notifier,
    hide: Masker,
) -> None:
    require(config)
    check_rights(config)
    prepare_state_dir(config.state_dir)
    check_format(config.state_dir)
    executor = executor_id(config)
    name_executor(executor)
    began = time.monotonic()
    with (
        hold_file_lease(config.state_dir, executor) as file_lease,
        warnings.catch_warnings(),
    ):
        mark_format(config.state_dir)
        home = home_of(config.state_dir)
        # DBOS sets its own default executor; to_thread goes on with ours (``durable``).
        warnings.filterwarnings("ignore", message="executor .* is not supported by trio-asyncio")
        async with open_loop() as loop:
            loop.set_exception_handler(_log_stray)
            # The lease is let go of when the keeper has ended all.
            async with AsyncExitStack() as leases, AsyncExitStack() as stack:
                imported = await stack.enter_async_context(_importing())
                outlive = config.queue.outlive if can_move() else 0.0
                state = str(config.state_dir)
                groups = await trio.to_thread.run_sync(cgroups.prepare, state)
                held = _Held()
                keeper = await stack.enter_async_context(
                    open_keeper(
                        config.state_dir,
                        config.start_timeout,
                        given,
                        adopt=True,
                        lease=file_lease.fd,
                        outlive=outlive,
                        held=held.look,
                        cgroups=groups,
                        users={account.uid for _, account in switched(config)},
                    )
                )
                with _leaving_runs(keeper, held, file_lease, outlive, wishes, notifier):
                    if outlive:
                        await _share_token(notifier, keeper)
                    lease = None
                    if not config.database.embedded:
                        deputy = keeper if outlive else None
                        lease = await leases.enter_async_context(
                            hold_database_lease(config, executor, home, deputy)
                        )
                    fence = held.fence = Fence(file_lease, lease)
                    stack.enter_context(fence.asks_on_waking())
                    nursery = await stack.enter_async_context(trio.open_nursery())
                    nursery.start_soon(held.watch)
                    broker = None
                    if config.nats.embedded:
                        broker = Broker(config, keeper)
                        await broker.start()
                    gateway = None
                    if config.gateway.listen is not None:
                        gateway = GatewayProcess(config, keeper)
                        await gateway.adopt()
                    serve = await imported()
                    foundation = Foundation(
                        config=config,
                        file=file,
                        executor=executor,
                        home=home,
                        keeper=keeper,
                        loop=loop,
                        fence=fence,
                        notifier=notifier,
                        broker=broker,
                        gateway=gateway,
                        hide=hide,
                        cgroups=groups is not None,
                        outlives=outlive > 0,
                        began=began,
                    )
                    await serve(foundation, wishes, start)
                    nursery.cancel_scope.cancel()


class _Held:
    """The leases, once there are all."""

    def __init__(self) -> None:
        self.fence: Fence | None = None
        self.lost = False

    def look(self) -> None:
        if self.fence is not None:
            self.fence.look()

    async def watch(self) -> None:
        assert self.fence is not None
        try:
            await self.fence.watch()
        except LeaseLost:
            self.lost = True
            raise


@contextmanager
def _leaving_runs(
    keeper: Keeper,
    held: _Held,
    file_lease: FileLease,
    outlive: float,
    wishes: Wishes,
    notifier: Notifier,
) -> Iterator[None]:
    """What runs is left to the next daemon when this one was told so, or an error ends it, unless
    somebody else may begin it by then, or nobody is to: who is told to stop while it starts does
    so, in order. A service manager tells it so for a restart as well: where that has the token, it
    says with it whether all ends."""
    try:
        yield
    except BaseException as error:
        stopped = wishes.stop.is_set() and not wishes.leave and not notifier.keeps
        over = held.lost or _is_of_lease(error) or stopped
        keeper.broken_off |= bool(outlive and not over and keeper.list_runs())
        raise
    finally:
        if keeper.broken_off:
            file_lease.stay_expected()
            if held.fence is not None and held.fence.lease is not None:
                held.fence.lease.abandon()


async def _share_token(notifier: Notifier, keeper: Keeper) -> None:
    """Have the keeper see when the service manager will not start another daemon."""
    if (token := await notifier.store_token()) is not None:
        with token:
            await keeper.give_token(token.fileno())


@asynccontextmanager
async def _importing() -> AsyncIterator[Callable[[], Awaitable[Serve]]]:
    """Import ``assembly``, and DBOS with it, in a thread: the keeper and the nats-server
    start meanwhile. What is yielded waits for it."""
    done = trio.Event()
    found: list[Serve] = []

    def load() -> None:
        from .assembly import serve

        found.append(serve)

    async def in_thread() -> None:
        await trio.to_thread.run_sync(load, abandon_on_cancel=True)
        done.set()

    async def wait() -> Serve:
        await done.wait()
        return found[0]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread)
        yield wait
        nursery.cancel_scope.cancel()


def _is_of_lease(error: BaseException) -> bool:
    """Whether somebody else may begin our runs by now."""
    kinds = (LeaseLost, LeaseHeld)
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(kinds) is not None
    return isinstance(error, kinds)


def _log_stray(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Without a handler any unretrieved asyncio exception ends the whole trio.run.
    log.debug("asyncio: %s %r", context.get("message"), context.get("exception"))
