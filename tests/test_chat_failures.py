"""Which failures of a chat's call may heal by themselves, and when it is made again: by what an
endpoint says, and by the clock. ``test_chat_retries.py`` has real calls."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Mapping

import pytest
import trio
from runctl.supervisor.execution.runners.chat import failures, retries
from runctl.supervisor.execution.runners.chat.failures import CallFailed, refused, retry_after
from runctl.supervisor.execution.runners.chat.retries import Patience

pytestmark = pytest.mark.short

CONTEXT = [  # each is known by one thing
    (400, "context_length_exceeded"),
    (400, "exceed_context_size_error"),
    (400, "ContextWindowExceededError"),
    (400, "context_window_exceeded"),
    (400, "prompt_too_long"),
    (400, "string_above_max_length"),
    (400, "the model's context length is 8192"),
    (500, "the context window is full"),
    (400, "the available context size"),
    (400, "request_too_large"),
    (429, "Request too large for gpt-4 on tokens per min (TPM)"),
    (400, "too many tokens: 9000"),
    (400, "too many input tokens"),
    (400, "too many prompt tokens"),
    (400, "too many total tokens"),
    (400, "The input token count is 2000000"),
    (400, "prompt token count of 9000"),
    (413, "<html>Request Entity Too Large</html>"),
    # Of a request that was refused for what it holds.
    (400, "prompt is too long: 210000 tokens"),
    (400, "Input is too long for requested model"),
    (400, "messages are too large"),
    (400, "this conversation exceeds 4096"),
    (400, "inputs exceed 4096"),
    (400, "messages exceeded the limit"),
    (400, "the input (9000) is longer than 8192"),
    (400, "the prompt is greater than 4096"),
    (422, "`inputs` must have less than 4096 tokens"),
    (422, "inputs must be <= 4096"),
    (400, "maximum prompt length is 131072"),
    (400, "maximum input length is 131072"),
    (400, "5000 of max_seq_len 4096"),
    (400, "please reduce the length of what you send"),
    (400, "Range of input length should be [1, 30720]"),
    (400, "9000 tokens, which exceed 8192"),
    (500, "prompt is too long"),
    (200, "prompt is too long"),  # said in the stream
]


@pytest.mark.parametrize(("status", "said"), CONTEXT)
def test_words_for_a_full_context(status: int, said: str) -> None:
    failure = refused("m", said, status)
    assert (failure.full, failure.passing, failure.doubtful) == (True, False, False)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "max_tokens is too large: 5000"),
        (400, "messages[2].role: wrong"),
        (401, "the prompt is too long"),
        (403, "context length"),  # who may not ask is told nothing true
        (404, "context_length_exceeded"),
        (429, "too many requests: the input is too large a share"),
        (503, "the prompt exceeds what is free at the moment"),
    ],
)
def test_what_is_said_of_something_else_leaves_the_history_alone(status: int, said: str) -> None:
    assert not refused("m", said, status).full


@pytest.mark.parametrize("status", sorted(failures.PASSING | failures.DOUBTFUL))
def test_statuses_that_pass(status: int) -> None:
    failure = refused("m", "no words", status)
    assert (failure.passing, failure.doubtful) == (status not in (409, 500), status in (409, 500))


def test_each_status_is_there_for_a_server_or_a_proxy_that_says_it() -> None:
    cloudflare = {520, 521, 522, 523, 524, 530}
    assert {408, 425, 429, 502, 503, 504, 529} | cloudflare == failures.PASSING
    for status in (400, 401, 403, 404, 422, 501, 525, 526):  # the last are certificates
        failure = refused("m", "no words", status)
        assert (failure.passing, failure.doubtful) == (False, False)


@pytest.mark.parametrize(
    "said",
    [
        "Overloaded",
        "overloaded_error",
        "engine_overloaded",
        "Rate limit reached",
        "rate_limit_exceeded",
        "ratelimit",
        "too_many_requests",
        "Too many requests",
        "service unavailable",
        "Loading model",
        "the model is loading",
        "server_is_busy",
        "we are at capacity",
        '{"code": 503}',
        '{"status":"429"}',
        '{"status_code": 529}',
        '{"error_code":  502}',
    ],
)
def test_words_in_a_stream_that_pass(said: str) -> None:
    assert refused("m", said).passing
    assert not refused("m", said, 400).passing, "an answer that has a status is known by that"


@pytest.mark.parametrize("said", ['{"code": 5031}', '{"port": 503}', "an error", '{"code": 400}'])
def test_words_in_a_stream_that_do_not(said: str) -> None:
    assert not refused("m", said).passing


@pytest.mark.parametrize(
    "said",
    [
        "insufficient_quota",
        "You exceeded your current quota",
        "Insufficient Balance",
        "insufficient credits",
        "insufficient funds",
        "your credit balance is too low",
        "check your billing details",
    ],
)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_money_does_not_come_back_within_seconds(status: int, said: str) -> None:
    failure = refused("m", said, status)
    assert (failure.passing, failure.doubtful) == (False, False)


def test_an_endpoint_may_say_it_itself() -> None:
    assert refused("m", "no", 418, {"x-should-retry": "true"}).passing
    for status in (503, 500):
        failure = refused("m", "no", status, {"x-should-retry": "false"})
        assert (failure.passing, failure.doubtful) == (False, False)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 99999 07:28:00 GMT"}, None),
    ],
)
def test_when_to_come_again(headers: Mapping[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_date_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    date = email.utils.formatdate(1_700_000_090, usegmt=True)
    assert retry_after({"retry-after": date}) == 90.0


PASSES = CallFailed("m", passing=True)


async def test_waits_grow_to_a_bound_of_their_own() -> None:
    patience = Patience(3600.0)
    for expected in (0.5, 1, 2, 4, 8, 10, 10, 10):
        assert expected * 0.75 <= patience.wait(PASSES) <= expected
    assert retries.LONGEST == 10


async def test_many_do_not_come_back_together() -> None:
    assert len({Patience(3600.0).wait(PASSES) for _ in range(20)}) > 1


async def test_an_endpoint_is_left_alone_as_long_as_it_asks(
    autojump_clock: trio.abc.Clock,
) -> None:
    patience = Patience(60.0)
    assert patience.wait(CallFailed("m", passing=True, after=37.0)) == 37.0
    assert patience.wait(CallFailed("m", passing=True, after=60.0)) == 60.0
    with pytest.raises(CallFailed, match="left alone for 61 s, and this runner's retry is 60 s"):
        patience.wait(CallFailed("m", passing=True, after=61.0))


async def test_the_bound_is_one_for_all_calls_of_a_turn(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.0)
    patience = Patience(5.0)
    began = trio.current_time()
    for wait in (0.5, 1.0, 2.0, 1.5):
        assert patience.wait(PASSES) == wait
        await trio.sleep(wait)
    assert trio.current_time() - began == 5.0, "the last try is at the bound"
    with pytest.raises(CallFailed, match=r"^m \(tried 5 times, within 5 s\)$"):
        patience.wait(PASSES)


async def test_what_is_doubtful_is_tried_a_few_times() -> None:
    patience = Patience(60.0)
    doubtful = CallFailed("m", doubtful=True)
    patience.wait(doubtful)
    patience.wait(PASSES)  # does not count
    patience.wait(doubtful)
    with pytest.raises(CallFailed, match="tried 4 times"):
        patience.wait(doubtful)


async def test_what_stays_and_a_runner_without_patience_are_given_up_at_once() -> None:
    for patience, failure in (
        (Patience(60.0), CallFailed("stays")),
        (Patience(0.0), PASSES),
        (Patience(0.0), CallFailed("m", doubtful=True)),
    ):
        with pytest.raises(CallFailed) as caught:
            patience.wait(failure)
        assert caught.value is failure
