"""The writer of a run's stream, on a real NATS: what it makes of the tails that it reads,
and that whoever watches is told the end whatever breaks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio_asyncio
from conftest import DEADLINE, Box, Watch, wait_until
from nats.aio.client import Client
from natsserver import Node
from runctl.client import consumer
from runctl.client.events import Chunk, End, Event, Gap, Reset
from runctl.client.link import Link, NotReady, dial
from runctl.client.requests import ask
from runctl.config.load import load
from runctl.config.schema import Config, Nats
from runctl.protocol import messages, records, subjects
from runctl.protocol.errors import Fenced, NotFound, Refused, StreamUnfit
from runctl.protocol.model import Outcome, Run, RunSpec, Status
from runctl.supervisor.execution.aborted_ends import Endings
from runctl.supervisor.execution.registry import Registry
from runctl.supervisor.host.metrics import Prometheus
from runctl.supervisor.messaging.connection import connect
from runctl.supervisor.output import publisher
from runctl.supervisor.output.backpressure import Backpressure
from runctl.supervisor.output.inventory import Stored
from runctl.supervisor.output.publisher import Streams, Tail
from runctl.supervisor.output.writer import Writer
from streams import THREAD, data_of, ended, until, watching, write

TRIES, MOST_TRIES = 80, 400


class Lossy(Streams):
    """Loses the next publishes on their way, and answers reads with tails of before: what
    a NATS leader that has lost its quorum does. Hears no ack of the publishes whose turn, counted
    from 1, is in ``deaf``: it is as if the stream did not serve then, and nobody could help."""

    lose = 0
    deaf: frozenset[int] = frozenset()
    turns = 0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.client: Client = given[0]
        self.stale: list[Tail] = []

    async def publish(
        self, subject: str, record: records.Record, expected: int, *, rollup: bool = False
    ) -> int | None:
        if self.lose:
            self.lose -= 1
            return None
        done = await super().publish(subject, record, expected, rollup=rollup)
        self.turns += 1
        if self.turns in self.deaf:
            raise StreamUnfit("on purpose")
        return done

    async def tail_now(self, subject: str) -> Tail:
        return self.stale.pop(0) if self.stale else await super().tail_now(subject)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where publishes are counted: none is sent twice because a busy machine answers late."""
    monkeypatch.setattr(publisher, "ACK_TIMEOUT", DEADLINE)


@asynccontextmanager
async def _streams(url: str) -> AsyncIterator[Lossy]:
    config = Config(state_dir=Path(), nats=Nats(url))
    async with trio_asyncio.open_loop(), connect(config, "e", None) as connection:
        streams = Lossy(connection.client, Backpressure())
        await streams.open(config)
        yield streams


async def _purge(streams: Lossy, subject: str) -> None:
    await Stored(streams.client).drop([(subject, (await streams.tail(subject)).sequence)])


@pytest.mark.parametrize("before", ["nothing", "an older attempt", "fewer records"])
async def test_a_stale_tail_fences_nobody(nats_server: str, before: str) -> None:
    run = f"stale-{before.replace(' ', '-')}"
    subject = subjects.out_subject(THREAD, run)
    async with _streams(nats_server) as streams:
        old = [Tail(0, None)]
        first = Writer(streams, THREAD, run, 1, "e")
        await first.open()
        old.append(await streams.tail(subject))
        second = Writer(streams, THREAD, run, 2, "e")
        await second.open()
        old.append(await streams.tail(subject))
        await write(second, b"one")
        streams.lose = 3
        streams.stale = [old[("nothing", "an older attempt", "fewer records").index(before)]] * 2
        await write(second, b"two")
        await second.end(Outcome(Status.SUCCEEDED))
        assert streams.stale == []
        last = (await streams.tail(subject)).record
        assert isinstance(last, records.End)
        assert last.chunks == 2
        with pytest.raises(ExceptionGroup) as group:
            await write(first, b"late")
        assert group.group_contains(Fenced)


