"""Attempts that go on from a checkpoint: what of a run's output stays valid, for whom."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio_asyncio
from natsserver import Node
from runctl.cli.display.replay_filter import ReplayFilter, Restart
from runctl.cli.display.tail import Tail
from runctl.client.events import Chunk, Continue, End, Event, Gap, Reset
from runctl.client.run_state import RunState
from runctl.config.schema import Config, Nats
from runctl.protocol import records, subjects
from runctl.protocol.errors import Fenced, Unavailable
from runctl.protocol.model import Outcome, Status
from runctl.supervisor.messaging.connection import connect
from runctl.supervisor.output.backpressure import Backpressure
from runctl.supervisor.output.continuation import Place, find_valid
from runctl.supervisor.output.inventory import Last, Stored
from runctl.supervisor.output.publisher import Streams
from runctl.supervisor.output.writer import Writer
from streams import THREAD, data_of, until, watching, write

DONE = Outcome(Status.SUCCEEDED)


def valid_of(events: list[Event]) -> bytes:
    """What a watcher takes for the reply, by what it was told."""
    chunks: list[Chunk] = []
    for event in list(events):
        if isinstance(event, Reset):
            chunks = []
        elif isinstance(event, Continue):
            void = [x for x in chunks if x.seq > event.after]
            assert len(void) == event.void
            chunks = chunks[: len(chunks) - len(void)]
        elif isinstance(event, Chunk):
            assert event.seq == len(chunks) + 1
            chunks.append(event)
        assert not isinstance(event, Gap)
    return b"".join(x.data for x in chunks)


def has_ended(events: list[Event]) -> bool:
    return any(isinstance(e, End) for e in events)


@asynccontextmanager
async def streams_of(url: str) -> AsyncIterator[Streams]:
    config = Config(state_dir=Path(), nats=Nats(url))
    async with trio_asyncio.open_loop(), connect(config, "e", None) as connection:
        streams = Streams(connection.client, Backpressure())
        await streams.open(config)
        yield streams


async def store_checkpoint(attempt: Writer, data: bytes) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt.pump)
        await attempt.checkpoint(data)
        attempt.close()
    attempt._closed = trio.Event()


async def go_on(streams: Streams, writer: Writer) -> Outcome | Place | None:
    find = partial(streams.find_place, _subject(writer.run), "checkpoint")
    return await writer.go_on(find, await find())


async def test_without_a_checkpoint_nothing_goes_on(nats_server: str) -> None:
    async with streams_of(nats_server) as streams:
        first = Writer(streams, THREAD, "none", 1, "e")
        assert await streams.find_place(_subject("none-at-all"), "checkpoint") is None
        await first.open()
        await write(first, b"1")
        assert await streams.find_place(_subject("none"), "checkpoint") is None


async def test_what_is_behind_the_checkpoint_is_void_and_deleted(nats_server: str) -> None:
    run = "void"
    async with (
        streams_of(nats_server) as streams,
        watching(nats_server, run) as early,
    ):
        first = Writer(streams, THREAD, run, 1, "e")
        await first.open()
        await write(first, b"1")
        await store_checkpoint(first, b"one")
        await write(first, b"2")
        await store_checkpoint(first, b"two")
        await write(first, b"x", b"y")
        await until(lambda: data_of(early) == b"12xy")
        second = Writer(streams, THREAD, run, 2, "f", True)
        place = await go_on(streams, second)
        assert isinstance(place, Place)
        assert (place.after, place.checkpoint, place.total) == (2, b"two", 2)
        with pytest.RaisesGroup(Fenced):  # the dead one is not quite dead
            await write(first, b"z")
        await write(second, b"3")
        await second.end(DONE)
        await until(lambda: has_ended(early))
        assert Continue(run, 2, 2, 2, "f", True) in early
        async with watching(nats_server, run) as late:
            await until(lambda: has_ended(late))
        assert [type(x) for x in late if isinstance(x, Continue)] == [Continue]
        assert valid_of(early) == valid_of(late) == data_of(late) == b"123"


async def test_an_end_that_is_stored_is_taken_over(nats_server: str) -> None:
    async with streams_of(nats_server) as streams:
        first = Writer(streams, THREAD, "over", 1, "e")
        await first.open()
        await store_checkpoint(first, b"one")
        await first.end(DONE)
        assert await go_on(streams, Writer(streams, THREAD, "over", 2, "e")) == DONE


async def test_an_older_attempt_is_fenced(nats_server: str) -> None:
    async with streams_of(nats_server) as streams:
        first = Writer(streams, THREAD, "older", 1, "e")
        await first.open()
        await store_checkpoint(first, b"one")
        assert await go_on(streams, Writer(streams, THREAD, "older", 3, "e")) is not None
        with pytest.raises(Fenced):
            await go_on(streams, Writer(streams, THREAD, "older", 2, "e"))


async def test_messages_that_may_not_be_deleted_stay_and_count_for_nothing(
    nats_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise Unavailable("no")

    monkeypatch.setattr(Stored, "remove", refuse)
    run = "stay"
    async with streams_of(nats_server) as streams:
        for attempt, kept, void in ((1, b"1", b"xx"), (2, b"2", b"yyy"), (3, b"3", b"")):
            writer = Writer(streams, THREAD, run, attempt, "e")
            if attempt == 1:
                await writer.open()
            else:
                place = await go_on(streams, writer)
                assert isinstance(place, Place)
                assert place.after == attempt - 1
            await write(writer, kept)
            await store_checkpoint(writer, kept)
            await write(writer, *(bytes([x]) for x in void))
        await writer.end(DONE)
        async with watching(nats_server, run) as late:
            await until(lambda: has_ended(late))
        assert valid_of(late) == b"123"
        assert data_of(late) == b"1xx2yyy3"


async def test_what_a_crash_has_left_is_deleted_by_the_next_attempt(
    nats_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in front of a ``continue`` and of a later checkpoint."""

    async def die(*_: object) -> None:
        raise Unavailable("as if it had died just then")

    run = "left"
    async with streams_of(nats_server) as streams:
        for attempt, kept, void in ((1, b"1", b"xx"), (2, b"2", b"y"), (3, b"3", b"")):
            writer = Writer(streams, THREAD, run, attempt, "e")
            with monkeypatch.context() as patch:
                if attempt == 1:
                    await writer.open()
                else:
                    if attempt == 2:
                        patch.setattr(Stored, "remove", die)
                    assert isinstance(await go_on(streams, writer), Place)
            await write(writer, kept)
            await store_checkpoint(writer, kept)
            await write(writer, *(bytes([x]) for x in void))
        await writer.end(DONE)
        async with watching(nats_server, run) as late:
            await until(lambda: has_ended(late))
        assert data_of(late) == b"123"


