"""The faults: each does its harm, lasts, and is undone by itself."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable

from proxy import Proxy

from .parts import Executor, strike
from .plan import Fault
from .stage import STARTS_WITHIN, Stage

#: Seconds that each piece of data takes over a slow connection.
SLOW = 0.15
#: So long after its time a keeper may still have something to end, on a busy machine.
ENDED_WITHIN = 15.0
#: What of a daemon that starts is killed: so many, one after the other.
STARTS = 3


async def inject(stage: Stage, fault: Fault, skews: list[int]) -> bool:
    """Whether it hit anything: a daemon that is down already cannot be killed."""
    if fault.kind.startswith("gateway "):
        return await _gateway(stage, fault)
    executor = stage.executors[fault.target % len(stage.executors)]
    what, _, how = fault.kind.partition(" ")
    if what == "daemon":
        return await _daemon(stage, executor, how, fault, skews)
    if what == "keeper":
        executor.history.end_runs(time.monotonic(), "its keeper was killed")
        return strike(executor.keeper(), signal.SIGKILL)
    if what == "runctl":
        return await _restart(stage, executor)
    if fault.kind == "disk full":
        return await _disk(stage, fault)
    if fault.kind == "no file descriptors":
        return await _descriptors(stage, executor, fault)
    if "connections" in how or what.endswith("s'"):
        of_lease = [executor] if what == "PostgreSQL" else []
        with _Doubt(of_lease, fault):
            proxy = _proxy(stage, what, fault.target)
            return await _network(proxy, how.split()[-1], fault.lasts)
    if what == "nats-server":
        return await _nats(stage, how, fault)
    assert what == "PostgreSQL", fault.kind
    with _Doubt(stage.executors, fault):
        return await _postgres(stage, how, fault)


class _Doubt:
    """Meanwhile these may lose their leases."""

    def __init__(self, executors: list[Executor], fault: Fault) -> None:
        self._executors, self._fault = executors, fault
        self._began = time.monotonic()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for executor in self._executors:
            executor.history.doubt(self._began, time.monotonic(), self._fault.kind)


async def _daemon(
    stage: Stage, executor: Executor, how: str, fault: Fault, skews: list[int]
) -> bool:
    if how == "killed":
        return executor.kill()
    if how == "killed, the next one late":
        return await _late(stage, executor, fault)
    if how == "killed while it starts":
        return await _kill_starts(executor, fault)
    if how == "and keeper killed":
        return await _kill_both(stage, executor)
    if how == "told to leave":
        _end_runs_unless_outlived(stage, executor, how)
        return executor.signal(signal.SIGUSR1)
    if how == "told to start again":
        _end_runs_unless_outlived(stage, executor, how)
        return executor.signal(signal.SIGUSR2)
    if how == "stopped and continued":
        began = time.monotonic()
        hit = await _pause(executor.pid, fault.lasts)
        stage.paused(began)
        return hit
    if how.endswith("clock wrong"):
        executor.skew = skews[fault.target]
    return executor.signal(signal.SIGTERM)


def _end_runs_unless_outlived(stage: Stage, executor: Executor, why: str) -> None:
    """Where nothing outlives a daemon one that leaves stops in order: its runs may begin anew
    elsewhere before it has ended."""
    if not stage.outlive and executor.pid is not None:
        executor.history.end_runs(time.monotonic(), why)


async def _late(stage: Stage, executor: Executor, fault: Fault) -> bool:
    """Nobody comes for a while: what runs may end by itself meanwhile, or its time runs out."""
    executor.hold()
    try:
        began = time.monotonic()
        if not executor.kill():
            return False
        await asyncio.sleep(fault.lasts)
        if stage.outlive < fault.lasts:
            with contextlib.suppress(TimeoutError):
                await executor.wait_keeper_gone(began + stage.outlive + ENDED_WITHIN)
            now = time.monotonic()
            if executor.keeper() is not None:
                executor.history.wrong.append(f"its keeper lives {now - began:.1f} s without it")
            executor.history.silence(now, now, "no daemon came in time")
    finally:
        executor.let()
    return True


async def _kill_starts(executor: Executor, fault: Fault) -> bool:
    """Also while it adopts."""
    hit = False
    for n in range(STARTS):
        ended = executor.ended
        if executor.kill():
            hit = True
            await ended.wait()
        await executor.begun.wait()
        await asyncio.sleep(fault.lasts * (n + 1) / STARTS)
    return hit | executor.kill()


async def _kill_both(stage: Stage, executor: Executor) -> bool:
    began = time.monotonic()
    keeper = executor.keeper()
    if keeper is None or executor.pid is None:
        return False
    executor.signal(signal.SIGSTOP)  # it would end what the keeper leaves
    strike(keeper, signal.SIGKILL)
    executor.history.end_runs(time.monotonic(), "it was killed with its keeper")
    ended = executor.ended
    executor.kill()
    await ended.wait()
    gone = time.monotonic()
    async with asyncio.timeout(STARTS_WITHIN):
        await executor.wait_ready()
    executor.history.silence(gone, time.monotonic(), "it was killed with its keeper")
    stage.paused(began)  # nothing ends what came loose until then: a peer may be earlier
    return True


async def _restart(stage: Stage, executor: Executor) -> bool:
    """Amid other faults it may be told that it cannot, in one line."""
    _end_runs_unless_outlived(stage, executor, "runctl restart")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runctl.cli.main", "-c", str(executor.config), "restart"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if b"Traceback" in said or process.returncode not in (0, 1, 3, 4, 6):
        text = said.decode(errors="replace")
        executor.history.wrong.append(f"runctl restart: exit {process.returncode}: {text}")
    return process.returncode == 0


async def _gateway(stage: Stage, fault: Fault) -> bool:
    gateway = stage.gateways[fault.target]
    if fault.kind == "gateway stopped and continued":
        return await _pause(gateway.pid, fault.lasts)
    return gateway.signal(signal.SIGKILL if fault.kind == "gateway killed" else signal.SIGTERM)


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
