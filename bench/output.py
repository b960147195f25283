"""How many bytes a second a run's output takes, and many runs' at once."""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nats.aio.client import Client
from nats.aio.msg import Msg

from .harness import PATIENCE, Daemon, running, wired
from .processes import cpu_seconds, peak_mib, process_tree
from .report import Row, Table

LINE = 100
LINES = f"yes {'x' * (LINE - 1)} | head -n {{count}}"
BLOCK = 64 * 1024
#: The most that a record of a run's output holds.
RECORD = 512 * 1024
BLOCKS = f"dd if=/dev/zero bs={BLOCK} count={{count}} status=none"
#: Publishes of nats-py that may wait for their ack.
WINDOW = 256
CROWD = 100
#: Blocks of each of them.
SHARE = 50
TIMES = 3
COMMANDS = {
    "lines of 100 B": LINES.format(count=200_000),
    "blocks of 64 KiB": BLOCKS.format(count=3200),
}
CROWDED = f"{CROWD} runs at once, blocks"
ROOM = "max_running = 200\n"
#: Milliseconds of the daemon's processor time for a megabyte, by what was written.
Costs = dict[str, list[float]]


async def bench_output() -> list[Table]:
    """Until all of it is stored in the stream; then it is read back and compared."""
    table = Table("output", "Throughput of output, until it is stored")
    table.aim = "at least 0.7 × nats-py's bytes per second; no loss, bounded memory"
    costs = Costs()
    async with running(ROOM) as daemon:
        plain = await _nats(daemon, LINE, 100_000)
        floor = table.add("nats-py, pipelined: 100 B messages", plain, "MB/s", "floor")
        await _both(table, daemon, "lines of 100 B", floor, costs)
        plain = await _nats(daemon, BLOCK, 3200)
        floor = table.add("nats-py, pipelined: 64 KiB messages", plain, "MB/s", "floor")
        plain = await _nats(daemon, RECORD, 400, window=1)
        table.add("nats-py, one at a time: 512 KiB messages", plain, "MB/s", "floor")
        await _both(table, daemon, "blocks of 64 KiB", floor, costs)
        ours = await _crowd(daemon, costs)
        row = table.add(f"runctl: {CROWDED}", ours, "MB/s", against=floor)
        table.judge(f"{CROWDED}: 0.7 × nats-py", row.median >= 0.7 * floor.median)
        for pid, name in process_tree(daemon).items():
            table.add(f"peak memory, {name}", [peak_mib(pid)], "MiB", "count")
    table.note(
        "a run's records go one at a time, each naming the one before: that is what fences an"
        " attempt that was replaced, and keeps order. Half of the daemon's time is the kernel's,"
        " copying from the pipe and to the socket; a publisher that has its data at hand needs"
        " neither the pipe nor, pipelined, the wait"
    )
    table.note("what was stored was read back with `runctl attach`: each byte is there once")
    return [table, await _compare_costs(costs)]


async def _compare_costs(ours: Costs) -> Table:
    """What it costs that commands can go on without their daemon."""
    table = Table("cost", "Processor time of the daemon for a megabyte of output")
    table.aim = "at most 1.15 × that of commands that end with their daemon"
    plain = Costs()
    async with running(ROOM, outlive="0s") as daemon:
        for what, command in COMMANDS.items():
            await _measure(daemon, what, command, plain)
        await _crowd(daemon, plain)
    for what, samples in ours.items():
        floor = table.add(f'outlive = "0s": {what}', plain[what], "ms", "floor")
        row = table.add(f"runctl: {what}", samples, "ms", against=floor)
        table.judge(f"{what}: at most 1.15 × without", row.median <= 1.15 * floor.median)
    return table


async def _both(table: Table, daemon: Daemon, what: str, floor: Row, costs: Costs) -> None:
    file, command = daemon.folder / "output", COMMANDS[what]
    size, _ = _to_file(command, file)
    shell = _rates(size, lambda: _to_file(command, file))
    table.add(f"shell, to a file: {what}", shell, "MB/s", "floor")
    row = table.add(
        f"runctl: {what}", await _measure(daemon, what, command, costs), "MB/s", against=floor
    )
    table.judge(f"{what}: 0.7 × nats-py", row.median >= 0.7 * floor.median)


