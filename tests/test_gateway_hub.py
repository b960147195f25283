"""What the gateway sends to those who watch: each valid chunk exactly once, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from nats.errors import Error as NatsError
from runctl.client import link as link_module
from runctl.client import stream_reader
from runctl.client.events import End
from runctl.client.run_state import Place
from runctl.gateway import channel as channel_module
from runctl.gateway import direct_get
from runctl.gateway.channel import Channel
from runctl.gateway.frames import read_id
from runctl.gateway.hub import Hub
from runctl.gateway.watcher import Watcher
from runctl.protocol import records, subjects
from runctl.protocol.errors import Unavailable
from runctl.protocol.model import Outcome, Status
from test_watch import DEADLINE, SUBJECT, Server, Writer, play, reach, server

__all__ = ["server"]
#: Of the ring, in records: so small that watchers fall behind it.
RING = 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MOST_RECORDS", RING)
    monkeypatch.setattr(direct_get, "BATCH", 13)


@dataclass
class Viewer:
    """A client's view of a run, by the rules of docs/http.md. Fails at whatever is not the next."""

    chunks: list[str] = field(default_factory=list)
    last: str = ""
    told: list[str] = field(default_factory=list)
    ended: bool = False
    gaps: list[tuple[int, int]] = field(default_factory=list)
    attempt: int = 0
    #: Which attempt there is by now: what is void may be gone, and nothing else.
    find_attempt: Callable[[], int] | None = None

    @property
    def place(self) -> Place:
        return read_id(self.last)[0] if self.last else Place()

    def hear(self, frames: bytes, most: int = 10**9) -> None:
        """The first ``most`` events of them: then the connection is cut."""
        for frame in frames.decode().split("\n\n")[:-1][:most]:
            lines = dict(line.split(": ", 1) for line in frame.split("\n") if line[0] != ":")
            self._hear(lines["event"], json.loads(lines["data"]))
            self.last = lines.get("id", self.last)

    def _hear(self, kind: str, value: dict[str, Any]) -> None:
        assert value["type"] == kind
        assert not self.ended
        self.told.append(kind)
        self.attempt = value.get("attempt", self.attempt)
        match kind:
            case "reset":
                self.chunks.clear()
            case "continue":
                assert value["after"] <= len(self.chunks), "what was not seen is skipped"
                del self.chunks[value["after"] :]
            case "chunk":
                assert value["seq"] == len(self.chunks) + 1, (value, len(self.chunks), self.last)
                self.chunks.append(value["data"])
            case "gap":
                assert value["from"] == len(self.chunks) + 1
                assert self.find_attempt is None or self.find_attempt() > self.attempt, value
                self.chunks += [""] * (value["to"] - len(self.chunks))
                self.gaps.append((value["from"], value["to"]))
            case "end":
                self.ended = True


