"""Watchers of one run over HTTP, beside a bare loop of server-sent events: how late they see a
write, and what each costs the gateway."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from .harness import PATIENCE, running, wired
from .processes import cpu_seconds, rss_mib
from .report import Table
from .watchers import COUNTS, INTERVAL, LINES, WRITER

Process = asyncio.subprocess.Process


async def bench_gateway() -> list[Table]:
    """A line each 100 ms, to 1, 100 and 1,000 clients of one gateway."""
    late = Table(
        "gateway", "A process writes a line each 100 ms → 1 to 1,000 clients of HTTP have it"
    )
    late.aim = "at 1,000 at most 30 % of a core, 30 KiB each; all told of a stop within 0.3 s"
    cost = Table("gateway-cost", "What a delivered event costs, and each client")
    for count in COUNTS:
        floor = await measure_floor(count)
        ours = await measure_gateway(count)
        noun = "client" if count == 1 else "clients"
        least = late.add(f"uvicorn alone → {count:,} {noun}", floor.latencies, "ms", "floor")
        late.add(f"runctl: write → {count:,} {noun}", ours.latencies, "ms", against=least)
        cheapest = cost.add(
            f"uvicorn alone, {count:,}, processor time an event", [floor.cpu], "us", "floor"
        )
        cost.add(f"gateway, {count:,}, processor time an event", [ours.cpu], "us", against=cheapest)
        cost.add(f"gateway, {count:,}, a core", [100 * ours.share], "%", "count")
        if count > 1:
            cost.add(f"gateway, {count:,}, memory a client", [ours.memory], "KiB", "count")
        cost.add(f"gateway, {count:,}, SIGTERM → the last one is closed", [ours.stop], "ms")
    late.judge("1,000: at most 30 % of a core", ours.share <= 0.3)
    late.judge("1,000: at most 30 KiB each", ours.memory <= 30)
    late.judge("1,000: all told of a stop within 0.3 s", ours.stop <= 300)
    return [late, cost]


class Measured:
    """``latencies``: ms. ``cpu``: us of processor time for each event at each client; ``share`` of
    a core; ``memory``: KiB of each client; ``stop``: ms from the first closed one to the last."""

    def __init__(self, latencies: list[float], cpu: float, memory: float, stop: float) -> None:
        self.latencies = latencies
        self.cpu = 1e6 * cpu / len(latencies)
        self.share = cpu / (LINES * INTERVAL)
        self.memory = memory
        self.stop = stop


async def measure_floor(count: int) -> Measured:
    port = find_port()
    argv = ["-m", "bench.sse_floor", str(port), str(count), str(LINES), str(INTERVAL)]
    async with started(argv, port) as server:
        return await measure(server, port, "/", count, lambda: None)


async def measure_gateway(count: int) -> Measured:
    async with running() as daemon:
        gate, port = daemon.folder / "gate", find_port()
        async with wired(daemon) as link:
            argv = [sys.executable, "-c", WRITER.format(gate=str(gate))]
            subject = await link.submit("watchers", argv)
        path = f"/v1/runs/{subject.rpartition('.')[2]}/events"
        argv = ["-m", "runctl.gateway.main", "--config", str(daemon.config)]
        async with started([*argv, "--listen", f"127.0.0.1:{port}"], port) as server:
            return await measure(server, port, path, count, gate.touch)


async def measure(
    server: Process, port: int, path: str, count: int, begin: Callable[[], object]
) -> Measured:
    crowd = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.sse_crowd", str(port), path, str(count), str(LINES)),
        stdout=asyncio.subprocess.PIPE,
        limit=64 * 1024**2,
    )
    alone = rss_mib(server.pid)
    try:
        await read_line(crowd)
        await asyncio.sleep(0.5)
        memory = (rss_mib(server.pid) - alone) * 1024 / count
        before = cpu_seconds(server.pid)
        begin()
        latencies = json.loads(await read_line(crowd))
        cpu = cpu_seconds(server.pid) - before
        if server.returncode is None:
            server.send_signal(signal.SIGTERM)
        stop = 0.0 if path == "/" else float(await read_line(crowd))
    finally:
        if crowd.returncode is None:
            crowd.kill()
        await crowd.communicate()
    return Measured(latencies, cpu, memory, stop)


async def read_line(process: Process) -> bytes:
    assert process.stdout is not None
    async with asyncio.timeout(2 * PATIENCE):
        if not (line := await process.stdout.readline()):
            raise RuntimeError("the crowd ended early")
    return line


@asynccontextmanager
async def started(argv: list[str], port: int) -> AsyncIterator[Process]:
    """A server, once it accepts."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                await writer.wait_closed()
                break
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