@pytest.mark.parametrize("seed", range(6))
async def test_every_watcher_has_what_the_writer_has(nats_server: str, seed: int) -> None:
    """Kills, resets, continues, and watchers that come at any time."""
    rng, run = random.Random(seed), f"random-{seed}"
    text = saved = b""
    attempt, number, stored = 1, 0, False
    async with AsyncExitStack() as stack:
        streams = await stack.enter_async_context(streams_of(nats_server))
        watchers = [await stack.enter_async_context(watching(nats_server, run))]
        writer = Writer(streams, THREAD, run, attempt, "e")
        await writer.open()
        for _ in range(60):
            deed = rng.choice(["write"] * 5 + ["checkpoint"] * 2 + ["die"] * 2 + ["watch"])
            if deed == "write":
                number += 1
                pieces = [b"%d.%d " % (number, n) for n in range(rng.randrange(1, 4))]
                await write(writer, *pieces)
                text += b"".join(pieces)
            elif deed == "checkpoint":
                await store_checkpoint(writer, text)
                saved, stored = text, True
            elif deed == "watch" and len(watchers) < 6:
                watchers.append(await stack.enter_async_context(watching(nats_server, run)))
            elif deed == "die":
                if rng.random() < 0.5:  # or they see some of what is void, or all of it
                    await until(lambda text=text: all(valid_of(x) == text for x in watchers))
                attempt += 1
                writer = Writer(streams, THREAD, run, attempt, "e")
                if rng.random() < 0.2:
                    await writer.open()
                    text, stored = b"", False
                else:
                    place = await go_on(streams, writer)
                    assert (place is not None) == stored
                    if place is None:
                        await writer.open()
                        text = b""
                    else:
                        assert isinstance(place, Place)
                        assert (place.checkpoint, place.total) == (saved, len(saved))
                        text = saved
        await writer.end(DONE)
        late = await stack.enter_async_context(watching(nats_server, run))
        for events in [*watchers, late]:
            await until(lambda events=events: has_ended(events))
            assert valid_of(events) == text
        assert data_of(late) == text