class Author:
    """Writes one run's records at random, through kills of nats-server, as a daemon does."""

    def __init__(self, server: Server, chance: random.Random) -> None:
        self._server = server
        self._chance = chance
        self._writer: Writer | None = None
        self.valid: list[str] = []
        self.attempt = 0
        self.written = 0
        self.over = False
        #: (sequence, first chunk, last chunk) of the records that hold valid ones.
        self._holding: list[tuple[int, int, int]] = []
        self._base = 0
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """For the next record, or the end."""
        event = self._next
        await event.wait()

    def _tell(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def write(self, count: int, kill: Callable[[], Any]) -> None:
        await self._reset()
        for _ in range(count):
            what = self._chance.random()
            if what < 0.008:
                await self._reset()
            elif what < 0.04:
                await self._continue()
            elif what < 0.2:
                await self._noise()
            elif what < 0.21:
                await asyncio.to_thread(kill)
            else:
                await self._chunks()
            if self._chance.random() < 0.3:
                await asyncio.sleep(self._chance.random() * 0.02)
        outcome = Outcome(Status.SUCCEEDED, 0)
        await self._put(records.End("r1", self.attempt, len(self.valid), 1.0, outcome))
        self.over = True
        self._tell()

    async def close(self) -> None:
        if self._writer is not None:
            await self._writer.link.close()

    async def _reset(self) -> None:
        self.attempt += 1
        self._base = self.attempt
        await self._put(records.Reset("r1", self.attempt, float(self.attempt)))
        self.valid, self._holding = [], []

    async def _chunks(self) -> None:
        first, texts = len(self.valid) + 1, self._make_texts()
        chunks = [records.Chunk("stdout", text.encode()) for text in texts]
        sequence = await self._put(records.Chunks(self.attempt, first, 1.0, chunks))
        self.valid += texts
        self._holding.append((sequence, first, len(self.valid)))

    def _make_texts(self) -> list[str]:
        count = self._chance.randint(1, 5)
        return [
            f"{self.attempt}:{len(self.valid) + n}:{self._chance.random()}" for n in range(count)
        ]

    async def _continue(self) -> None:
        """Behind any chunk. What is void is deleted, or a crash came between."""
        valid = self._chance.randint(max(0, len(self.valid) - 30), len(self.valid))
        deletes, parts, after = self._chance.random() < 0.5, list[str](), valid
        void: list[int] = []
        for sequence, first, last in reversed(self._holding):
            if last <= valid:
                break
            if first <= valid:
                after, parts = first - 1, self.valid[first - 1 : valid]
            self._holding.pop()
            if deletes or parts:
                void.append(sequence)
        self.attempt += 1
        chunks = [records.Chunk("stdout", text.encode()) for text in parts]
        sequence = await self._put(
            records.Continue(
                *("r1", self.attempt, after, float(self.attempt)), base=self._base, chunks=chunks
            )
        )
        del self.valid[valid:]
        if parts:
            self._holding.append((sequence, after + 1, valid))
        for there in void:  # not before: without the other record it would be a gap
            await self._delete(there)

    async def _noise(self) -> None:
        record = records.Chunks(1, 1, 1.0, [records.Chunk("stdout", b"noise")])
        await self._put(record, subjects.out_subject("t", f"other{self._chance.randint(0, 3)}"))

    async def _put(self, record: records.Record, subject: str = SUBJECT) -> int:
        """The record's sequence, once it is stored, once."""
        data = records.encode_record(record)
        headers = {records.SUMMARY_HEADER: records.summary(record)}
        if isinstance(record, records.Reset):
            headers["Nats-Rollup"] = "sub"
        tried = False
        while True:
            try:
                js = (await self._reach()).js
                if tried and (found := await self._find(js, subject, data)):
                    return found
                tried = True
                done = await js.publish(subject, data, headers=headers, timeout=2)
                self.written += 1
                self._tell()
                return int(done.seq)
            except (NatsError, OSError, Unavailable):
                await asyncio.sleep(0.05)

    async def _find(self, js: Any, subject: str, data: bytes) -> int | None:
        from nats.js.errors import NotFoundError

        try:
            last = await js.get_last_msg(subjects.STREAM, subject)
        except NotFoundError:
            return None
        return int(last.seq) if last.data == data else None

    async def _delete(self, sequence: int) -> None:
        while True:
            try:
                await (await self._reach()).js.delete_msg(subjects.STREAM, sequence)
                return
            except (OSError, Unavailable):
                await asyncio.sleep(0.05)
            except NatsError as error:
                if getattr(error, "err_code", None) == 10057 or "not found" in str(error):
                    return
                await asyncio.sleep(0.05)

    async def _reach(self) -> Writer:
        if self._writer is None or self._writer.link.closed.is_set():
            self._writer = Writer(await reach(self._server))
        return self._writer


async def pause(author: Author, chance: random.Random) -> None:
    """A while, in records: many come back where the ring ends."""
    edge = RING + chance.randint(-4, 4)
    far = chance.choice([0, 0, chance.randint(0, 5), chance.randint(0, 5), edge, edge, 3 * RING])
    until = author.written + far
    while author.written < until and not author.over:
        await author.wait()


async def watch(hub: Hub, author: Author, chance: random.Random) -> Viewer:
    """One client, from its first connection to the run's end."""
    viewer = Viewer(find_attempt=lambda: author.attempt)
    await pause(author, chance)
    while not viewer.ended:
        left = chance.randint(1, 40) if chance.random() < 0.9 else 10**9
        with hub.open("t", "r1") as channel:
            watcher = Watcher(channel, viewer.place)
            channel.watchers.add(watcher)
            try:
                while left > 0 and not viewer.ended:
                    watcher.clear()
                    if data := watcher.take():
                        viewer.hear(data, left)
                        left -= data.count(b"\n\n")
                        if chance.random() < 0.05:
                            await pause(author, chance)  # it is slow
                    elif watcher.stored:
                        await watcher.fetch()
                    else:
                        await watcher.wait()
            finally:
                channel.watchers.discard(watcher)
        await pause(author, chance)
    return viewer


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_each_valid_chunk_is_sent_exactly_once(
    server: Server, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "API_TIMEOUT", 10.0)
    monkeypatch.setattr(stream_reader, "MISSED", 20)
    chance = random.Random(seed)

    async def body(_: Writer) -> None:
        hub, author = Hub(server.config), Author(server, chance)

        def kill() -> None:
            server.kill()
            server.start()

        try:
            async with asyncio.TaskGroup() as group:
                viewers = [
                    group.create_task(watch(hub, author, random.Random(seed * 1000 + n)))
                    for n in range(12)
                ]
                await author.write(400, kill)
            for viewer in (task.result() for task in viewers):
                assert viewer.chunks == author.valid
        finally:
            await author.close()
            await hub.close()

    play(server, body)


async def read_all(channel: Channel, viewer: Viewer, until: Callable[[], bool]) -> None:
    watcher = Watcher(channel, viewer.place)
    channel.watchers.add(watcher)
    try:
        async with asyncio.timeout(DEADLINE):
            while not until():
                watcher.clear()
                if data := watcher.take():
                    viewer.hear(data)
                elif watcher.stored:
                    await watcher.fetch()
                elif data := watcher.take_lost_end():
                    viewer.hear(data)
                elif not until():
                    await watcher.wait()
    finally:
        channel.watchers.discard(watcher)


def test_watchers_share_what_is_read_and_framed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred who come at once cause as many reads, and frames, as one."""
    reads: list[int] = []
    framed: list[int] = []
    real_get, real_frame = direct_get.get_behind, channel_module.Entry._make_frame

    async def get(link: Any, subject: str, sequence: int) -> Any:
        reads.append(sequence)
        return await real_get(link, subject, sequence)

    def frame(entry: Any, place: Place) -> Any:
        framed.append(entry.sequence)
        return real_frame(entry, place)

    monkeypatch.setattr(channel_module, "get_behind", get)
    monkeypatch.setattr(channel_module.Entry, "_make_frame", frame)

    async def body(w: Writer) -> None:
        await w.reset(1)
        for n in range(99):
            await w.chunks(1, n + 1, f"{n}\n")
        hub = Hub(server.config)
        viewers = [Viewer() for _ in range(100)]
        try:
            with hub.open("t", "r1") as channel:
                await asyncio.gather(
                    *(read_all(channel, v, lambda v=v: len(v.chunks) == 99) for v in viewers)
                )
                assert len(reads) == len(set(reads)) <= 100 / 13 + 2
                assert len(framed) == 100
                watching = [
                    asyncio.create_task(read_all(channel, v, lambda v=v: v.ended)) for v in viewers
                ]
                await w.chunks(1, 100, "live\n")
                await w.end(1, 100)
                await asyncio.gather(*watching)
                assert len(framed) == 202
        finally:
            await hub.close()
        assert {len(v.chunks) for v in viewers} == {100}

    play(server, body)


def test_a_client_comes_back_in_what_is_void_by_now(server: Server) -> None:
    async def body(w: Writer) -> None:
        hub = Hub(server.config)
        await w.reset(1)
        await w.chunks(1, 1, *"abcde")
        viewers = [Viewer(), Viewer(), Viewer()]
        try:
            with hub.open("t", "r1") as channel:
                await read_all(channel, viewers[0], lambda: len(viewers[0].chunks) == 5)
                viewers[1].last, viewers[1].chunks = "1.2", ["a", "b"]
                await w.put(records.Continue("r1", 2, 3, 2.0))
                await w.chunks(2, 4, "D", "E", "F")
                await w.end(2, 6)
                for viewer in viewers:
                    await read_all(channel, viewer, lambda v=viewer: v.ended)
        finally:
            await hub.close()
        assert {"".join(v.chunks) for v in viewers} == {"abcDEF"}
        assert viewers[0].told[-5:] == ["continue", "chunk", "chunk", "chunk", "end"]
        assert "reset" not in viewers[1].told

    play(server, body)


def test_the_stream_is_lost_and_made_again(server: Server) -> None:
    """Chunk numbers say what was seen: what is written again comes once."""

    async def body(w: Writer) -> None:
        hub, viewer, early = Hub(server.config), Viewer(), Viewer()
        await w.reset(1)
        await w.chunks(1, 1, "a", "b")
        try:
            with hub.open("t", "r1") as channel:
                watching = asyncio.create_task(read_all(channel, viewer, lambda: viewer.ended))
                await read_all(channel, early, lambda: len(early.chunks) == 2)
                await w.chunks(1, 3, "c")  # by the consumer
                await read_all(channel, early, lambda: len(early.chunks) == 3)
                await w.js.delete_stream(subjects.STREAM)
                await w.open()
                await w.put(records.Reset("r1", 1, 0.0))
                await w.chunks(1, 1, "a", "b", "c", "d")
                await w.end(1, 4)
                await watching
        finally:
            await hub.close()
        assert viewer.chunks == ["a", "b", "c", "d"]
        assert viewer.told.count("chunk") == 4

    play(server, body)


def test_what_is_gone_is_a_gap(server: Server) -> None:
    async def body(w: Writer) -> None:
        hub, viewer = Hub(server.config), Viewer()
        await w.reset(1)
        await w.chunks(1, 1, "a", "b")
        await w.chunks(1, 3, "c")
        await w.end(1, 3)
        await w.js.delete_msg(subjects.STREAM, 2)
        try:
            with hub.open("t", "r1") as channel:
                await read_all(channel, viewer, lambda: viewer.ended)
        finally:
            await hub.close()
        assert viewer.gaps == [(1, 2)]
        assert viewer.chunks == ["", "", "c"]

    play(server, body)


def test_nothing_is_skipped_for_a_replica_that_lags_behind(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct get that finds nothing proves nothing: the leader is asked."""
    real, answers = direct_get.get_behind, 0

    async def get(link: Any, subject: str, sequence: int) -> Any:
        nonlocal answers
        answers += 1
        return [] if answers <= 3 else await real(link, subject, sequence)

    monkeypatch.setattr(channel_module, "get_behind", get)

    async def body(w: Writer) -> None:
        hub, viewer = Hub(server.config), Viewer()
        await w.reset(1)
        await w.chunks(1, 1, "a")
        try:
            with hub.open("t", "r1") as channel:
                await read_all(channel, viewer, lambda: len(viewer.chunks) == 1)
        finally:
            await hub.close()
        assert answers > 3

    play(server, body)


def test_a_silent_watcher_gets_a_beat(server: Server) -> None:
    async def body(w: Writer) -> None:
        hub = Hub(server.config)
        await w.reset(1)
        try:
            with hub.open("t", "r1") as channel:
                watcher = Watcher(channel, Place())
                watcher.beat()
                assert not watcher.take_beat()
                watcher.beat()
                assert watcher.take_beat()
                assert not watcher.take_beat()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(watcher.wait(), DEADLINE)
        finally:
            await hub.close()

    play(server, body)


def test_what_stands_for_a_lost_end_is_sent_behind_all_else(server: Server) -> None:
    async def body(w: Writer) -> None:
        hub, viewer = Hub(server.config), Viewer()
        await w.reset(1)
        try:
            with hub.open("t", "r1") as channel:
                await asyncio.wait_for(channel.opened.wait(), DEADLINE)
                watcher = Watcher(channel, Place())
                channel.watchers.add(watcher)
                await watcher.fetch()
                viewer.hear(watcher.take())
                assert not watcher.take_lost_end()
                await w.chunks(1, 1, "one\n")
                await asyncio.wait_for(watcher.wait(), DEADLINE)
                viewer.hear(watcher.take())
                channel.over.last = channel.high
                channel.over.end = End("r1", 1, "succeeded", 0, None, lost=True)
                viewer.hear(watcher.take_lost_end())
                assert viewer.chunks == ["one\n"]
                assert viewer.ended
        finally:
            await hub.close()

    play(server, body)


def test_ids(tmp_path: Path) -> None:
    assert read_id("3.17") == (Place(3, 18), False)
    assert read_id("3.end")[1]


def test_what_was_purged_is_shown_to_nobody_else(server: Server) -> None:
    """Though the ring still has it."""

    async def body(w: Writer) -> None:
        hub, early = Hub(server.config), Viewer()
        await w.reset(1)
        try:
            with hub.open("t", "r1") as channel:
                await read_all(channel, early, lambda: early.told == ["reset"])
                await w.chunks(1, 1, "secret")
                await read_all(channel, early, lambda: len(early.chunks) == 1)
                await w.js.purge_stream(subjects.STREAM, subject=SUBJECT)
                late = Watcher(channel, Place())
                assert late.stored
                while late.stored:
                    await late.fetch()
                assert late.take() == b""
                await w.end(1, 1)
                await read_all(channel, early, lambda: early.ended)
                assert early.chunks == ["secret"]
                assert b'"gap"' in late.take()
        finally:
            await hub.close()

    play(server, body)
