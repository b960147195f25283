"""Submit over HTTP → the first event of output, beside the same over NATS, and by a command."""

from __future__ import annotations

import asyncio
import json
import time

from .gateway import find_port, started
from .harness import PATIENCE, Daemon, running
from .report import Table
from .runs import first_outputs

SUBMITS, COMMANDS = 50, 15
ARGV = ["/bin/echo", "hello"]


async def bench_gateway_submit() -> list[Table]:
    """One run at a time; the command is a process of its own, the other two are clients that
    stay."""
    table = Table("gateway-submit", "Submit → first output of /bin/echo, over HTTP")
    async with running() as daemon:
        port = find_port()
        argv = ["-m", "runctl.gateway.main", "--config", str(daemon.config)]
        async with started([*argv, "--listen", f"127.0.0.1:{port}"], port):
            floor = await first_outputs(daemon, SUBMITS, ARGV)
            over_http = [await first_event(port, f"h{n}") for n in range(-5, SUBMITS)][5:]
            commands = [await first_line(daemon, f"c{n}") for n in range(COMMANDS)]
    least = table.add("NATS: submit → first record", floor, "ms", "floor")
    table.add("HTTP: POST → first chunk event", over_http, "ms", against=least)
    table.add("`runctl submit -a` → its first line", commands, "ms", against=least)
    return [table]


async def first_event(port: int, thread: str) -> float:
    """Milliseconds."""
    body = json.dumps({"argv": ARGV}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(PATIENCE):
            began = time.perf_counter()
            writer.write(
                f"POST /v1/threads/{thread}/runs HTTP/1.1\r\nhost: localhost\r\ncontent-type:"
                f" application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            run = json.loads(await reader.readexactly(size))["run"]
            writer.write(f"GET /v1/runs/{run}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            await reader.readuntil(b"event: chunk\n")
            return 1000 * (time.perf_counter() - began)
    finally:
        writer.close()


async def first_line(daemon: Daemon, thread: str) -> float:
    """Milliseconds, from the start of the process."""
    argv = daemon.runctl("submit", thread, "-a", "--", *ARGV)
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        await process.stdout.readline()
        took = 1000 * (time.perf_counter() - began)
        if await process.wait():
            raise RuntimeError(f"{argv} failed")
    return took