async def test_a_purged_stream_goes_on(nats_server: str) -> None:
    subject = subjects.out_subject(THREAD, "purged")
    async with _streams(nats_server) as streams:
        attempt = Writer(streams, THREAD, "purged", 1, "e")
        await attempt.open()
        await write(attempt, b"one")
        await _purge(streams, subject)
        await write(attempt, b"two")
        last = (await streams.tail(subject)).record
        assert isinstance(last, records.Chunks)
        assert last.seq == 2


async def test_an_end_is_not_put_over_a_newer_attempt(nats_server: str) -> None:
    async with _streams(nats_server) as streams:
        newer = Writer(streams, THREAD, "newer", 2, "e")
        await newer.open()
        await streams.end(THREAD, "newer", 1, Outcome(Status.FAILED))
        tail = await streams.tail(subjects.out_subject(THREAD, "newer"))
        assert isinstance(tail.record, records.Reset)
        await streams.end(THREAD, "newer", 2, Outcome(Status.FAILED))
        tail = await streams.tail(subjects.out_subject(THREAD, "newer"))
        assert isinstance(tail.record, records.End)


async def test_the_end_of_an_attempt_that_never_began_leaves_the_output(nats_server: str) -> None:
    """Claimed anew after a crash, and aborted before its output was reset."""
    async with _streams(nats_server) as streams:
        attempt = Writer(streams, THREAD, "kept", 1, "e")
        await attempt.open()
        await write(attempt, b"one", b"two")
        subject = subjects.out_subject(THREAD, "kept")
        begun = (await streams.tail(subject)).record
        assert begun is not None
        await streams.end(THREAD, "kept", 2, Outcome(Status.ABORTED))
        end = (await streams.tail(subject)).record
    assert end is not None
    state, events = consumer.RunState("kept"), list[Event]()
    for record in (records.Reset("kept", 1, 0.0, "e"), begun, end):
        state.apply(record, events)
    assert [(type(event), getattr(event, "attempt", 1)) for event in events] == [
        (Reset, 1),
        (Chunk, 1),
        (Chunk, 1),
        (End, 1),
    ]


async def test_ends_are_not_mended_for_runs_that_live(nats_server: str) -> None:
    """Aborted between the start and the look for aborts that a crash cut: its processes are
    still being ended, and it writes its end itself. So does one whose output is not stored yet."""

    class Attempts:
        async def list_without_end(self, since: float) -> list[Run]:
            runs = "cut", "live", "owed"
            return [Run(run, THREAD, Status.ABORTED, 1, "r", "e", "") for run in runs]

        async def note_ends(self, runs: dict[str, int | None]) -> None:
            pass

    class Durable:
        attempts = Attempts()

    async with _streams(nats_server) as streams:
        registry, durable = Registry(), cast("Any", Durable())
        spec, settings = RunSpec("live", THREAD, "r"), cast("Any", SimpleNamespace(runners={}))
        news = streams.life.next_change
        streams.defer_end(Writer(streams, THREAD, "owed", 1, "e"), Outcome(Status.ABORTED))
        assert news.is_set(), "the stream may take it by now"
        with registry.start(spec, 1):
            await Endings(streams, durable, registry, settings).mend(60.0)
        for run in ("live", "owed"):
            assert (await streams.tail(subjects.out_subject(THREAD, run))).record is None
        ended = (await streams.tail(subjects.out_subject(THREAD, "cut"))).record
        assert isinstance(ended, records.End)


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("another", [False, True])
async def test_what_was_stored_without_an_ack_is_known_when_it_is_tried_again(
    nats_server: str, another: bool
) -> None:
    """The stream did not serve just then. ``another``: it was lost, too, as far as one knows."""
    run = f"unheard-{another}"
    subject = subjects.out_subject(THREAD, run)
    outcome = Outcome(Status.SUCCEEDED)
    async with _streams(nats_server) as streams:
        attempt = Writer(streams, THREAD, run, 1, "e")
        await attempt.open()
        streams.deaf = frozenset({2, 3 if another else 4})
        await write(attempt, b"one")
        streams.life.number += another
        with pytest.raises(StreamUnfit):
            await attempt.finish(outcome)
        streams.life.number += another
        paid: list[str] = []
        streams.defer_end(attempt, outcome)
        assert streams.has_deferred_end(run)
        await streams.store_deferred_ends(lambda run, _: paid.append(run))
        assert paid == [run]
        assert not streams.has_deferred_end(run)
        last = (await streams.tail(subject)).record
        assert isinstance(last, records.End)
        assert last.chunks == 1
        assert streams.turns == (3 if another else 5), "each end was sent once, or refused"
        assert (await Stored(streams.client).counts(subject)).records == {subject: 3}


