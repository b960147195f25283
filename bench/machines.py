"""Three executors over a PostgreSQL and a NATS server of their own, for the benchmarks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from runctl.protocol import messages, records, subjects

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the servers of the tests
from natsserver import Node
from pgserver import Postgres

PATIENCE = 60.0


class Executor:
    def __init__(self, path: Path, name: str, text: str) -> None:
        self.name, self._path = name, path
        path.mkdir()
        self._config, self._log = path / "runctld.toml", path / "log"
        self._config.write_text(f'state_dir = "{path}/state"\nexecutor_id = "{name}"\n{text}')
        self._offset = 0
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "runctl.supervisor.main", "-c", str(self._config)],
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    async def wait_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        while b"ready: " not in self._log.read_bytes()[self._offset :]:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} is not ready: {self._log.read_text()[-500:]}")
            await asyncio.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def peak_memory(self) -> float:
        """MiB of the daemon, at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def cpu(self) -> float:
        """Seconds of the daemon so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """A run's records as they are published; when each attempt's first chunk came."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._changed = asyncio.Event()

    async def on_record(self, msg: Msg) -> None:
        record = records.decode_record(msg.data)
        if isinstance(record, records.Chunks) and record.attempt not in self._first:
            self._first[record.attempt] = time.monotonic()
            self._changed.set()

    async def wait_chunk(self, attempt: int) -> float:
        """The monotonic time of its first chunk."""
        async with asyncio.timeout(PATIENCE):
            while attempt not in self._first:
                self._changed.clear()
                await self._changed.wait()
        return self._first[attempt]


class Machines:
    """``start`` and ``close``; ``executors`` are three."""

    def __init__(self, path: Path, settings: str) -> None:
        self.postgres = Postgres()
        (path / "nats").mkdir()
        self._node = Node(path / "nats")
        self._path, self._settings = path, settings
        self.executors: list[Executor] = []
        self.nc: Client

    async def start(self) -> None:
        await asyncio.to_thread(self.postgres.start)
        self._node.start()
        self.url = await asyncio.to_thread(self.postgres.database)
        self.nc = await nats.connect(self._node.url)
        for name in ("a", "b", "c"):
            text = f'[database]\nurl = "{self.url}"\n[nats]\nurl = "{self._node.url}"\n'
            executor = Executor(self._path / name, name, text + self._settings)
            self.executors.append(executor)
            executor.start()
        for executor in self.executors:
            await executor.wait_ready()

    async def ask(self, request: messages.Request) -> messages.Reply:
        verb = str(type(request).__struct_config__.tag)
        subject = subjects.control_subject(verb)
        answer = await self.nc.request(subject, messages.encode(request), timeout=PATIENCE)
        reply = messages.decode_reply(answer.data)
        if isinstance(reply, messages.Problem):
            messages.raise_problem(reply)
        return reply

    async def submit(self, thread: str, argv: list[str]) -> str:
        reply = await self.ask(messages.Submit(thread, argv=argv))
        assert isinstance(reply, messages.Submitted)
        return reply.run

    async def owner(self, run: str) -> Executor:
        reply = await self.ask(messages.Show(run))
        assert isinstance(reply, messages.RunDetails)
        return next(x for x in self.executors if x.name == reply.run.executor)

    async def watch(self, thread: str, run: str) -> Watch:
        watch = Watch()
        js = self.nc.jetstream()
        await js.subscribe(
            subjects.out_subject(thread, run),
            stream=subjects.STREAM,
            ordered_consumer=True,
            cb=watch.on_record,
        )
        return watch

    async def close(self) -> None:
        for executor in self.executors:
            if executor.process.poll() is None:
                executor.kill()
        await self.nc.close()
        self._node.close()
        self.postgres.close()
