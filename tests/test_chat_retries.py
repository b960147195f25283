"""Calls that are made again: while an endpoint starts or is overloaded, and with less history
when its context is full. Real loopback servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
import trio
from conftest import DEADLINE, Box, Watch, wait_until
from dbos._schemas.system_database import SCHEMA_PLACEHOLDER, SystemSchema
from pgserver import free_port
from runctl.config.schema import ChatRunner
from runctl.protocol import messages
from runctl.protocol.errors import RunFailed
from runctl.protocol.model import Outcome, RunSpec, Status
from runctl.supervisor.execution.runners.chat import Chat, failures, retries
from runctl.supervisor.execution.runners.protocol import Turn
from runctl.supervisor.queue.conversation_rows import ConversationRows
from runctl.supervisor.queue.row_access import RowAccess
from test_chat import SPEC, Scripted, config, delta, serving

TURNS = tuple(Turn(f"q{n} " + "x" * 100, f"a{n} " + "y" * 100) for n in range(8))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of the product would only make the tests longer."""
    monkeypatch.setattr(retries, "FIRST", 0.01)
    monkeypatch.setattr(retries, "LONGEST", 0.02)


async def talk(
    runner: ChatRunner, history: tuple[Turn, ...] = (), spec: RunSpec = SPEC
) -> tuple[Outcome, list[tuple[str, str]]]:
    """The outcome, and (stream, text) of each chunk."""
    seen: list[tuple[str, str]] = []

    async def emit(stream: str, data: bytes) -> None:
        seen.append((stream, data.decode()))
        await trio.lowlevel.checkpoint()

    with trio.fail_after(DEADLINE):
        return await Chat(runner).run(spec, 1, emit, history), seen


def hello(to: Scripted) -> None:
    to.begin()
    to.event(delta("Hello"))
    to.event(delta("", "stop"))
    to.event("[DONE]")
    to.wfile.write(b"0\r\n\r\n")


def after(count: int, refuse: Callable[[Scripted], None]) -> Callable[[Scripted], None]:
    """Refuses ``count`` times, and says hello then."""

    def answer(to: Scripted) -> None:
        if len(to.server.requests) <= count:
            refuse(to)
        else:
            hello(to)

    return answer


def error(status: int, message: str, **more: Any) -> Callable[[Scripted], None]:
    headers = more.pop("headers", {})
    body = json.dumps({"error": {"message": message, **more}}).encode()
    return lambda to: to.reply(status, body, **headers)


def first_event(value: object) -> Callable[[Scripted], None]:
    def answer(to: Scripted) -> None:
        to.begin()
        to.event(value)
        to.wfile.write(b"0\r\n\r\n")

    return answer


def gone(to: Scripted) -> None:
    """The connection ends without an answer."""


def cut(to: Scripted) -> None:
    to.begin()
    to.event(delta(None))


PASSING = {
    "loading": error(503, "Loading model", type="unavailable_error"),
    "rate": error(429, "Rate limit reached"),
    "gateway": lambda to: to.reply(502, b"<html>Bad Gateway</html>", "text/html"),
    "late": error(504, "upstream timed out"),
    "request timeout": error(408, "too slow"),
    "overloaded": error(529, "Overloaded"),
    "cloudflare": error(522, "origin"),
    "internal": error(500, "worker restarts"),
    "retry after": error(503, "busy", headers={"Retry-After": "0.01"}),
    "retry after ms": error(429, "busy", headers={"Retry-After-Ms": "5"}),
    "retry after a date": error(
        503, "busy", headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    ),
    "retry after nonsense": error(503, "busy", headers={"Retry-After": "soon"}),
    "in the stream": first_event({"error": {"message": "Overloaded", "type": "overloaded_error"}}),
    "code in the stream": first_event({"error": {"message": "wait", "code": 503}}),
    "no answer": gone,
    "cut before the first word": cut,
    "nothing": lambda to: to.reply(200, b"", "text/event-stream"),
}