@pytest.mark.parametrize("ended", [False, True])
async def test_nothing_is_written_behind_the_end_of_somebody_else(
    nats_server: str, ended: bool
) -> None:
    """The stream was made again, and who took the run for a dead one has written its end there,
    with the same attempt. A live attempt stops; one that has stored that end itself is over."""
    run = f"foreign-{ended}"
    subject = subjects.out_subject(THREAD, run)
    async with _streams(nats_server) as streams:
        attempt = Writer(streams, THREAD, run, 1, "e")
        await attempt.open()
        await write(attempt, b"one")
        await _purge(streams, subject)
        await streams.end(THREAD, run, 1, Outcome(Status.ABORTED))
        streams.life.number += 1
        with pytest.raises(BaseException) as caught:
            await (attempt.end(Outcome(Status.SUCCEEDED)) if ended else write(attempt, b"two"))
        assert caught.group_contains(Fenced) if not ended else caught.type is Fenced
        last = (await streams.tail(subject)).record
        assert isinstance(last, records.End)
        assert last.outcome.status is Status.ABORTED


def test_a_run_that_begins_while_its_row_turns_aborted_ends_as_aborted() -> None:
    registry, spec = Registry(), RunSpec("r", THREAD, "shell")
    with registry.dooming("r"), registry.start(spec, 1) as live:
        assert live.decide(Outcome(Status.SUCCEEDED)).status is Status.ABORTED
    with registry.start(spec, 1) as live:
        assert live.decide(Outcome(Status.SUCCEEDED)).status is Status.SUCCEEDED


BROKEN = """
import sys
from runctl.supervisor.execution import thread_order
from runctl.supervisor.lifecycle import arguments

async def clear(self, live):
    if live.spec.thread == "broken":
        raise LookupError("on purpose")
    return True

thread_order.Order.clear = clear
arguments.runctld(sys.argv[4:])
"""


@pytest.mark.usefixtures("unhurried")
async def test_resets_output_fences_and_adopted_ends_are_counted(nats_server: str) -> None:
    meters = Prometheus("e", lambda: ["shell"])

    def value(name: str) -> float:
        lines = meters.render({}, {}).decode().splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith(f"runctl_{name}_total "))

    async with _streams(nats_server) as streams:
        streams.meters = meters
        first = Writer(streams, THREAD, "counted", 1, "e")
        second = Writer(streams, THREAD, "counted", 2, "e")
        await first.open()
        await write(first, b"one", b"more")
        await second.open()
        with pytest.raises(Fenced):
            await first.end(Outcome(Status.FAILED))
        with pytest.raises(Fenced):
            await Writer(streams, THREAD, "counted", 1, "e").open()
        await second.end(Outcome(Status.SUCCEEDED))
        assert await Writer(streams, THREAD, "counted", 3, "e").open() is not None
    assert value("resets") == 2
    assert value("fenced_writes") == 2
    assert value("adopted_ends") == 1
    assert (value("output_chunks"), value("output_bytes")) == (2, 7)


def test_a_fault_of_the_daemon_ends_the_run_for_all_who_watch(stopped_box: Box) -> None:
    box = stopped_box
    box.prefix = [sys.executable, "-c", BROKEN]
    box.start()
    run = box.submit("broken", "true")
    consumer = Watch(box, "broken")
    assert consumer.wait() == 1
    (final,) = consumer.final()
    assert final["status"] == "failed"
    error = "internal error: LookupError: on purpose"
    assert final["error"] == error
    wait_until(lambda: box.show(run)["status"] == "failed", "the row's end")
    assert box.show(run)["error"] == error
    whole = box.submit("whole", "true")
    box.runctl("wait", whole)