async def _measure(daemon: Daemon, what: str, command: str, costs: Costs) -> list[float]:
    """Megabytes a second; ``costs`` get the milliseconds for each."""
    size, digest = _to_file(command, daemon.folder / "output")
    samples: list[float] = []
    async with wired(daemon, listen=False) as link:
        for n in range(TIMES):
            thread = f"{what}-{n}".replace(" ", "-")
            with _measuring(daemon, size / 1e6, samples, costs.setdefault(what, [])):
                run = await link.submit(thread, ["/bin/sh", "-c", command])
                await link.ended(run)
            _check(daemon, thread, digest)
    return samples


@contextmanager
def _measuring(
    daemon: Daemon, megabytes: float, rates: list[float], costs: list[float]
) -> Iterator[None]:
    """``rates`` get the megabytes a second, ``costs`` the daemon's milliseconds for each."""
    began, spent = time.monotonic(), cpu_seconds(daemon.process.pid)
    yield
    rates.append(megabytes / (time.monotonic() - began))
    costs.append((cpu_seconds(daemon.process.pid) - spent) * 1000 / megabytes)


def _to_file(command: str, file: Path) -> tuple[int, str]:
    subprocess.run(f"({command}) > {shlex.quote(str(file))}", shell=True, check=True)
    data = file.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def _rates(size: int, work: Callable[[], object]) -> list[float]:
    samples = []
    for _ in range(TIMES):
        began = time.monotonic()
        work()
        samples.append(size / 1e6 / (time.monotonic() - began))
    return samples


def _check(daemon: Daemon, thread: str, digest: str) -> None:
    done = subprocess.run(daemon.runctl("attach", thread), check=True, capture_output=True)
    if hashlib.sha256(done.stdout).hexdigest() != digest:
        raise RuntimeError(f"what was stored of {thread} is not what was written")


async def _crowd(daemon: Daemon, costs: Costs) -> list[float]:
    """As ``_measure``. All of them are there, and begin at once."""
    gate = daemon.folder / "gate"
    command = f"echo x; while [ ! -e {gate} ]; do sleep 0.05; done; {BLOCKS.format(count=SHARE)}"
    digest = hashlib.sha256(b"x\n" + bytes(SHARE * BLOCK)).hexdigest()
    samples: list[float] = []
    async with wired(daemon, listen=False) as link:
        for n in range(TIMES):
            gate.unlink(missing_ok=True)
            threads = [f"crowd-{n}-{i}" for i in range(CROWD)]
            argv = ["/bin/sh", "-c", command]
            runs = [await link.submit(thread, argv) for thread in threads]
            await link.begun(CROWD)
            megabytes = CROWD * SHARE * BLOCK / 1e6
            with _measuring(daemon, megabytes, samples, costs.setdefault(CROWDED, [])):
                gate.touch()
                for run in runs:
                    await link.ended(run)
            for thread in threads[::20]:
                _check(daemon, thread, digest)
    return samples


async def _nats(daemon: Daemon, size: int, count: int, window: int = WINDOW) -> list[float]:
    """nats-py alone: acked publishes to the same stream, ``window`` of them under way."""
    client = await daemon.connect()
    data = b"x" * size
    samples = []
    try:
        for n in range(TIMES):
            began = time.monotonic()
            await _publish(client, f"runctl.out.plain.{size}-{n}", data, count, window)
            samples.append(size * count / 1e6 / (time.monotonic() - began))
    finally:
        await client.close()
    return samples


async def _publish(client: Client, subject: str, data: bytes, count: int, window: int) -> None:
    acked = 0
    room = asyncio.Semaphore(window)
    done = asyncio.Event()

    async def on_ack(msg: Msg) -> None:
        nonlocal acked
        if b'"error"' in msg.data:
            raise RuntimeError(msg.data.decode())
        acked += 1
        room.release()
        if acked == count:
            done.set()

    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox, cb=on_ack)
    for _ in range(count):
        await room.acquire()
        await client.publish(subject, data, reply=inbox)
    async with asyncio.timeout(PATIENCE):
        await done.wait()
    await subscription.unsubscribe()
