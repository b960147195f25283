"""The faults: each does its harm, lasts, and is undone by itself."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

from proxy import Proxy

from .parts import Executor, strike
from .plan import Fault
from .stage import Stage

#: Seconds that each piece of data takes over a slow connection.
SLOW = 0.15


async def inject(stage: Stage, fault: Fault, skews: list[int]) -> bool:
    """Whether it hit anything: a daemon that is down already cannot be killed."""
    executor = stage.executors[fault.target % len(stage.executors)]
    what, _, how = fault.kind.partition(" ")
    if what == "daemon":
        return await _daemon(stage, executor, how, fault, skews)
    if what == "keeper":
        return strike(executor.keeper(), signal.SIGKILL)
    if fault.kind == "disk full":
        return await _disk(stage, fault)
    if fault.kind == "no file descriptors":
        return await _descriptors(stage, executor, fault)
    if "connections" in how or what.endswith("s'"):
        return await _network(_proxy(stage, what, fault.target), how.split()[-1], fault.lasts)
    if what == "nats-server":
        return await _nats(stage, how, fault)
    assert what == "PostgreSQL", fault.kind
    return await _postgres(stage, how, fault)


async def _daemon(
    stage: Stage, executor: Executor, how: str, fault: Fault, skews: list[int]
) -> bool:
    if how == "killed":
        return executor.signal(signal.SIGKILL)
    if how == "stopped and continued":
        began = time.monotonic()
        hit = await _pause(executor.pid, fault.lasts)
        stage.paused(began)
        return hit
    if how.endswith("clock wrong"):
        executor.skew = skews[fault.target]
    return executor.signal(signal.SIGTERM)


async def _pause(pid: int | None, seconds: float) -> bool:
    hit = strike(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        strike(pid, signal.SIGCONT)
    return hit


async def _disk(stage: Stage, fault: Fault) -> bool:
    if stage.disk is None:
        return False
    stage.disk.fill()
    try:
        end = time.monotonic() + fault.lasts
        while time.monotonic() < end:  # what is freed meanwhile is taken as well
            await asyncio.sleep(0.1)
            stage.disk.fill()
    finally:
        stage.disk.empty()
    return True


async def _descriptors(stage: Stage, executor: Executor, fault: Fault) -> bool:
    # Python itself does not start without: that would say nothing about the daemon.
    pid = executor.starve(2) if executor.ready else None
    if pid is None:
        return False
    stage.starved.add(pid)
    try:
        await asyncio.sleep(fault.lasts)
    finally:
        Executor.feed(pid)
        stage.starved.discard(pid)
    return True


def _proxy(stage: Stage, what: str, target: int) -> Proxy | None:
    if what == "NATS":
        return stage.nats_proxies[target]
    if what == "PostgreSQL":
        return stage.database_proxies[target]
    return stage.client_proxy


async def _network(proxy: Proxy | None, how: str, seconds: float) -> bool:
    if proxy is None:
        return False
    if how == "closed":
        proxy.half_close()
        return True
    harm: dict[str, Callable[[], None]] = {
        "cut": proxy.cut,
        "silent": proxy.partition,
        "slow": lambda: proxy.delay(SLOW),
    }
    harm[how]()
    try:
        await asyncio.sleep(seconds)
    finally:
        proxy.heal()
    return True


async def _nats(stage: Stage, how: str, fault: Fault) -> bool:
    if stage.nats is None:
        pid = stage.executors[0].broker()
        if how == "stopped and continued":
            return await _pause(pid, fault.lasts)
        return strike(pid, signal.SIGKILL if how == "killed" else signal.SIGTERM)
    node = stage.nats
    if how == "stopped and continued":
        return await _pause(node.pid, fault.lasts)
    number = signal.SIGKILL if how == "killed" else signal.SIGTERM
    async with stage.nats_lock:
        return await _away(lambda: node.kill(number), node.start, node.pid, fault.lasts)


async def _postgres(stage: Stage, how: str, fault: Fault) -> bool:
    server = stage.postgres
    assert server is not None
    if how == "stopped and continued":
        stage.signal_postgres(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            stage.signal_postgres(signal.SIGCONT)
        return True
    number = signal.SIGQUIT if how == "killed" else signal.SIGINT
    async with stage.postgres_lock:
        return await _away(lambda: server.stop(number), server.start, server.pid, fault.lasts)


async def _away(
    stop: Callable[[], None], start: Callable[[], None], pid: int | None, seconds: float
) -> bool:
    strike(pid, signal.SIGCONT)  # a stopped one does not hear a request to end
    await asyncio.to_thread(stop)
    try:
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(start)
    return True