@pytest.mark.parametrize("name", PASSING)
async def test_what_passes_is_waited_out(name: str) -> None:
    with serving(after(2, PASSING[name])) as server:
        outcome, seen = await talk(config(server, retry=30.0))
    assert outcome == Outcome(Status.SUCCEEDED, reply="Hello")
    assert len(server.requests) == 3
    assert seen[-1] == ("text", "Hello")
    ((stream, said),) = seen[:-1]  # once, though there were two
    assert stream == "stderr"
    assert said.startswith("runctl: http://127.0.0.1:")
    assert said.endswith("; trying again for up to 30 s\n")


STAYING = {
    "bad request": error(400, "messages: wrong role"),
    "key": error(401, "Incorrect API key"),
    "model": error(404, "model not found"),
    "not implemented": error(501, "no chat here"),
    "quota": error(429, "You exceeded your current quota", code="insufficient_quota"),
    "told not to": error(503, "no", headers={"X-Should-Retry": "false"}),
    "much too late": error(503, "maintenance", headers={"Retry-After": "3600"}),
    "error in the stream": first_event({"error": {"message": "wrong template", "code": 400}}),
    "not a completion": first_event({"status": "ok"}),
}


@pytest.mark.parametrize("name", STAYING)
async def test_what_stays_is_not_tried_again(name: str) -> None:
    with serving(after(1, STAYING[name])) as server, pytest.raises(RunFailed) as caught:
        await talk(config(server, retry=30.0))
    assert len(server.requests) == 1
    if name == "much too late":
        assert "it asks to be left alone for 3600 s, and this runner's retry is 30 s" in str(
            caught.value
        )


async def test_a_server_that_is_not_there_yet() -> None:
    port = free_port()
    began = trio.Event()
    seen: list[tuple[str, bytes]] = []

    async def emit(stream: str, data: bytes) -> None:
        seen.append((stream, data))
        began.set()

    found: list[Outcome] = []
    ended = trio.Event()

    async def run() -> None:
        found.append(await Chat(config(port, retry=3600.0)).run(SPEC, 1, emit, ()))
        ended.set()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await began.wait()
            assert b"cannot connect (Connection refused)" in seen[0][1]
            with serving(hello, port):
                await ended.wait()
    assert found == [Outcome(Status.SUCCEEDED, reply="Hello")]


async def test_the_bound_holds_and_says_how_often() -> None:
    for most in (0.1, 1.0, 10.0):  # on a busy machine each request takes a while
        said = rf"Loading model \(tried \d+ times, within {most:g} s\)"
        with (
            serving(error(503, "Loading model")) as server,
            pytest.raises(RunFailed, match=said),
        ):
            await talk(config(server, retry=most))
        if len(server.requests) > 1:
            break
    assert len(server.requests) > 1


async def test_an_internal_error_of_the_endpoint_is_tried_a_few_times() -> None:
    with serving(error(500, "a bug")) as server, pytest.raises(RunFailed, match="a bug"):
        await talk(config(server, retry=60.0))
    assert len(server.requests) == 1 + failures.FEW


async def test_not_after_the_first_word() -> None:
    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("half a "))

    with serving(answer) as server:
        with pytest.raises(RunFailed, match="cut mid-way"):
            await talk(config(server, retry=1.0))
        assert len(server.requests) == 1

    def reports(to: Scripted) -> None:
        to.begin()
        to.event(delta("half a "))
        to.event({"error": {"message": "Overloaded", "code": 529}})

    with serving(reports) as server:
        with pytest.raises(RunFailed, match="Overloaded"):
            await talk(config(server, retry=1.0))
        assert len(server.requests) == 1


async def test_an_abort_during_the_wait_works_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST", 3600.0)
    monkeypatch.setattr(retries, "LONGEST", 3600.0)
    with serving(error(503, "Loading model")) as server:
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:

                async def emit(stream: str, data: bytes) -> None:
                    nursery.cancel_scope.cancel()

                nursery.start_soon(Chat(config(server, retry=7200.0)).run, SPEC, 1, emit, ())
    assert len(server.requests) == 1


