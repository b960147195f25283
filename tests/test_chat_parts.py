"""What a chat goes on with: the stored part of a reply, and what an answer adds to it."""

from __future__ import annotations

import itertools
import json
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from runctl.config.schema import ChatRunner
from runctl.protocol import subjects
from runctl.protocol.errors import RunFailed
from runctl.supervisor.execution.runners.chat.body import Event
from runctl.supervisor.execution.runners.chat.exchange import Background, State, read_state
from runctl.supervisor.execution.runners.chat.prefill import LEAST, Repetition, prefilled
from runctl.supervisor.execution.runners.chat.request import Target
from runctl.supervisor.execution.runners.chat.response import Response
from runctl.supervisor.output.continuation import Place
from runctl.supervisor.output.publisher import Streams
from runctl.supervisor.output.writer import Writer
from streams import THREAD, data_of, until, watching
from test_continue import DONE, has_ended, streams_of, valid_of

TEXT = st.text("ab é語🎈\n", max_size=12)


def cut(text: str, at: list[int]) -> list[str]:
    """``text`` in pieces."""
    places = sorted({min(x, len(text)) for x in at} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


# ---- what an answer repeats ----------------------------------------------------------------------


@given(TEXT, TEXT, st.lists(st.integers(0, 90)))
def test_a_long_beginning_that_is_repeated_is_left_out(
    begun: str, more: str, at: list[int]
) -> None:
    begun = "x" * LEAST + begun
    sent = begun.rstrip()
    answer = sent + begun[len(sent) :] + more
    for text in (answer, answer.removeprefix(sent)):  # that is repeated, and that is not
        found = Repetition("vllm", begun)
        told = "".join(map(found.take, cut(text, at))) + found.rest()
        assert begun + told == begun + more


@pytest.mark.parametrize(
    ("style", "begun", "answer", "whole"),
    [
        ("vllm", "ha", "ha", "haha"),
        ("mistral", "ha", "ha!", "ha!"),
        ("mistral", "ha", "h", "hah"),
        ("vllm", "one ", " two", "one two"),
        ("vllm", "one\n\n", "\ntwo", "one\n\ntwo"),
        ("vllm", "one ", "two", "one two"),
        ("mistral", "one ", "one two", "one two"),
        ("deepseek", " ", " two", " two"),
        ("vllm", "one ", " ", "one "),
    ],
)
def test_short_ones_and_white_space(style: str, begun: str, answer: str, whole: str) -> None:
    for pieces in ([answer], list(answer)):
        found = Repetition(style, begun)
        assert begun + "".join(map(found.take, pieces)) + found.rest() == whole


def test_white_space_at_the_end_is_not_sent() -> None:
    assert prefilled("llama.cpp", [], "one \n")["messages"] == [
        {"role": "assistant", "content": "one"}
    ]


# ---- what is stored of a reply -------------------------------------------------------------------


def _subject(run: str) -> str:
    return subjects.out_subject(THREAD, run)


async def go_on(streams: Streams, writer: Writer, unit: Any) -> Place | None:
    find = partial(streams.find_place, _subject(writer.run), unit)
    there = await writer.go_on(find, await find())
    assert there is None or isinstance(there, Place)
    return there


async def read_text(streams: Streams, place: Place) -> bytes:
    found = [x for chunks in [c async for c in streams.read_valid(place)] for x in chunks]
    return b"".join(x.data for x in found if x.stream == "text")


@pytest.mark.parametrize("at", range(1, 11))
async def test_half_a_character_at_the_end_is_void(nats_server: str, at: int) -> None:
    """A long text is stored in pieces, and the daemon may die between two."""
    run, data = f"half-{at}", "aé語🎈".encode()
    whole = data[:at].decode(errors="ignore").encode()
    async with streams_of(nats_server) as streams, watching(nats_server, run) as early:
        first = Writer(streams, THREAD, run, 1, "e")
        await first.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.pump)
            await first.append("text", b"before, ")
            await first.append("stderr", b"runctl: a remark\n")
            await first.append("text", data[:at])
            first.close()
        second = Writer(streams, THREAD, run, 2, "e")
        place = await go_on(streams, second, "character")
        assert place is not None
        assert (place.attempt, place.checkpoint) == (1, None)
        assert await read_text(streams, place) == b"before, " + whole
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.pump)
            await second.append("text", data[len(whole) :])
            second.close()
        await second.end(DONE)
        await until(lambda: has_ended(early))
        async with watching(nats_server, run) as late:
            await until(lambda: has_ended(late))
        expected = b"before, runctl: a remark\n" + data
        assert valid_of(early) == valid_of(late) == data_of(late) == expected