async def test_what_nats_lost_of_a_continued_attempt_is_written_again(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.start()
    try:
        async with streams_of(node.url) as streams, watching(node.url, "lost") as early:
            first = Writer(streams, THREAD, "lost", 1, "e")
            await first.open()
            await write(first, b"1")
            await store_checkpoint(first, b"one")
            await write(first, b"x")
            second = Writer(streams, THREAD, "lost", 2, "e")
            assert await go_on(streams, second) is not None
            await write(second, b"2")
            await until(lambda: valid_of(early) == b"12")
            await Stored(streams._nc).drop([(subjects.out_subject(THREAD, "lost"), 10**18)])
            await write(second, b"3")
            await second.end(DONE)
            await until(lambda: has_ended(early))
            assert valid_of(early) == b"123"
    finally:
        node.close()


# ---- which records are valid ---------------------------------------------------------------


def _lasts(*summaries: str) -> list[Last]:
    return [Last("s", n, 0.0, 0, records.read_summary(text)) for n, text in enumerate(summaries, 1)]


@pytest.mark.parametrize(
    ("stored", "valid"),
    [
        (["reset 1", "chunk 1 1 1", "chunk 1 2 2"], [1, 2, 3]),
        (["reset 1", "chunk 1 1 1", "reset 2", "chunk 2 1 1"], [3, 4]),
        (
            ["reset 1", "chunk 1 1 1", "chunk 1 2 2", "continue 2 1 1 1", "chunk 2 2 2"],
            [1, 2, 4, 5],
        ),
        (
            ["reset 1", "chunk 1 5 1", "continue 2 5 1 1", "chunk 2 9 1", "continue 3 5 1 1"],
            [1, 2, 3, 5],
        ),
        (["chunk 1 5 1", "continue 2 9 1 1", "chunk 2 12 1", "continue 3 4 1 1"], [4]),
    ],
)
def test_which_records_are_valid(stored: list[str], valid: list[int]) -> None:
    assert [x.sequence for x in find_valid(_lasts(*stored))] == valid


# ---- a watcher's state -----------------------------------------------------------------------


def _apply(*given: records.Record) -> list[Event]:
    state, out = RunState("r"), list[Event]()
    for record in given:
        state.apply(record, out)
    return out


def _chunks(attempt: int, seq: int, *data: bytes) -> records.Chunks:
    return records.Chunks(attempt, seq, 1.0, [records.Chunk("stdout", x) for x in data])


def test_whoever_has_seen_less_is_told_of_the_gap_before() -> None:
    told = _apply(
        records.Reset("r", 1, 1.0),
        _chunks(1, 1, b"a"),
        records.Continue("r", 2, 3, 2.0),
        _chunks(2, 4, b"d"),
    )
    assert [type(x) for x in told] == [Reset, Chunk, Gap, Continue, Chunk]
    assert told[2] == Gap("r", 2, 3)


def test_what_continues_an_attempt_that_was_never_seen_starts_over() -> None:
    told = _apply(
        records.Reset("r", 1, 1.0),
        _chunks(1, 1, b"a", b"b"),
        records.Continue("r", 3, 1, 3.0, base=2),
        _chunks(3, 2, b"c"),
    )
    assert [type(x) for x in told] == [Reset, Chunk, Chunk, Reset, Gap, Chunk]


def test_a_continue_that_was_seen_already_is_left_out() -> None:
    again = records.Continue("r", 2, 1, 2.0)
    told = _apply(
        records.Reset("r", 1, 1.0), _chunks(1, 1, b"a"), again, _chunks(2, 2, b"b"), again,
        _chunks(2, 2, b"b", b"c"),
    )  # fmt: skip
    assert [x.data for x in told if isinstance(x, Chunk)] == [b"a", b"b", b"c"]
    assert len([x for x in told if isinstance(x, Continue)]) == 1


# ---- at a terminal ---------------------------------------------------------------------------


class Model:
    """A run whose attempts write ``script``, or something else now and then."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.seq, self.attempt = rng, 0, 1
        self.chunks: list[Chunk] = []
        self.saved = 0

    def write(self) -> Chunk:
        self.seq += 1
        odd = self.rng.random() < 0.1
        data = b"%d;" % (self.rng.randrange(100) if odd else self.seq)
        stream: records.StreamName = self.rng.choice(("stdout", "stdout", "stderr"))
        chunk = Chunk("r", self.attempt, self.seq, stream, data)
        self.chunks.append(chunk)
        return chunk

    def die(self) -> Reset | Continue:
        self.attempt += 1
        if self.rng.random() < 0.3:
            self.chunks, self.seq, self.saved = [], 0, 0
            return Reset("r", self.attempt)
        void = self.seq - self.saved
        del self.chunks[self.saved :]
        self.seq = self.saved
        return Continue("r", self.attempt, self.saved, void)

    def text(self, after: int | None = None) -> dict[str, bytes]:
        found = {"stdout": b"", "stderr": b""}
        for chunk in self.chunks:
            if after is None or chunk.seq <= after:
                found[chunk.stream] += chunk.data
        return found


@pytest.mark.parametrize("seed", range(300))
def test_a_screen_holds_the_reply_once(seed: int) -> None:
    model, hold = Model(random.Random(seed)), ReplayFilter()
    screen: dict[str, bytes] = {"stdout": b"", "stderr": b""}

    def show(event: Reset | Continue | Chunk | End) -> None:
        for shown in hold.take(event):
            if isinstance(shown, Restart | Reset):
                after = shown.after if isinstance(shown, Restart) else 0
                valid = model.text(after)
                assert all(screen[x].startswith(valid[x]) for x in valid)
                screen.update(valid)
            elif isinstance(shown, Chunk):
                screen[shown.stream] += shown.data

    show(Reset("r", 1))
    for _ in range(model.rng.randrange(5, 60)):
        deed = model.rng.random()
        if deed < 0.75:
            show(model.write())
        elif deed < 0.85:
            model.saved = model.seq
        else:
            show(model.die())
    show(End("r", model.attempt, "succeeded", 0, None))
    assert screen == model.text()


def test_a_tail_forgets_what_is_void() -> None:
    tail = Tail(2, lines=False)
    for seq in range(1, 6):
        tail.add(Chunk("r", 1, seq, "stdout", b"%d" % seq))
    tail.void("r", 3)
    tail.add(Chunk("r", 2, 4, "stdout", b"4"))
    left_out, kept = tail.take()
    assert [x.data for x in [*left_out, *kept]] == [b"1", b"2", b"3", b"4"]


async def test_a_message_that_is_gone_need_not_be_deleted(nats_server: str) -> None:
    async with streams_of(nats_server) as streams:
        first = Writer(streams, THREAD, "gone", 1, "e")
        await first.open()
        await write(first, b"1")
        stored, last = Stored(streams._nc), (await streams.tail(_subject("gone"))).sequence
        await stored.remove([last])
        await stored.remove([last, last + 10**6])
        assert await stored.read([last]) == [None]
        assert isinstance((await stored.read([last - 1]))[0], records.Reset)


def _subject(run: str) -> str:
    return subjects.out_subject(THREAD, run)