# ---- a context that is full ------------------------------------------------------------------

FULL = {
    "openai": error(400, "This model's maximum context length is 8192 tokens. However, your"
                    " messages resulted in 9000 tokens.", code="context_length_exceeded"),
    "vllm": error(400, "This model's maximum context length is 4096 tokens. However, you requested"
                  " 5000 tokens in the messages, Please reduce the length of the messages."),
    "llama.cpp": error(400, "the request exceeds the available context size. try increasing the"
                       " context size or enable context shift", type="exceed_context_size_error"),
    "anthropic": error(400, "prompt is too long: 210000 tokens > 200000 maximum"),
    "gemini": error(400, "The input token count (2000000) exceeds the maximum number of tokens"
                    " allowed (1048576)."),
    "mistral": error(400, "Prompt contains 40000 tokens and 0 draft tokens, too large for model"
                     " with 32768 maximum context length"),
    "ollama": error(500, "input length exceeds maximum context length"),
    "litellm": error(400, "litellm.ContextWindowExceededError: BadRequestError"),
    "tgi": error(422, "Input validation error: `inputs` must have less than 4096 tokens."
                 " Given: 5000"),
    "xai": error(400, "This model's maximum prompt length is 131072 but the request contains"
                 " 200000 tokens."),
    "sglang": error(400, "The input (9000 tokens) is longer than the model's context length"
                    " (8192 tokens)."),
    "bedrock": error(400, "Input is too long for requested model."),
    "tabby": error(400, "Prompt length 5000 is greater than max_seq_len 4096"),
    "dashscope": error(400, "Range of input length should be [1, 30720]"),
    "groq": error(413, "Request too large for model on tokens per minute (TPM): Limit 6000,"
                  " Requested 7000"),
    "openai tpm": error(429, "Request too large for gpt-4 on tokens per min (TPM)"),
    "nginx": lambda to: to.reply(413, b"<html>413 Request Entity Too Large</html>", "text/html"),
    "in the stream": first_event({"error": {"message": "This endpoint's maximum context length is"
                                            " 8192 tokens.", "code": 400}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
async def test_a_full_context_gets_about_half_of_the_history(name: str) -> None:
    with serving(after(1, FULL[name])) as server:
        outcome, seen = await talk(config(server, retry=0.0), TURNS)
    assert outcome.reply == "Hello"
    assert outcome.note == ("the endpoint's context was full: 4 of 8 earlier turns were left out")
    assert [stream for stream, _ in seen] == ["stderr", "text"]
    assert seen[0][1].endswith("; sent again with 4 earlier turns\n")
    first, second = (r[2]["messages"] for r in server.requests)
    assert len(first) == 17
    assert second == first[8:]


async def test_a_small_context_gets_less_until_it_is_enough() -> None:
    """A thread whose history is far too long is not lost: "hi" still fits."""

    def answer(to: Scripted) -> None:
        if sum(len(m["content"]) for m in to.server.requests[-1][2]["messages"]) > 100:
            FULL["openai"](to)
        else:
            hello(to)

    with serving(answer) as server:
        outcome, _ = await talk(config(server), TURNS)
        assert [len(r[2]["messages"]) for r in server.requests] == [17, 9, 5, 3, 1]
        assert outcome.note is not None
        assert "8 of 8 earlier turns" in outcome.note
        long = RunSpec(run="r1", thread="t", runner="chat", prompt="x" * 200)
        with pytest.raises(RunFailed, match="maximum context length"):
            await talk(config(server), (), long)


@pytest.mark.parametrize(
    "refuse",
    [
        error(429, "Rate limit reached for requests per min. Limit: 3, please try again"),
        error(400, "max_tokens is too large: 5000"),
        error(400, "messages[2].role: wrong"),
        error(401, "the prompt is too long"),
    ],
)
async def test_other_limits_keep_the_history(refuse: Callable[[Scripted], None]) -> None:
    with serving(after(1, refuse)) as server, pytest.raises(RunFailed):
        await talk(config(server, retry=0.0), TURNS)
    assert len(server.requests) == 1


# ---- what is sent of the history -------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "sent"), [(0, 0), (1, 0), (2, 2), (4, 4), (5, 4), (16, 16), (50, 16)]
)
async def test_history_counts_messages_in_whole_turns(history: int, sent: int) -> None:
    with serving(hello) as server:
        await talk(config(server, history=history), TURNS)
    messages = server.requests[0][2]["messages"]
    assert len(messages) == sent + 1
    assert [m["role"] for m in messages] == ["user", "assistant"] * (sent // 2) + ["user"]
    if sent:
        assert messages[-2]["content"] == TURNS[-1].reply


@pytest.mark.parametrize(("most", "turns"), [(0, 0), (205, 0), (206, 1), (500, 2), (10**6, 8)])
async def test_history_has_a_bound_in_bytes(most: int, turns: int) -> None:
    with serving(hello) as server:
        await talk(config(server, history_bytes=most), TURNS)
    assert len(server.requests[0][2]["messages"]) == 2 * turns + 1


async def test_a_blank_turn_is_never_sent() -> None:
    turns = (Turn("q1", ""), Turn("q2", "a2"), Turn("q3", " \n"), Turn("  ", "a4"))
    with serving(hello) as server:
        await talk(config(server), turns)
    assert [m["content"] for m in server.requests[0][2]["messages"]] == ["q2", "a2", "hello"]


# ---- with a daemon ---------------------------------------------------------------------------


@contextmanager
def chatting(box: Box, answer: Callable[[Scripted], None], more: str = "") -> Iterator[Any]:
    with serving(answer) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        box.configure(f'[runners.c]\nkind = "chat"\nbase_url = "{url}"\nmodel = "m"\n{more}\n')
        box.start()
        yield server


def test_an_empty_reply_does_not_spoil_its_thread(stopped_box: Box) -> None:
    """A strict endpoint: an empty message of the assistant is refused for ever."""

    def answer(to: Scripted) -> None:
        messages = to.server.requests[-1][2]["messages"]
        if any(not m["content"] for m in messages):
            error(400, "messages: text content blocks must be non-empty")(to)
        elif len(to.server.requests) == 1:
            to.begin()
            to.event(delta("", "stop"))
        else:
            hello(to)

    box = stopped_box
    with chatting(box, answer) as server:
        run = box.runctl("submit", "talk", "--runner", "c", "one").strip()
        box.runctl("wait", run)
        assert box.show(run)["note"] == "the reply is empty"
        for prompt in ("two", "three"):
            assert "Hello" in box.runctl("submit", "talk", "-a", "--runner", "c", prompt)
        said = [m["content"] for m in server.requests[-1][2]["messages"]]
    assert said == ["two", "Hello", "three"]


def test_a_note_is_shown_to_whoever_watches_waits_or_asks(stopped_box: Box) -> None:
    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("Hello", "length"))

    box = stopped_box
    note = "the reply was cut at a length limit (finish_reason length)"
    with chatting(box, answer):
        assert box.runctl("submit", "talk", "-a", "--runner", "c", "one") == "Hello"
        said = box.stderr
        (row,) = box.json("list", "talk")
        box.ended(row["run"])
        (row,) = box.json("list", "talk")
        assert f"runctl: run {row['run']}: {note}\n" in said
        assert row["note"] == note
        assert box.runctl("wait", row["run"]) == "succeeded\n"
        assert note in box.stderr
        assert note in box.runctl("show", row["run"])
        watch = Watch(box, "talk")
        assert watch.wait() == 0
        assert watch.events[-1]["note"] == note


def test_a_replay_waits_for_a_model_that_loads(stopped_box: Box) -> None:
    """The machine restarts: the daemon is back before the model is."""
    state = {"loading": False}
    loaded = threading.Event()

    def answer(to: Scripted) -> None:
        if state["loading"] and not loaded.is_set():
            error(503, "Loading model")(to)
            return
        if to.server.requests[-1][2]["messages"][-1]["content"] == "one" and not state["loading"]:
            to.begin()
            to.event(delta("half"))
            to.server.over.wait(60)
            return
        hello(to)

    box = stopped_box
    with chatting(box, answer) as server:
        runs = [
            box.runctl("submit", "talk", "--runner", "c", prompt).strip()
            for prompt in ("one", "two")
        ]
        wait_until(lambda: server.requests, "the first turn is there")
        box.kill()
        state["loading"] = True
        box.start()
        watch = Watch(box, "talk", "--run", runs[0])
        wait_until(lambda: len(server.requests) > 2, "the replay has met the loading model")
        wait_until(lambda: "Loading model" in watch.text(), "the watcher sees the wait")
        loaded.set()
        assert watch.wait() == 0
        assert [c["data"] for c in watch.chunks() if c["attempt"] == 2][-1] == "Hello"
        assert box.runctl("wait", runs[1]) == "succeeded\n"
        assert b"Loading model" in box.log.read_bytes()
        show = box.show(runs[0])
        assert (show["status"], show["attempt"]) == ("succeeded", 2)


def test_a_long_conversation_is_read_within_its_bound(stopped_box: Box) -> None:
    """Every turn has more text than may be sent along in all: nothing of it is read."""

    def answer(to: Scripted) -> None:
        to.begin()
        for _ in range(10):
            to.event(delta("z" * 20_000))
        to.event(delta("", "stop"))

    box = stopped_box
    with chatting(box, answer, 'history = 1000\nhistory_bytes = "500KB"') as server:
        asked = [messages.Submit("talk", runner="c", prompt=str(n)) for n in range(5)]
        run = box.ask(*asked)[-1].run
        box.runctl("wait", run)
        assert [len(r[2]["messages"]) for r in server.requests] == [1, 3, 5, 5, 5]
        assert [m["content"][:1] for m in server.requests[-1][2]["messages"]] == list("2z3z4")
    assert turns_of(box, "talk", run, 200_001) == ([("3", "z" * 200_000)], ["3"])
    assert turns_of(box, "talk", run, 240_000) == ([("3", "z" * 200_000)], ["3", "2"])
    # What does not fit by far is not even read.
    assert turns_of(box, "talk", run, 30_000) == ([], [])


def turns_of(box: Box, thread: str, run: str, most: int) -> tuple[list[tuple[str, str]], list[str]]:
    """(the turns that ``run`` would be given, the prompts of those whose text was read)."""
    engine = sa.create_engine(f"sqlite:///{box.state / 'runctl.sqlite'}").execution_options(
        schema_translate_map={SCHEMA_PLACEHOLDER: None}
    )
    stopping = threading.Event()
    stopping.set()  # what the database refuses is not tried again
    read: list[str] = []

    class Noting(ConversationRows):
        def _read_turn(self, run: str) -> tuple[str, str] | None:
            found = super()._read_turn(run)
            read.extend(found[:1] if found else [])
            return found

    async def ask() -> list[tuple[str, str]]:
        database: Any = SimpleNamespace(engine=engine, tables=SystemSchema, now=time.time)
        threads = trio.CapacityLimiter(1)
        rows = Noting(RowAccess(database, "x", stopping, threads=threads, alone=True))
        return await rows.read_turns(thread, run, 100, most)

    try:
        return trio.run(ask), read
    finally:
        engine.dispose()


def test_an_abort_of_a_turn_that_waits(stopped_box: Box) -> None:
    box = stopped_box
    refuse = error(503, "Loading model", headers={"Retry-After": "3600"})
    with chatting(box, refuse, 'retry = "2h"') as server:
        run = box.runctl("submit", "talk", "--runner", "c", "one").strip()
        wait_until(lambda: b"tried again" in box.log.read_bytes(), "it waits")
        box.runctl("abort", "talk")
        assert box.show(run)["status"] == "aborted"
        assert len(server.requests) == 1