async def test_what_nats_has_acknowledged_and_lost_is_written_again(tmp_path: Path) -> None:
    """A server that comes back with an earlier state of its store, as after a power cut; a
    watcher that saw what was lost sees nothing twice and nothing less."""
    folder = tmp_path / "nats"
    folder.mkdir()
    node = Node(folder)
    node.start()
    config = Config(state_dir=tmp_path, nats=Nats(node.url))
    try:
        async with trio_asyncio.open_loop(), connect(config, "e", None) as connection:
            streams = Streams(connection.client, Backpressure())
            await streams.open(config)
            one, other = (Writer(streams, THREAD, run, 1, "e") for run in ("lost", "other"))
            await one.open()
            await write(one, b"1")
            async with watching(node.url, "lost") as events:
                await until(lambda: data_of(events) == b"1")
                node.kill()
                shutil.copytree(folder / "js", folder / "before")
                node.start()
                await write(one, b"2")
                await other.open()
                await write(one, b"3")
                await until(lambda: data_of(events) == b"123")
                node.kill()
                shutil.rmtree(folder / "js")
                shutil.copytree(folder / "before", folder / "js")
                node.start()
                await write(one, b"4")
                await write(other, b"a", b"b", b"c")
                await one.end(Outcome(Status.SUCCEEDED))
                await other.end(Outcome(Status.SUCCEEDED))
                await until(lambda: ended(events))
                assert data_of(events) == b"1234"
                assert not [e for e in events if isinstance(e, Gap)]
                assert len([e for e in events if isinstance(e, Reset)]) == 1
            for run, data in (("lost", b"1234"), ("other", b"abc")):
                async with watching(node.url, run) as events:
                    await until(lambda e=events: ended(e))
                    assert data_of(events) == data
    finally:
        node.close()


async def _api(link: Link, operation: str, body: dict[str, Any]) -> dict[str, Any]:
    """Asked again where JetStream takes longer than usual, on a busy machine."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await link.api(operation, body)
            except NotReady as problem:
                if problem.code:
                    raise


def test_an_abort_right_after_the_submit_leaves_an_end(box: Box) -> None:
    """The run is claimed, its stream reset or its process started just then."""
    met: set[str] = set()

    async def main() -> None:
        link = await dial(load(box.config, client=True))
        try:
            n, longest = 0, 0.008
            while n < TRIES or len(met) < 2:
                assert n < MOST_TRIES, f"all were aborted when they were {met}: nothing was tested"
                run = thread = f"brief-{n}"
                request = messages.Submit(thread, run=run, argv=["sleep", "600"])
                submitting = asyncio.create_task(ask(link, request, messages.Submitted))
                if n % 2:
                    await submitting
                    await asyncio.sleep(n % TRIES / TRIES * longest)
                abort, aborted = messages.Abort(thread, queued=True), False
                while not aborted:  # even before the submit is answered, once it is stored
                    with contextlib.suppress(NotFound, Refused):
                        aborted = bool(await ask(link, abort, messages.Aborted, hint=False))
                await submitting
                subject = subjects.out_subject(thread, run)
                query = {"last_by_subj": subject}
                reply = await _api(link, f"STREAM.MSG.GET.{subjects.STREAM}", query)
                record = records.decode_record(base64.b64decode(reply["message"]["data"]))
                assert isinstance(record, records.End), f"{n}: {record}"
                assert record.outcome.status == "aborted"
                info = await _api(
                    link, f"STREAM.INFO.{subjects.STREAM}", {"subjects_filter": subject}
                )
                met.add("begun" if info["state"]["subjects"][subject] > 1 else "queued")
                n += 1
                if n % TRIES == 0:  # a machine that is slower than most, or busy
                    longest *= 2
        finally:
            await link.close()

    asyncio.run(main())
