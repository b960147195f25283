"""A daemon of one's own, its clients, and how processes are timed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from runctl.client.link import Link, dial
from runctl.config import connection
from runctl.config.schema import Config
from runctl.protocol import messages, records, subjects
from runctl.protocol.endpoint import ENDPOINT_FILE, Endpoint
from runctl.protocol.errors import Unavailable
from runctl.protocol.records import Chunks, Record

PATIENCE = 30.0


class Daemon:
    """A state directory with its daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.config = folder / "runctld.toml"
        self.process: subprocess.Popen[bytes]
        self.log: list[str] = []
        #: What python is to run.
        self.program = ["-m", "runctl.supervisor.main"]
        self.configure("")

    def configure(self, more: str, outlive: str = "30s") -> None:
        """``more`` begins with keys of [queue]. ``outlive``: how long commands go on without it."""
        self.config.write_text(
            f"state_dir = {json.dumps(str(self.state))}\n"
            f"[queue]\nmax_attempts = 100\noutlive = '{outlive}'\n{more}"
        )

    def start(self) -> None:
        """Start it; ``wait_ready`` waits for it."""
        self.process = subprocess.Popen(
            [sys.executable, *self.program, "--config", str(self.config)],
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
        raw = (self.state / ENDPOINT_FILE).read_bytes()
        found = msgspec.json.decode(raw, type=Endpoint).nats()
        client = connection.new_client(found)
        await client.connect(
            connection.list_servers(found), **connection.make_options(found), allow_reconnect=False
        )
        return client

    def runctl(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "runctl.cli.main", "-c", str(self.config), *args]


@asynccontextmanager
async def running(more: str = "", outlive: str = "30s") -> AsyncIterator[Daemon]:
    # The broker may still be writing its last words while the directory goes.
    with tempfile.TemporaryDirectory(prefix="runctl-bench-", ignore_cleanup_errors=True) as name:
        daemon = Daemon(Path(name))
        daemon.configure(more, outlive)
        daemon.start()
        try:
            await daemon.wait_ready()
            yield daemon
        finally:
            daemon.stop()


async def dialled(config: Config) -> Link:
    """A connection, as soon as there is a server; the caller limits the time."""
    while True:
        try:
            return await dial(config)
        except Unavailable:
            await asyncio.sleep(0.005)


class Wire:
    """A client that submits, and sees each record when it is published."""

    def __init__(self, client: Client) -> None:
        self._nc = client
        self._seen: dict[str, asyncio.Queue[tuple[int, Record]]] = {}

    async def open(self) -> None:
        await self._nc.subscribe(subjects.SUBJECT_PREFIX + ".>", cb=self._on_record)
        await self._nc.flush()

    async def _on_record(self, msg: Msg) -> None:
        now = time.time_ns()
        self.records(msg.subject).put_nowait((now, records.decode_record(msg.data)))

    def records(self, subject: str) -> asyncio.Queue[tuple[int, Record]]:
        return self._seen.setdefault(subject, asyncio.Queue())

    async def ask(self, request: messages.Request) -> messages.Reply:
        subject = subjects.control_subject(messages.verb_of(request))
        answer = await self._nc.request(subject, messages.encode(request), timeout=PATIENCE)
        reply = messages.decode_reply(answer.data)
        if isinstance(reply, messages.Problem):
            messages.raise_problem(reply)
        return reply

    async def submit(self, thread: str, argv: list[str]) -> str:
        """The run's subject."""
        reply = await self.ask(messages.Submit(thread=thread, runner="shell", argv=argv))
        assert isinstance(reply, messages.Submitted), reply
        return subjects.out_subject(thread, reply.run)

    async def next(self, subject: str) -> tuple[int, Record]:
        """The run's next record, and when it came (Unix ns)."""
        return await asyncio.wait_for(self.records(subject).get(), PATIENCE)

    async def ended(self, subject: str) -> None:
        """Wait for the run's end, a success, without looking at its output."""
        run = subject.rpartition(".")[2]
        async with asyncio.timeout(2 * PATIENCE):
            while True:
                reply = await self.ask(messages.Show(run))
                assert isinstance(reply, messages.RunDetails), reply
                if reply.run.status == "succeeded":
                    return
                if reply.run.status not in ("queued", "running"):
                    raise RuntimeError(f"a run ended as {reply.run}")
                await asyncio.sleep(0.01)

    async def stored(self) -> tuple[int, int]:
        """(bytes, messages) in the output stream"""
        reply = await self.ask(messages.StatusRequest())
        assert isinstance(reply, messages.DaemonStatus), reply
        return reply.nats.stream_bytes, reply.nats.stream_messages

    async def idle(self, below: int) -> None:
        """Wait until fewer runs than that are queued or running."""
        while True:
            reply = await self.ask(messages.StatusRequest())
            assert isinstance(reply, messages.DaemonStatus), reply
            if reply.queued + reply.running < below:
                return
            await asyncio.sleep(0.1)

    async def begun(self, count: int) -> None:
        """Wait until so many runs are running at once."""
        async with asyncio.timeout(PATIENCE):
            while True:
                reply = await self.ask(messages.StatusRequest())
                assert isinstance(reply, messages.DaemonStatus), reply
                if reply.running >= count:
                    return
                await asyncio.sleep(0.05)

    async def chunks(self, subject: str) -> list[tuple[int, Chunks]]:
        """The run's chunk records until its end, which must be a success."""
        found = []
        while True:
            at, record = await self.next(subject)
            if isinstance(record, records.Chunks):
                found.append((at, record))
            elif isinstance(record, records.End):
                if record.outcome.status != "succeeded":
                    raise RuntimeError(f"a run ended as {record.outcome}")
                del self._seen[subject]
                return found


@asynccontextmanager
async def wired(daemon: Daemon, *, listen: bool = True) -> AsyncIterator[Wire]:
    """Without ``listen`` no record is seen: nobody watches."""
    client = await daemon.connect()
    try:
        link = Wire(client)
        if listen:
            await link.open()
        yield link
    finally:
        await client.close()


class Watcher:
    """``runctl attach --json`` as a process; its events with the time they came at."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

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
