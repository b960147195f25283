"""The watcher against a real nats-server: every chunk once, whatever happens between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import SLACK
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from pgserver import free_port
from proc import open_files
from runctl.client import consumer, stream_reader
from runctl.client import link as link_module
from runctl.client.events import (
    CaughtUp,
    Chunk,
    Connection,
    End,
    Event,
    Gap,
    Malformed,
    Progress,
    Reset,
)
from runctl.client.link import Link, dial
from runctl.client.patience import Patience
from runctl.client.shared_link import SharedLink
from runctl.config.schema import Config
from runctl.protocol import messages, records, subjects
from runctl.protocol.endpoint import ENDPOINT_FILE, LOCK_FILE, Endpoint
from runctl.protocol.errors import Unavailable
from runctl.protocol.model import Outcome, Status
from runctl.supervisor.messaging.embedded_server import find_server_binary
from runctl.supervisor.messaging.server_identity import FILE, prepare_identity

DEADLINE = 30.0 * SLACK
SUBJECT = subjects.out_subject("t", "r1")


class Server:
    """A nats-server on a port and a store of its own, which survive its kills."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = Config(state_dir=path)
        self.port = free_port()
        folder = path / "nats"
        folder.mkdir()
        certificate = prepare_identity(folder)
        endpoint = Endpoint(f"nats://127.0.0.1:{self.port}", "u", "p", certificate)
        (path / ENDPOINT_FILE).write_bytes(msgspec.json.encode(endpoint))
        pair = str(folder / FILE)
        self._settings = folder / "server.conf"
        self._settings.write_text(
            json.dumps(
                {
                    "listen": f"127.0.0.1:{self.port}",
                    "jetstream": {"store_dir": str(path / "store")},
                    "tls": {"cert_file": pair, "key_file": pair, "handshake_first": True},
                    "authorization": {"user": "u", "password": "p"},
                }
            )
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [find_server_binary(), "-c", str(self._settings)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + DEADLINE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < end, "nats-server did not start"
                time.sleep(0.01)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        yield server
    finally:
        server.kill()


async def reach(server: Server) -> Link:
    """A connection to a server that has just been started: ``dial`` gives it a few seconds."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            return await dial(server.config)
        except Unavailable:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each event is compared: a server that is slow, since the machine is busy, is not
    taken for one that hangs, which would be told, and made up for."""
    monkeypatch.setattr(stream_reader, "MISSED", 20 * SLACK)
    for module in (stream_reader, link_module):
        monkeypatch.setattr(module, "API_TIMEOUT", 10.0 * SLACK)


class Writer:
    """Writes records as the daemon does: resets roll the subject up."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.js = link.nc.jetstream(timeout=DEADLINE)

    async def open(self) -> None:
        from nats.js.api import StreamConfig

        await self.js.add_stream(
            StreamConfig(
                name=subjects.STREAM,
                subjects=[subjects.SUBJECT_PREFIX + ".*.*"],
                allow_rollup_hdrs=True,
                allow_direct=True,
                max_consumers=100_000,
            )
        )

    async def put(self, record: records.Record, subject: str = SUBJECT) -> None:
        headers = {records.SUMMARY_HEADER: records.summary(record)}
        if isinstance(record, records.Reset):
            headers["Nats-Rollup"] = "sub"
        await self.js.publish(subject, records.encode_record(record), headers=headers)

    async def reset(self, attempt: int, run: str = "r1") -> None:
        await self.put(records.Reset(run, attempt, 0.0), subjects.out_subject("t", run))

    async def chunks(self, attempt: int, seq: int, *texts: str, run: str = "r1") -> None:
        chunks = [records.Chunk("stdout", text.encode()) for text in texts]
        await self.put(records.Chunks(attempt, seq, 0.0, chunks), subjects.out_subject("t", run))

    async def end(self, attempt: int, chunks: int, run: str = "r1") -> None:
        outcome = Outcome(Status.SUCCEEDED, 0)
        await self.put(
            records.End(run, attempt, chunks, 0.0, outcome), subjects.out_subject("t", run)
        )


class Seen:
    """What a watcher has seen so far, collected in the background."""

    def __init__(self, server: Server, subject: str = SUBJECT, **options: Any) -> None:
        self.watcher = consumer.Watcher(lambda: dial(server.config), subject, **options)
        self.events: list[Event] = []

    async def __aenter__(self) -> Seen:
        await self.watcher.__aenter__()
        self._task = asyncio.create_task(self._collect())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await self.watcher.__aexit__()

    async def _collect(self) -> None:
        async for events in self.watcher:
            self.events.extend(events)

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not what():
                assert not self._task.done(), self._task.exception()
                await asyncio.sleep(0.005)

    def of(self, *kinds: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kinds)]

    def texts(self) -> list[str]:
        return [e.data.decode() for e in self.events if isinstance(e, Chunk)]


def play(server: Server, body: Callable[[Writer], Awaitable[None]]) -> None:
    async def main() -> None:
        link = await reach(server)
        try:
            writer = Writer(link)
            await writer.open()
            await asyncio.wait_for(body(writer), 2 * DEADLINE)
        finally:
            await link.close()

    asyncio.run(main())


@pytest.mark.usefixtures("unhurried")
def test_late_watcher_sees_the_run_from_its_first_chunk(server: Server) -> None:
    async def body(w: Writer) -> None:
        await w.reset(1)
        await w.chunks(1, 1, "a", "b")
        await w.chunks(1, 3, "c")
        async with Seen(server) as seen:
            await seen.until(lambda: bool(seen.of(CaughtUp)))
            await w.chunks(1, 4, "d")
            await w.end(1, 4)
            await seen.until(lambda: bool(seen.of(End)))
        assert seen.events == [
            Reset("r1", 1),
            *(Chunk("r1", 1, i, "stdout", x) for i, x in enumerate([b"a", b"b", b"c"], 1)),
            CaughtUp(),
            Chunk("r1", 1, 4, "stdout", b"d"),
            End("r1", 1, "succeeded", 0, None),
        ]

    play(server, body)


def test_reset_mid_watch_starts_the_reply_over(server: Server) -> None:
    async def body(w: Writer) -> None:
        await w.reset(1)
        await w.chunks(1, 1, "old")
        async with Seen(server) as seen:
            await seen.until(lambda: seen.texts() == ["old"])
            await w.reset(2)
            await w.chunks(2, 1, "new", "er")
            await w.end(2, 2)
            await seen.until(lambda: bool(seen.of(End)))
        assert seen.of(Reset) == [Reset("r1", 1), Reset("r1", 2)]
        assert seen.texts() == ["old", "new", "er"]
        assert not seen.of(Gap)
        async with Seen(server) as late:
            await late.until(lambda: bool(late.of(End)))
        assert late.texts() == ["new", "er"]

    play(server, body)


def test_chunks_that_come_twice_are_shown_once(server: Server) -> None:
    async def body(w: Writer) -> None:
        await w.reset(1)
        await w.chunks(1, 1, "a", "b")
        await w.chunks(1, 2, "b", "c")
        await w.chunks(1, 1, "a")
        await w.end(1, 3)
        async with Seen(server) as seen:
            await seen.until(lambda: bool(seen.of(End)))
        assert seen.texts() == ["a", "b", "c"]

    play(server, body)


def test_what_retention_removed_is_reported(server: Server) -> None:
    async def body(w: Writer) -> None:
        await w.chunks(2, 4, "d")  # its reset and three chunks are gone
        await w.chunks(2, 7, "g")
        await w.end(2, 9)
        async with Seen(server) as seen:
            await seen.until(lambda: bool(seen.of(End)))
        assert seen.of(Reset, Gap, Chunk) == [
            Reset("r1", 2),
            Gap("r1", 1, 3),
            Chunk("r1", 2, 4, "stdout", b"d"),
            Gap("r1", 5, 6),
            Chunk("r1", 2, 7, "stdout", b"g"),
            Gap("r1", 8, 9),
        ]

    play(server, body)


def test_malformed_record_is_left_out(server: Server) -> None:
    async def body(w: Writer) -> None:
        await w.reset(1)
        await w.js.publish(SUBJECT, b"\xc1 nonsense")
        await w.chunks(1, 1, "a")
        await w.end(1, 1)
        async with Seen(server) as seen:
            await seen.until(lambda: bool(seen.of(End)))
        assert seen.texts() == ["a"]
        assert len(seen.of(Malformed)) == 1

    play(server, body)


def test_nothing_stored_is_caught_up_at_once(server: Server) -> None:
    async def body(w: Writer) -> None:
        async with Seen(server) as seen:
            await seen.until(lambda: bool(seen.events))
            assert seen.events == [CaughtUp()]
            await w.reset(1)
            await seen.until(lambda: bool(seen.of(Reset)))

    play(server, body)


def test_wildcard_keeps_runs_apart_and_last_only_sees_the_end(server: Server) -> None:
    async def body(w: Writer) -> None:
        for run in ("r1", "r2"):
            await w.reset(1, run)
            await w.chunks(1, 1, f"{run}-a", run=run)
        await w.chunks(1, 2, "r1-b")
        await w.end(1, 2)
        async with Seen(server, subjects.thread_subjects("t")) as seen:
            await seen.until(lambda: bool(seen.of(CaughtUp)))
        assert not seen.of(Gap)
        assert seen.texts() == ["r1-a", "r2-a", "r1-b"]
        async with Seen(server, last_only=True) as last:
            await last.until(lambda: bool(last.of(End)))
        assert not last.texts()

    play(server, body)


@pytest.mark.usefixtures("unhurried")
def test_summaries_say_where_runs_stand_and_how_they_go_on(server: Server) -> None:
    def says(run: str, *fields: Any) -> Progress:
        return Progress(run, records.Summary(*fields), subjects.out_subject("t", run))

    async def body(w: Writer) -> None:
        await w.reset(1, "r1")
        await w.chunks(1, 1, "a", "b", run="r1")
        await w.end(1, 2, "r1")
        await w.reset(2, "r2")
        old = records.encode_record(records.Reset("r3", 1, 0.0))  # as daemons before headers did
        await w.js.publish(subjects.out_subject("t", "r3"), old)
        everything = f"{subjects.SUBJECT_PREFIX}.*.*"
        async with Seen(server, everything, summaries=True) as seen:
            await seen.until(lambda: bool(seen.of(CaughtUp)))
            assert seen.events == [
                says("r1", "end", 1, 2, "succeeded"),
                says("r2", "reset", 2),
                CaughtUp(),
            ]
            (info,) = await w.js.consumers_info(subjects.STREAM)
            assert info.config.headers_only, "contents stay on the server"
            await w.chunks(2, 1, "x" * 1000, "y", run="r2")
            await w.js.publish(
                subjects.out_subject("t", "r4"), b"", headers={records.SUMMARY_HEADER: "what 1"}
            )
            await w.link.close()
            server.kill()
            await seen.until(lambda: Connection(False) in seen.events)
            server.start()
            w.link = await reach(server)
            w.js = w.link.nc.jetstream(timeout=DEADLINE)
            await seen.until(lambda: Connection(True) in seen.events)
            await w.end(2, 2, "r2")
            await seen.until(lambda: says("r2", "end", 2, 2, "succeeded") in seen.events)
            await w.link.close()
        assert seen.of(Progress)[2:] == [
            says("r2", "chunk", 2, 2),
            says("r2", "end", 2, 2, "succeeded"),
        ]
        assert len(seen.of(Malformed)) == 1
        assert not seen.of(Chunk, Reset, Gap)

    play(server, body)


@pytest.mark.usefixtures("unhurried")
def test_server_killed_mid_watch_loses_and_repeats_nothing(server: Server) -> None:
    async def body(w: Writer) -> None:
        async with Seen(server) as seen:
            await w.reset(1)
            seq = 0
            for turn in range(3):
                for _ in range(50):
                    seq += 1
                    await w.chunks(1, seq, str(seq))
                await w.link.close()
                server.kill()
                await seen.until(lambda turn=turn: len(seen.of(Connection)) == 2 * turn + 1)
                server.start()
                w.link = await reach(server)
                w.js = w.link.nc.jetstream(timeout=DEADLINE)
                async with asyncio.timeout(DEADLINE):
                    while True:  # JetStream is not ready as soon as the port is
                        try:
                            await w.js.stream_info(subjects.STREAM)
                            break
                        except Exception:
                            await asyncio.sleep(0.02)
                seq += 1
                await w.chunks(1, seq, str(seq))
                await seen.until(lambda n=seq: len(seen.texts()) >= n)
            await w.end(1, seq)
            await seen.until(lambda: bool(seen.of(End)))
            await w.link.close()
        assert seen.texts() == [str(i) for i in range(1, seq + 1)]
        assert not seen.of(Gap)
        ups = [e.up for e in seen.events if isinstance(e, Connection)]
        assert ups == [False, True] * 3

    play(server, body)


def test_consumer_deleted_behind_our_back_is_made_again(server: Server) -> None:
    async def body(w: Writer) -> None:
        await w.reset(1)
        async with Seen(server) as seen:
            await seen.until(lambda: bool(seen.of(CaughtUp)))
            for i in range(1, 4):
                for info in await w.js.consumers_info(subjects.STREAM):
                    await w.js.delete_consumer(subjects.STREAM, info.name)
                await w.chunks(1, i, str(i))
                await seen.until(lambda i=i: len(seen.texts()) == i)
        assert seen.texts() == ["1", "2", "3"]

    play(server, body)


def test_twenty_thousand_chunks_arrive_and_leave_no_consumer(server: Server) -> None:
    count = 20_000

    async def body(w: Writer) -> None:
        await w.reset(1)
        for i in range(1, count + 1):  # the worst case: a record for each chunk
            record = records.Chunks(1, i, 0.0, [records.Chunk("stdout", b"%d\n" % i)])
            if i % 1000 == 0:  # the server drops what is too far ahead of its disk
                await w.put(record)
            else:
                await w.link.nc.publish(SUBJECT, records.encode_record(record))
        await w.end(1, count)
        async with Seen(server) as seen:
            await seen.until(lambda: bool(seen.of(End)))
        assert seen.texts() == [f"{i}\n" for i in range(1, count + 1)]
        async with asyncio.timeout(DEADLINE):
            while await w.js.consumers_info(subjects.STREAM):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    play(server, body)


def test_slow_reader_loses_nothing(server: Server) -> None:
    """A reader that holds up the event loop (a full pipe) is not taken for a dead server."""

    async def body(w: Writer) -> None:
        await w.reset(1)
        big = b"x" * 100_000
        for i in range(1, 101):
            await w.put(records.Chunks(1, i, 0.0, [records.Chunk("stdout", big)]))
        await w.end(1, 100)
        seqs: list[int] = []
        blocked = 0
        async with consumer.Watcher(lambda: dial(server.config), SUBJECT) as watcher:
            async for events in watcher:
                if blocked < 2 and seqs:
                    blocked += 1
                    time.sleep(2)  # noqa: ASYNC251
                seqs += [e.seq for e in events if isinstance(e, Chunk)]
                if any(isinstance(e, End) for e in events):
                    break
        assert seqs == list(range(1, 101))

    play(server, body)


def test_missing_stream_and_missing_server_are_reported(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_reader, "START_TIMEOUT", 0.3 * SLACK)

    async def main() -> None:
        async with consumer.Watcher(lambda: dial(server.config), SUBJECT) as watcher:
            with pytest.raises(Unavailable, match="RUNCTL"):
                await anext(watcher)
        server.kill()
        with pytest.raises(Unavailable, match="runctld is not running"):
            await dial(server.config)
        os.unlink(server.path / ENDPOINT_FILE)
        with pytest.raises(Unavailable, match="no runctld has run"):
            await dial(server.config)

    asyncio.run(main())


# ---- runctl on top of it, with no daemon there ---------------------------------------


def runctl(server: Server, *args: str, code: int) -> tuple[str, str]:
    """(stdout, stderr) of a runctl that exits with ``code``."""
    config = server.path / "c.toml"
    config.write_text(f'state_dir = "{server.path}"\n')
    done = subprocess.run(
        [sys.executable, "-m", "runctl.cli.main", "-c", str(config), *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == code, (args, done)
    return done.stdout, done.stderr


def _until_timeout(server: Server, wanted: str, *args: str) -> tuple[str, str]:
    """With a time-out that is long enough to show ``wanted``, on a busy machine too."""
    for timeout in ("500ms", "5s", "30s"):
        found = runctl(server, *args, "--timeout", timeout, code=1)
        if found[0] == wanted:
            break
    return found


def test_attach_works_while_the_daemon_is_down(server: Server) -> None:
    async def body(w: Writer) -> None:
        await w.reset(1, "r1")
        await w.chunks(1, 1, "first\n", run="r1")
        await w.end(1, 1, "r1")
        await w.reset(2, "r2")
        await w.chunks(2, 1, "a\n", "b\n", "c\n", run="r2")

    play(server, body)
    out, err = runctl(server, "attach", "t", "--no-follow", code=0)
    assert out == "a\nb\nc\n"
    assert err == "── runctl: run r2 interrupted; attempt 2 starts over ──\n"
    out, _ = runctl(server, "attach", "t", "--no-follow", "--tail", "2", code=0)
    assert out == "b\nc\n"
    out, _ = runctl(server, "attach", "t", "--run", "r1", "--json", code=0)
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["reset", "chunk", "end"]
    out, err = _until_timeout(server, "a\nb\nc\n", "attach", "t")
    assert out == "a\nb\nc\n"
    assert "has not ended" in err
    out, err = _until_timeout(server, "first\na\nb\nc\n", "attach", "t", "--run", "r1", "-f")
    assert out == "first\na\nb\nc\n"
    assert err.startswith("── runctl: run r1 ──\n── runctl: run r2 ──\n")
    out, err = runctl(server, "attach", "other", code=3)
    assert (out, err.count("\n")) == ("", 1)
    out, err = runctl(server, "list", code=4)
    assert (out, err.count("\n")) == ("", 1)
    server.kill()
    out, err = runctl(server, "attach", "t", code=4)
    assert (out, err.count("\n")) == ("", 1)
    assert "runctld is not running" in err


def test_a_close_that_is_cancelled_leaves_neither_socket_nor_task(server: Server) -> None:
    async def main() -> None:
        before = _sockets()
        link = await dial(server.config)
        await link.api("INFO")  # answers have a task of their own
        assert _sockets() > before
        assert len(asyncio.all_tasks()) > 1
        closing = asyncio.create_task(link.close())
        await asyncio.sleep(0)  # it has begun
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        end = time.monotonic() + DEADLINE
        while _sockets() > before or len(asyncio.all_tasks()) > 1:
            assert time.monotonic() < end, asyncio.all_tasks()
            await asyncio.sleep(0.02)

    asyncio.run(main())


def _sockets() -> int:
    """That this process has open."""
    return sum(name.startswith("socket:") for name in open_files(os.getpid()).values())


# ---- requests ------------------------------------------------------------------------------


def test_a_daemon_that_is_about_to_answer_is_waited_for(server: Server) -> None:
    """It connects to its server, or starts."""
    (server.config.state_dir / LOCK_FILE).write_text("executor 'e', pid 1\n")

    async def main() -> None:
        links = SharedLink(server.config, Patience(server.config, 3600))
        link, daemon = await links.dial(), await dial(server.config)
        try:
            asked = asyncio.create_task(links.ask(messages.List(), messages.Threads))
            refused = asyncio.Event()
            request = link.request

            async def watched(
                subject: str, payload: bytes, timeout: float, headers: dict[str, str] | None = None
            ) -> bytes:
                try:
                    return await request(subject, payload, timeout, headers)
                except NoRespondersError:
                    refused.set()
                    raise

            link.request = watched  # type: ignore[method-assign]
            async with asyncio.timeout(DEADLINE):
                await refused.wait()

            async def answer(msg: Msg) -> None:
                await msg.respond(messages.encode(messages.Threads([])))

            await daemon.nc.subscribe(subjects.control_subject("list"), cb=answer)
            async with asyncio.timeout(DEADLINE):
                assert await asked == messages.Threads([])
        finally:
            await links.close()
            await daemon.close()

    asyncio.run(main())
