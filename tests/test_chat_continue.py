"""Chats that go on where they were interrupted: nothing is shown or generated twice."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import NIGHT, Box, Watch, wait_until
from counting import Endpoint, counting
from house import Bus, House
from runctl.protocol.records import Chunks
from test_checkpoints import valid

TAKEOVER = "[takeover]\nenabled = true\nafter = '2s'\n[queue]\noutlive = '0s'\n"
#: Characters of one to four bytes, and white space that begins a token, as tokenizers have it.
REPLY = [f"{word}{n}" for n in range(40) for word in (" word", " größe", " 語", " 🎈", "\n-")]
STYLES = ("vllm", "mistral", "deepseek", "llama.cpp")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with counting(REPLY) as made:
        yield made


def runner(endpoint: Endpoint, how: str, more: str = "") -> str:
    """``how``: a style of prefill, or "background", or "responses"."""
    keys = {"background": 'api = "responses"\nbackground = true', "responses": 'api = "responses"'}
    return (
        f'[runners.c]\nkind = "chat"\nbase_url = "{endpoint.base_url}"\nmodel = "m"\n'
        + keys.get(how, f'prefill = "{how}"')
        + f"\n{more}"
    )


def seen(watch: Watch) -> str:
    """All that it was ever shown of the reply."""
    return "".join(e["data"] for e in watch.chunks() if e["stream"] == "text")


def count_resets(watch: Watch) -> int:
    return [e["type"] for e in list(watch.events)].count("reset")


def submit(box: Box, *more: str) -> str:
    return box.runctl("submit", "t", "--runner", "c", *more, "tell me").strip()


def begin(box: Box, endpoint: Endpoint, how: str, more: str = "") -> tuple[str, Watch]:
    box.configure(runner(endpoint, how, more))
    box.start()
    run = submit(box)
    return run, Watch(box, "--run", run, "t")


def wait_stored(watch: Watch, endpoint: Endpoint, upto: int) -> None:
    """All of what the endpoint may generate is generated, stored, and shown."""
    endpoint.allow(upto)
    text = "".join(endpoint.reply[:upto])
    wait_until(lambda: valid(watch) == text, f"{upto} tokens are shown")


@pytest.mark.long
@pytest.mark.parametrize("how", ["vllm", "background"])
def test_kills_behind_what_is_stored(stopped_box: Box, endpoint: Endpoint, how: str) -> None:
    """Of daemon and keeper; at each, all that was generated is stored."""
    rng, kills = random.Random(how), 20 if NIGHT else 6
    endpoint.allow(0)
    run, early = begin(stopped_box, endpoint, how)
    watches = [early]
    at = 0
    for kill in range(kills):
        at += rng.randrange(1, 9)
        wait_stored(early, endpoint, at)
        time.sleep(rng.random() * 0.05)
        stopped_box.kill_all()
        stopped_box.start()
        if kill % 5 == 0:
            watches.append(Watch(stopped_box, "--run", run, "t"))
    endpoint.allow(len(REPLY))
    assert early.wait() == 0
    watches.append(Watch(stopped_box, "--run", run, "t"))
    for watch in watches:
        assert watch.wait() == 0
        assert valid(watch) == seen(watch) == "".join(REPLY)
        assert count_resets(watch) == 1
    assert endpoint.generated == REPLY
    assert stopped_box.ended(run)["attempt"] == kills + 1
    if how == "background":
        assert len(endpoint.generations) == 1
        assert not endpoint.cancelled


@pytest.mark.long
@pytest.mark.parametrize(
    "how", [pytest.param("llama.cpp", marks=pytest.mark.nightly), "background"]
)
def test_kills_amid_the_stream(stopped_box: Box, endpoint: Endpoint, how: str) -> None:
    rng, kills, whole = random.Random(how), 5, "".join(REPLY)
    endpoint.pause = 0.05
    endpoint.allow(2 * len(REPLY))
    run, early = begin(stopped_box, endpoint, how)
    for _ in range(kills):
        before = seen(early)
        wait_until(lambda before=before: seen(early) not in (before, "") or whole in before, "more")
        if seen(early) == whole:
            break
        time.sleep(rng.random() * 0.1)
        stopped_box.kill_all()
        stopped_box.start()
    assert early.wait() == 0
    late = Watch(stopped_box, "--run", run, "t")
    assert late.wait() == 0
    assert valid(early) == seen(early) == valid(late) == whole
    if how == "background":
        assert (len(endpoint.generations), endpoint.generated) == (1, REPLY)
    else:  # what was under way when it was killed
        assert len(endpoint.generated) <= len(REPLY) + 3 * kills


@pytest.mark.parametrize("how", ["mistral", "background"])
def test_another_executor_goes_on(house: House, endpoint: Endpoint, how: str) -> None:
    endpoint.allow(0)
    a = house.box("a", runner(endpoint, how) + TAKEOVER)
    run = submit(a)
    b = house.box("b", runner(endpoint, how) + TAKEOVER)
    watch = Watch(b, "--run", run, "t")
    wait_until(lambda: house.bus.run(run).executor, "it is claimed")
    owner, other = (a, b) if house.bus.run(run).executor == "a" else (b, a)
    wait_stored(watch, endpoint, 17)
    owner.kill_all()
    wait_until(lambda: house.bus.run(run).executor == other.name, "it is taken over")
    endpoint.allow(len(REPLY))
    late = Watch(other, "--run", run, "t")
    assert (late.wait(), valid(late)) == (0, "".join(REPLY))
    if owner is a:
        assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert endpoint.generated == REPLY


# ---- prefill -------------------------------------------------------------------------------------


def interrupted(box: Box, endpoint: Endpoint, how: str, upto: int, more: str = "") -> Watch:
    """A run whose daemon was killed when so many tokens were stored; the next one is there, and
    nothing more is generated yet."""
    endpoint.allow(0)
    _, watch = begin(box, endpoint, how, more)
    if upto:
        wait_stored(watch, endpoint, upto)
    else:
        wait_until(lambda: endpoint.requests, "it is asked")
    box.kill()
    return watch


@pytest.mark.parametrize("repeats", [False, True], ids=["", "repeats"])
@pytest.mark.parametrize("style", STYLES)
def test_what_is_asked_in_each_style(
    stopped_box: Box, endpoint: Endpoint, style: str, repeats: bool
) -> None:
    endpoint.repeats = repeats
    watch = interrupted(stopped_box, endpoint, style, 12)
    stopped_box.start()
    endpoint.allow(len(REPLY))
    assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert endpoint.generated == REPLY
    method, path, asked = endpoint.requests[-1]
    assert (method, path, len(endpoint.requests)) == ("POST", "/v1/chat/completions", 2)
    last = {"role": "assistant", "content": "".join(REPLY[:12])}
    if style in ("mistral", "deepseek"):
        last["prefix"] = True  # type: ignore[assignment]
    assert asked.pop("messages") == [{"role": "user", "content": "tell me"}, last]
    beside = {"add_generation_prompt": False, "continue_final_message": True, "echo": False}
    assert asked == {"model": "m", "stream": True, **(beside if style == "vllm" else {})}


def test_the_next_turn_has_the_whole_reply(stopped_box: Box, endpoint: Endpoint) -> None:
    watch = interrupted(stopped_box, endpoint, "vllm", 12)
    stopped_box.start()
    endpoint.allow(2 * len(REPLY))
    assert watch.wait() == 0
    stopped_box.runctl("wait", submit(stopped_box))
    asked = endpoint.requests[-1][2]["messages"]
    assert asked[1] == {"role": "assistant", "content": "".join(REPLY)}
    assert asked[2] == {"role": "user", "content": "tell me"}


def test_a_reply_of_which_nothing_is_stored_is_asked_for_anew(
    stopped_box: Box, endpoint: Endpoint
) -> None:
    endpoint.reasons = "let me think"
    watch = interrupted(stopped_box, endpoint, "vllm", 0)
    stopped_box.start()
    endpoint.allow(len(REPLY))
    assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert "continue_final_message" not in endpoint.requests[-1][2]
    assert count_resets(watch) in (1, 2)  # it may have come after the first


def test_a_reply_that_was_whole_already(stopped_box: Box, endpoint: Endpoint) -> None:
    """The daemon dies behind the last token and before the end, of which it hears late."""
    endpoint.reasons = "let me think"
    endpoint.reply = [*REPLY[:12], "!"]
    watch = interrupted(stopped_box, endpoint, "vllm", 12)
    endpoint.reply = REPLY[:12]
    stopped_box.start()
    assert watch.wait() == 0
    assert valid(watch) == seen(watch) == "".join(REPLY[:12])
    assert endpoint.generated == REPLY[:12]
    end = watch.events[-1]
    assert (end["status"], end.get("note")) == ("succeeded", None)


def test_an_endpoint_that_does_not_go_on_is_asked_anew(
    stopped_box: Box, endpoint: Endpoint
) -> None:
    endpoint.refuses = 400, b'{"error": {"message": "prefill is incompatible with thinking"}}'
    watch = interrupted(stopped_box, endpoint, "llama.cpp", 12)
    stopped_box.start()
    wait_until(lambda: len(endpoint.requests) == 3, "it is asked anew")
    assert seen(watch) == "".join(REPLY[:12])
    assert count_resets(watch) == 1, "what was shown stays until there is something else"
    endpoint.allow(12 + len(REPLY))
    assert (watch.wait(), valid(watch)) == (0, "".join(REPLY))
    assert count_resets(watch) == 2
    assert "did not go on where it was interrupted" in watch.events[-1]["note"]
    assert "incompatible with thinking" in watch.events[-1]["note"]


def test_a_stream_that_breaks_goes_on(stopped_box: Box, endpoint: Endpoint) -> None:
    endpoint.cut_after = 9
    run, watch = begin(stopped_box, endpoint, "deepseek")
    assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert (endpoint.generated, stopped_box.ended(run)["attempt"]) == (REPLY, 1)


@pytest.mark.parametrize("policy", ["restart", "fail"])
def test_other_policies(stopped_box: Box, endpoint: Endpoint, policy: str) -> None:
    watch = interrupted(stopped_box, endpoint, "vllm", 12, more=f'on_interrupt = "{policy}"\n')
    stopped_box.start()
    endpoint.allow(12 + len(REPLY))
    if policy == "restart":
        assert (watch.wait(), valid(watch)) == (0, "".join(REPLY))
        assert count_resets(watch) == 2
        return
    assert (watch.wait(), valid(watch)) == (1, "".join(REPLY[:12]))
    assert "interrupted; not run again (on_interrupt)" in watch.events[-1]["error"]
    assert len(endpoint.requests) == 1


def test_attempts_without_progress_are_counted(stopped_box: Box, endpoint: Endpoint) -> None:
    endpoint.allow(0)
    run, watch = begin(stopped_box, endpoint, "vllm", "[queue]\nmax_attempts = 2\n")
    wait_stored(watch, endpoint, 3)
    for n in range(3):
        wait_until(lambda n=n: len(endpoint.requests) == n + 1, "it is asked")
        stopped_box.kill()
        stopped_box.start()
    assert watch.wait() == 1
    shown = stopped_box.ended(run)
    assert (shown["status"], shown["attempt"]) == ("dead", 4)
    why = "its daemon died in 2 attempts without more of its reply; not tried again"
    assert shown["error"] == why


# ---- responses -----------------------------------------------------------------------------------


def test_a_response_is_asked_for_again_behind_what_is_stored(
    stopped_box: Box, endpoint: Endpoint
) -> None:
    watch = interrupted(stopped_box, endpoint, "background", 12)
    asked = endpoint.requests[0][2]
    said = [{"role": "user", "content": "tell me"}]
    assert asked == {
        **{"model": "m", "stream": True, "input": said, "background": True, "store": True}
    }
    endpoint.allow(len(REPLY))  # it goes on while nobody listens
    wait_until(lambda: endpoint.generations[0].status == "completed", "it has ended")
    stopped_box.start()
    assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert (len(endpoint.generations), endpoint.generated) == (1, REPLY)
    method, path, _ = endpoint.requests[1]
    # created, in_progress, twelve tokens
    assert (method, path) == ("GET", "/v1/responses/resp_1?stream=true&starting_after=13")
    endpoint.allow(2 * len(REPLY))
    stopped_box.runctl("wait", submit(stopped_box))
    assert endpoint.requests[-1][2]["input"] == [
        *said,
        {"role": "assistant", "content": "".join(REPLY)},
        *said,
    ]


def test_a_response_that_is_gone_is_made_anew(stopped_box: Box, endpoint: Endpoint) -> None:
    watch = interrupted(stopped_box, endpoint, "background", 12)
    endpoint.generations[0].name = "gone"
    stopped_box.start()
    wait_until(lambda: len(endpoint.generations) == 2, "another is made")
    endpoint.allow(len(REPLY) * 2)
    assert (watch.wait(), valid(watch)) == (0, "".join(REPLY))
    assert count_resets(watch) == 2
    assert "Response not found" in watch.events[-1]["note"]


def test_the_window_before_its_name_is_known(stopped_box: Box, endpoint: Endpoint) -> None:
    """The one that costs a second generation."""
    endpoint.allow(0)
    endpoint.named.clear()
    _, watch = begin(stopped_box, endpoint, "background")
    wait_until(lambda: endpoint.generations, "it is made")
    stopped_box.kill()
    endpoint.named.set()
    stopped_box.start()
    wait_until(lambda: len(endpoint.generations) == 2, "another is made")
    endpoint.allow(2 * len(REPLY))
    assert (watch.wait(), valid(watch)) == (0, "".join(REPLY))


def test_a_response_whose_name_is_stored_before_its_text(
    stopped_box: Box, endpoint: Endpoint
) -> None:
    endpoint.allow(0)
    run, watch = begin(stopped_box, endpoint, "background")
    bus = Bus(stopped_box.state)
    try:
        wait_until(lambda: isinstance(bus.tail("t", run), Chunks), "its name is stored")
    finally:
        bus.close()
    stopped_box.kill()
    endpoint.allow(len(REPLY))
    stopped_box.start()
    assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert (len(endpoint.generations), endpoint.generated) == (1, REPLY)


@pytest.mark.parametrize("how", ["vllm", "background"])
def test_a_reply_that_has_lost_its_beginning(
    stopped_box: Box, endpoint: Endpoint, how: str
) -> None:
    endpoint.allow(0)
    run, watch = begin(stopped_box, endpoint, how)
    wait_stored(watch, endpoint, 12)
    stopped_box.runctl("purge", "t", "--force", "--yes")
    wait_stored(watch, endpoint, 17)
    stopped_box.kill()
    stopped_box.start()
    endpoint.allow(3 * len(REPLY))
    stopped_box.runctl("wait", run)
    late = Watch(stopped_box, "--run", run, "t")
    assert (late.wait(), valid(late)) == (0, "".join(REPLY))
    if how == "background":  # which the endpoint still has
        assert (len(endpoint.generations), endpoint.generated) == (1, REPLY)


def test_a_stream_of_events_that_breaks_goes_on(stopped_box: Box, endpoint: Endpoint) -> None:
    endpoint.cut_after = 9
    endpoint.reasons = "let me think"
    run, watch = begin(stopped_box, endpoint, "background")
    assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert (len(endpoint.generations), endpoint.generated) == (1, REPLY)
    assert stopped_box.ended(run)["attempt"] == 1


def test_an_abort_cancels_the_response(stopped_box: Box, endpoint: Endpoint) -> None:
    box = stopped_box
    endpoint.allow(0)
    run, watch = begin(box, endpoint, "background")
    wait_stored(watch, endpoint, 5)
    box.runctl("abort", "t")
    assert watch.wait() == 5
    assert endpoint.cancelled == ["resp_1"]
    assert box.ended(run)["status"] == "aborted"


@pytest.mark.nightly
def test_an_abort_when_no_attempt_runs_cancels_the_response(
    house: House, endpoint: Endpoint
) -> None:
    """Its executor is dead; another one makes the abort durable."""
    endpoint.allow(0)
    boxes = [house.box(name, runner(endpoint, "background")) for name in ("a", "b")]
    run = submit(boxes[0])
    watch = Watch(boxes[1], "--run", run, "t")
    wait_stored(watch, endpoint, 5)
    owner, other = sorted(boxes, key=lambda box: box.name != house.bus.run(run).executor)
    owner.kill_all()
    other.runctl("abort", "t")
    assert endpoint.cancelled == ["resp_1"]
    assert house.bus.run(run).status.value == "aborted"


def test_a_stop_of_the_daemon_cancels_nothing(stopped_box: Box, endpoint: Endpoint) -> None:
    endpoint.allow(0)
    _, watch = begin(stopped_box, endpoint, "background")
    wait_stored(watch, endpoint, 5)
    assert stopped_box.term() == 0
    stopped_box.start()
    endpoint.allow(len(REPLY))
    assert (watch.wait(), seen(watch)) == (0, "".join(REPLY))
    assert (endpoint.cancelled, len(endpoint.generations)) == ([], 1)


@pytest.mark.parametrize(
    "how", ["background", pytest.param("responses", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    ("status", "more", "ended", "said"),
    [
        ("completed", {}, "succeeded", None),
        (
            *("incomplete", {"incomplete_details": {"reason": "max_output_tokens"}}, "succeeded"),
            "the reply was cut at a length limit (finish_reason max_output_tokens)",
        ),
        (
            *("incomplete", {"incomplete_details": {"reason": "content_filter"}}, "failed"),
            "the endpoint ended the reply: content_filter",
        ),
        (
            *("failed", {"error": {"code": "server_error", "message": "it broke"}}, "failed"),
            "the endpoint reported an error: it broke",
        ),
        ("cancelled", {}, "failed", "the endpoint ended the reply: cancelled"),
    ],
    ids=["completed", "limit", "filter", "failed", "cancelled"],
)
def test_how_responses_end(
    stopped_box: Box,
    endpoint: Endpoint,
    how: str,
    status: str,
    more: Any,
    ended: str,
    said: str | None,
) -> None:
    endpoint.allow(0)
    _, watch = begin(stopped_box, endpoint, how)
    wait_until(lambda: endpoint.generations, "it is made")
    endpoint.generations[0].end = status, more
    endpoint.allow(len(REPLY))
    assert watch.wait() == (0 if ended == "succeeded" else 1)
    assert seen(watch) == "".join(REPLY)
    end = watch.events[-1]
    found = end.get("note") or end.get("error") or ""
    assert end["status"] == ended
    assert found.endswith(said) if said else not found
    assert (len(endpoint.requests), endpoint.cancelled) == (1, [])


def test_responses_without_background_start_over(stopped_box: Box, endpoint: Endpoint) -> None:
    watch = interrupted(stopped_box, endpoint, "responses", 12)
    assert "background" not in endpoint.requests[0][2]
    stopped_box.start()
    endpoint.allow(12 + 2 * len(REPLY))
    assert (watch.wait(), valid(watch)) == (0, "".join(REPLY))
    assert count_resets(watch) == 2