async def test_a_checkpoint_with_a_chunk_is_stored_with_all_before_it_or_not_at_all(
    nats_server: str,
) -> None:
    async with streams_of(nats_server) as streams:
        first = Writer(streams, THREAD, "with", 1, "e")
        await first.open()
        await first.append_with("text", b"a", b"1")
        await first.append_with("text", b"b", b"2")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.pump)
            first.close()
        second = Writer(streams, THREAD, "with", 2, "e")
        place = await go_on(streams, second, "checkpoint")
        assert place is not None
        assert (place.checkpoint, place.after) == (b"2", 2)
        await second.append_with("text", b"c", b"3")
        await second.append("stderr", b"behind it")  # in the same record
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.pump)
            second.close()
        place = await go_on(streams, Writer(streams, THREAD, "with", 3, "e"), "checkpoint")
        assert place is not None
        assert (place.checkpoint, place.after) == (b"2", 2)
        assert await read_text(streams, place) == b"ab"


async def test_an_attempt_that_starts_over_in_its_middle(nats_server: str) -> None:
    run = "over-again"
    async with streams_of(nats_server) as streams, watching(nats_server, run) as early:
        first = Writer(streams, THREAD, run, 1, "e")
        await first.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.pump)
            await first.append_with("text", b"void", b"1")
            await until(lambda: data_of(early) == b"void")
            await first.append("text", b"this too")
            first.start_over()
            await first.append_with("text", b"valid", b"2")
            first.close()
        await until(lambda: valid_of(early) == b"valid")
        async with watching(nats_server, run) as late:
            await until(lambda: valid_of(late) == b"valid")
            assert data_of(late) == b"valid", "what is void is gone"
        place = await go_on(streams, Writer(streams, THREAD, run, 2, "e"), "checkpoint")
        assert place is not None
        assert (place.after, place.total, place.checkpoint) == (1, 5, b"2")


# ---- events of a response ------------------------------------------------------------------------


class Reader:
    """A response that is read; ``shown`` is what was given away before, and of it."""

    def __init__(self, shown: str = "", after: int | None = None) -> None:
        self.shown = shown
        config = ChatRunner("c", base_url="http://h/v1", model="m", api="responses")
        self.reply = Response(Target(config, None), lambda: self.shown, after)

    def take(self, **value: Any) -> str:
        text, _ = self.reply.take(Event("", json.dumps(value)))
        self.shown += text
        return text


def delta(text: str, number: int) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "delta": text, "sequence_number": number}


def completed(*texts: str, status: str = "completed") -> dict[str, Any]:
    parts = [{"type": "output_text", "text": text} for text in texts]
    return {
        **{"object": "response", "id": "r1", "status": status},
        "output": [{"type": "reasoning"}, {"type": "message", "content": parts}],
    }


def test_events_that_were_taken_before_count_for_nothing() -> None:
    """Of an endpoint that begins at the beginning."""
    reader = Reader("one", after=4)
    assert [reader.take(**delta(x, n)) for n, x in [(3, "o"), (4, "ne"), (5, " two")]] == [
        *("", "", " two")
    ]
    reader.take(type="response.completed", sequence_number=6, response=completed("one two"))
    assert (reader.reply.conclude(), reader.shown, reader.reply.number) == ([], "one two", 6)


@pytest.mark.parametrize("shown", ["", "one", "one two"])
def test_what_no_event_has_told_is_in_the_last_one(shown: str) -> None:
    reader = Reader(shown)
    reader.take(type="response.completed", response=completed("one", " two"))
    assert (reader.reply.conclude(), reader.shown) == ([], "one two")


def test_an_answer_that_is_no_stream() -> None:
    reader = Reader()
    assert reader.take(**completed("one")) == "one"
    assert (reader.reply.conclude(), reader.reply.id) == ([], "r1")
    reader = Reader()
    reader.take(**completed(status="in_progress"))
    with pytest.raises(RunFailed, match="it ended before the response did") as caught:
        reader.reply.conclude()
    assert caught.value.passing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (delta("", 1) | {"type": "response.refusal.delta", "delta": "I will not"}, "I will not"),
        ({"type": "response.reasoning_text.delta", "delta": "hm"}, "only reasoning"),
        ({"type": "response.output_item.added", "item": {"type": "function_call"}}, "tool calls"),
        ({"type": "response.in_progress"}, None),
    ],
)
def test_responses_without_text(event: dict[str, Any], said: str | None) -> None:
    reader = Reader()
    reader.take(**event)
    reader.take(type="response.completed", response=completed())
    if said is None:
        assert reader.reply.conclude() == ["the reply is empty"]
        return
    with pytest.raises(RunFailed, match=said):
        reader.reply.conclude()


def test_half_a_character_is_no_place_to_go_on_from() -> None:
    reader = Reader()
    assert reader.take(**delta("a\ud83c", 1)) == "a"
    config = ChatRunner("c", base_url="http://h/v1", model="m", api="responses", background=True)
    exchange = Background(config, Target(config, None), "hello", "", State("r", 0))
    assert exchange.find_state(reader.reply) is None
    assert reader.take(**delta("\udf88", 2)) == "🎈"
    assert exchange.find_state(reader.reply) == b'{"response":"r","after":2}'


@pytest.mark.parametrize("data", [b"", b"17", b"{}", b"\xff", b'{"response": 1, "after": 2}'])
def test_a_checkpoint_of_another_kind(data: bytes) -> None:
    assert read_state(data) is None
    assert read_state(b'{"response": "r", "after": 2, "x": 1}') == State("r", 2)
