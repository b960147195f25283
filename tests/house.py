"""Executors that share a PostgreSQL and a NATS, their keeper of processes, a client of
theirs, and what work notes down of itself."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import nats
from conftest import Box, wait_until
from nats.errors import TimeoutError as NatsTimeout
from nats.js.errors import NotFoundError, ServiceUnavailableError
from natsserver import connected
from pgserver import Postgres
from runctl.protocol import messages, records, subjects
from runctl.protocol.records import End, Record

T = TypeVar("T")


class House:
    """Executors that share a database and a NATS. ``box(name)`` makes one."""

    def __init__(self, path: Path, postgres: Postgres, nats: str) -> None:
        self.path, self.postgres, self.nats = path, postgres, nats
        self.url = postgres.database()
        self.boxes: list[Box] = []
        self.units: list[Unit] = []
        self._bus: Bus | None = None
        self._lock = threading.Lock()

    def box(
        self,
        name: str,
        more: str = "",
        *,
        top: str = "",
        url: str = "",
        nats: str = "",
        start: bool = True,
    ) -> Box:
        """``more`` begins with keys of [nats]; ``top`` comes before all sections."""
        path = self.path / f"{name}-{len(self.boxes)}"
        path.mkdir()
        box = Box(path)
        box.name = name
        self.boxes.append(box)
        box.configure(
            f'executor_id = "{name}"\n{top}'
            f'[database]\nurl = "{url or self.url}"\n[nats]\nurl = "{nats or self.nats}"\n{more}'
        )
        if start:
            box.start()
        return box

    def unit(self, box: Box) -> Unit:
        """Have ``box`` started again whenever it ends."""
        unit = Unit(box)
        self.units.append(unit)
        return unit

    @property
    def bus(self) -> Bus:
        with self._lock:
            if self._bus is None:
                self._bus = Bus(self.nats)
            return self._bus

    def sql(self, text: str, *args: Any) -> list[Any]:
        return self.postgres.sql(text, *args, url=self.url)

    def ask(self, subject: str, request: messages.Request) -> messages.Reply:
        """The answer of whoever listens at ``subject``."""
        return self.bus.ask(subject, request)

    def close(self) -> None:
        for unit in self.units:
            unit.release()
        for box in self.boxes:
            if box.daemon is not None and box.daemon.poll() is None:
                box.daemon.kill()
            box.close()
        if self._bus is not None:
            self._bus.close()
            self._bus = None


@contextmanager
def own_house(path: Path, nats: str) -> Iterator[House]:
    """Executors of a PostgreSQL of their own, which may be stopped."""
    server = Postgres()
    house = None
    try:
        server.start()
        house = House(path, server, nats)
        yield house
    finally:
        if house is not None:
            house.close()
        server.close()


class Unit:
    """A process supervisor's part: starts the box's daemon again whenever it ended.
    ``exits`` are the codes that it ended with."""

    PAUSE = 0.3

    def __init__(self, box: Box) -> None:
        self._box = box
        self._released = threading.Event()
        self.exits: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._released.is_set():
            daemon = self._box.daemon
            if daemon is None:
                daemon = self._box.start(ready=False)
            try:
                self.exits.append(daemon.wait(0.1))
            except subprocess.TimeoutExpired:
                continue
            if not self._released.wait(self.PAUSE):
                self._box.start(ready=False)

    def release(self) -> None:
        """Leave the daemon to others from here on."""
        self._released.set()
        self._thread.join()


class Bus:
    """One client's connection, for tests that ask often; a loop in a thread of its own."""

    def __init__(self, servers: str | Path) -> None:
        """``servers``: URLs, or the state directory of a daemon with a server of its own."""
        self._loop = asyncio.SelectorEventLoop()  # whatever policy trio-asyncio has set
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._nc: Any = self._do(self._connect(servers))
        except BaseException:
            self._end_loop()
            raise
        self._js = self._nc.jetstream(timeout=2)

    async def _connect(self, servers: str | Path) -> Any:
        async def ignore(_: Exception) -> None:
            pass

        options: dict[str, Any] = {
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": 0.05,
            "error_cb": ignore,
        }
        if isinstance(servers, Path):
            return await connected(servers, **options)
        return await nats.connect(servers.split(","), **options)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def ask(self, subject: str, request: messages.Request) -> messages.Reply:
        answer = self._do(self._nc.request(subject, messages.encode(request), 60))
        return messages.decode_reply(answer.data)

    def submit(
        self, thread: str, argv: list[str], executor: str | None = None, run: str | None = None
    ) -> str:
        """The run's id; asked again under it while nobody answers."""
        request = messages.Submit(thread, run=run, argv=argv)
        reply = self.ask(subjects.control_subject("submit", executor), request)
        assert isinstance(reply, messages.Submitted), reply
        return reply.run

    def run(self, run: str, executor: str | None = None) -> Any:
        """The run as ``executor`` knows it, or any."""
        reply = self.ask(subjects.control_subject("show", executor), messages.Show(run))
        assert isinstance(reply, messages.RunDetails), reply
        return reply.run

    def tail(self, thread: str, run: str) -> Record | None:
        """Its last record; None when there is none, or NATS does not say."""
        return self._do(self._tail(subjects.out_subject(thread, run)))

    async def _tail(self, subject: str) -> Record | None:
        try:
            raw = await self._js.get_last_msg(subjects.STREAM, subject)
            return records.decode_record(raw.data)
        except Exception:  # away for the moment, or not a record
            return None

    def wait_end(self, thread: str, run: str, deadline: float = 60) -> End:
        def end() -> End | None:
            tail = self.tail(thread, run)
            return tail if isinstance(tail, End) else None

        found = wait_until(end, f"the end of {run} on {thread}", deadline)
        assert isinstance(found, End)
        return found

    def records(self, thread: str, run: str) -> list[Record]:
        """All that is stored of the run."""
        return self._do(self._records(subjects.out_subject(thread, run)))

    async def _records(self, subject: str) -> list[Record]:
        found: list[Record] = []
        sequence = 1
        while True:
            try:
                raw = await self._js.get_msg(
                    subjects.STREAM, seq=sequence, subject=subject, next=True
                )
            except NotFoundError:
                return found
            except (ServiceUnavailableError, NatsTimeout):  # it has no leader for the moment
                await asyncio.sleep(0.1)
                continue
            found.append(records.decode_record(raw.data))
            sequence = (raw.seq or 0) + 1

    def call(self, subject: str, payload: bytes = b"", limit: float = 2) -> bytes:
        """The answer, within ``limit`` seconds."""
        data: bytes = self._do(self._nc.request(subject, payload, limit)).data
        return data

    def close(self) -> None:
        try:
            self._do(self._nc.close())
        finally:
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def stored_reply(stored: list[Record]) -> str:
    """The text of one whole reply: a reset, its chunks without a hole, one end."""
    first, *middle, last = stored
    assert isinstance(first, records.Reset), stored
    assert isinstance(last, records.End), stored
    expected, text = 1, b""
    for record in middle:
        assert isinstance(record, records.Chunks), stored
        assert (record.attempt, record.seq) == (first.attempt, expected), stored
        expected += len(record.chunks)
        text += b"".join(chunk.data for chunk in record.chunks)
    assert (last.attempt, last.chunks) == (first.attempt, expected - 1), stored
    return text.decode()


# ---- the journal: what work notes down of itself, on one machine's clock ------------

#: Code that begins a work's program: ``note(what)`` appends a line to the file argv[1].
NOTE = """
import os, sys, time
def note(what):
    fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    e = os.environ
    line = f"{e['RUNCTL_THREAD']} {e['RUNCTL_RUN']} {what} {os.getpid()} {time.monotonic()}"
    os.write(fd, (line + "\\n").encode())
    os.close(fd)
"""

#: Lives for argv[2] seconds and notes that it does; prints a line at each of ten parts.
ALIVE = (
    NOTE
    + """
note("begin")
parts, life = 0, float(sys.argv[2])
began = time.monotonic()
while (passed := time.monotonic() - began) < life:
    while parts < min(10, passed / life * 10):
        parts += 1
        print(f"chunk-{parts} ", flush=True)
    note("alive")
    time.sleep(0.02)
for part in range(parts + 1, 11):
    print(f"chunk-{part} ", flush=True)
note("end")
"""
)

#: Notes that it lives until the file argv[2] is there; prints ten parts, the last one then.
HELD = (
    NOTE
    + """
note("begin")
for part in range(1, 10):
    print(f"chunk-{part} ", flush=True)
while not os.path.exists(sys.argv[2]):
    note("alive")
    time.sleep(0.02)
print("chunk-10 ", flush=True)
note("end")
"""
)


def journal(path: Path) -> list[list[str]]:
    """(thread, run, what, pid, monotonic time) in the order in which it was written: whole
    lines, since the last may be being written."""
    text = path.read_text() if path.exists() else ""
    return [line.split() for line in text.rpartition("\n")[0].splitlines()]


def assert_no_overlap(lines: list[list[str]]) -> list[str]:
    """One thread's runs in the order in which they began; attempts that were cut lack an
    end. Once a process has begun, no earlier one of the thread is alive."""
    order: list[str] = []
    open_run, pid, done = None, None, set()
    for thread, run, what, by, _ in sorted(lines, key=lambda line: float(line[4])):
        if what == "begin":
            assert open_run in (None, run), f"two runs of {thread} overlapped"
            open_run, pid = run, by
            order.append(run)
            assert by not in done
            done.add(by)
        else:
            assert (run, by) == (open_run, pid), f"{run} of {thread}: {by} outlived its attempt"
            if what == "end":
                open_run = None
    return order


def ended(lines: list[list[str]]) -> list[str]:
    return [run for _, run, what, *_ in lines if what == "end"]
