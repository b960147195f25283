"""Agents with sessions: an interruption repeats no tool call, and no task is lost."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Box, Watch, wait_until
from house import House
from runctl.config.load import load
from runctl.config.prompts import thread_refusal
from runctl.config.schema import CommandRunner
from runctl.protocol.errors import ConfigError
from runctl.supervisor.execution.runners.agent_session import fill, find_name
from test_checkpoints import valid

AGENT = str(Path(__file__).with_name("fake_agent.py"))


#: Of the fake agent: an attempt takes a second or so.
PACE = 'env = { PAUSE = "0.1" }\n'


def runner(path: Path, kind: str, more: str = "") -> str:
    begin = f'"{sys.executable}", "{AGENT}", "{path}", "{kind}"'
    first = f'{begin}, "--session", "{{session}}"' if kind == "uuid" else begin
    source = '"uuid"' if kind == "uuid" else '{ json = "thread.id" }'
    return (
        '[runners.agent]\nkind = "command"\n'
        f'argv = [{first}, "--prompt={{prompt}}"]\n'
        f'next_argv = [{begin}, "--resume", "{{session}}", "--prompt={{prompt}}"]\n'
        f"session = {source}\n"
        'session_missing = "No conversation found"\n' + more
    )


def count(path: Path, name: str) -> int:
    file = path / name
    return len(file.read_text().splitlines()) if file.exists() else 0


def told(path: Path) -> list[str]:
    return [
        json.loads(x).removeprefix("--prompt=")
        for x in (path / "told").read_text().split("\n")
        if x
    ]


def events(text: str) -> list[dict[str, Any]]:
    """Each line whole."""
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def wait_until_half(path: Path, times: int = 1) -> None:
    wait_until(lambda: count(path, "half") == times, "half of the answer is there")


@pytest.fixture
def agent(stopped_box: Box, tmp_path: Path, request: pytest.FixtureRequest) -> Box:
    stopped_box.configure(runner(tmp_path, request.param))
    stopped_box.start()
    return stopped_box


def submit(box: Box, prompt: str, *more: str) -> str:
    return box.runctl("submit", "t", "--runner", "agent", *more, prompt).strip()


both = pytest.mark.parametrize("agent", ["uuid", "json"], indirect=True)


@both
def test_a_kill_in_the_answer_repeats_no_tool(agent: Box, tmp_path: Path) -> None:
    box = agent
    (tmp_path / "hold").touch()
    run = submit(box, "do it")
    early = Watch(box, "--run", run, "t")
    for times in (1, 2):
        wait_until_half(tmp_path, times)
        box.kill()
        if times == 2:
            (tmp_path / "hold").unlink()
        box.start()
    assert early.wait() == 0
    late = Watch(box, "--run", run, "t")
    assert late.wait() == 0
    assert (count(tmp_path, "effects"), count(tmp_path, "generations")) == (1, 4)
    kept = events(valid(early))
    assert kept == events(valid(late))
    assert [x["type"] for x in kept].count("tool") == 1, "done, and still seen"
    assert [x["type"] for x in kept].count("done") == 1
    assert [x["text"] for x in kept if x["type"] == "delta"][-12:] == [
        f"4.{n}" for n in range(1, 13)
    ]
    assert [e["type"] for e in early.events].count("reset") == 1
    assert told(tmp_path)[0] == "do it"
    assert all(
        x.startswith("You were interrupted.") and x.endswith("do it") for x in told(tmp_path)[1:]
    )
    assert box.show(run)["session"] == box.runctl("session", "show", "t").split()[-1]


def kill_at_random(boxes: Sequence[Box], path: Path, run: str, kills: int) -> list[Watch]:
    """The daemon that has ``run`` is killed ``kills`` times, alone or with all that it started;
    a lone box begins again at once, of several the next takes over. Watchers: from the first
    moment, from each kill on, and a late one, all of which have ended."""
    rng = random.Random(len(boxes))
    watches = [Watch(boxes[0], "--run", run, "t")]

    def goes_on(attempt: int) -> bool:
        return count(path, "told") >= attempt or watches[0].process.poll() is not None

    # Until the session's name is stored a death costs all that was done.
    wait_until(lambda: boxes[0].show(run)["session"], "its session is known")
    for number in range(kills):
        wait_until(lambda number=number: goes_on(number + 1), "an attempt begins")
        box, other = boxes[number % len(boxes)], boxes[(number + 1) % len(boxes)]
        time.sleep(rng.random())
        rng.choice([box.kill, box.kill_all])()
        if other is not box:
            wait_until(lambda number=number: goes_on(number + 2), "another takes it over")
        box.start()
        watches.append(Watch(other, "--run", run, "t"))
    assert watches[0].wait() == 0
    watches.append(Watch(boxes[0], "--run", run, "t"))
    assert [watch.wait() for watch in watches] == [0] * len(watches)
    return watches


def assert_paid_once(path: Path, watches: Sequence[Watch], kills: int) -> None:
    """Each kill costs one generation at most, and no tool call; every watcher has the same."""
    assert count(path, "effects") == 1
    assert 2 <= count(path, "generations") <= 2 + kills
    kept = events(valid(watches[0]))
    assert all(events(valid(watch)) == kept for watch in watches)
    assert [x["type"] for x in kept].count("tool") <= 1, "its line may be lost; its effect is not"
    assert [x["type"] for x in kept].count("done") == 1
    answer = [x["text"].partition(".") for x in kept if x["type"] == "delta"][-12:]
    assert [number for _, _, number in answer] == [str(n) for n in range(1, 13)]
    assert len({turn for turn, _, _ in answer}) == 1, "all of one generation"


kinds = pytest.mark.parametrize("kind", ["uuid", "json"])


@kinds
def test_kills_at_any_moment(stopped_box: Box, tmp_path: Path, kind: str) -> None:
    box = stopped_box
    box.configure(runner(tmp_path, kind, PACE))
    box.start()
    run = submit(box, "do it")
    assert_paid_once(tmp_path, kill_at_random([box], tmp_path, run, 4), 4)


@kinds
def test_takeovers_at_any_moment(house: House, tmp_path: Path, kind: str) -> None:
    more = runner(tmp_path, kind, f'{PACE}[takeover]\nenabled = true\nafter = "2s"\n')
    a = house.box("a", more)
    run = submit(a, "do it")
    boxes = [a, house.box("b", more)]
    assert_paid_once(tmp_path, kill_at_random(boxes, tmp_path, run, 3), 3)


@both
def test_later_runs_of_the_thread_go_on(agent: Box, tmp_path: Path) -> None:
    box = agent
    for prompt in ("one", "two"):
        box.runctl("wait", submit(box, prompt))
    assert (told(tmp_path), count(tmp_path, "effects")) == (["one", "two"], 1)
    assert len(list(tmp_path.glob("*.session"))) == 1
    found = json.loads(box.runctl("session", "show", "t", "--json"))
    assert [x["runner"] for x in found] == ["agent"]
    box.runctl("session", "forget", "t")
    box.runctl("session", "show", "t")
    assert "thread t has no session" in box.stderr
    box.runctl("wait", submit(box, "three"))
    assert len(list(tmp_path.glob("*.session"))) == 2
    assert count(tmp_path, "effects") == 2


@both
def test_a_turn_that_was_aborted_leaves_a_session(agent: Box, tmp_path: Path) -> None:
    box = agent
    (tmp_path / "hold").touch()
    run = submit(box, "one")
    wait_until_half(tmp_path)
    box.runctl("abort", "t", "--run", run)
    (tmp_path / "hold").unlink()
    box.runctl("wait", submit(box, "two"))
    assert (told(tmp_path), count(tmp_path, "effects")) == (["one", "two"], 1)


@both
def test_a_session_that_is_gone_is_begun_again(agent: Box, tmp_path: Path) -> None:
    """As on another machine, or when the agent has cleaned up: with the task, not without."""
    box = agent
    (tmp_path / "hold").touch()
    run = submit(box, "one")
    watch = Watch(box, "--run", run, "t")
    wait_until_half(tmp_path)
    box.kill()
    (tmp_path / "hold").unlink()
    for file in tmp_path.glob("*.session"):
        file.unlink()
    box.start()
    assert watch.wait() == 0
    assert told(tmp_path) == ["one", "one"]
    found = box.show(run)
    assert (found["status"], found["attempt"]) == ("succeeded", 2)
    assert found["session"] == next(iter(tmp_path.glob("*.session"))).stem
    stderr = [e["data"] for e in watch.chunks() if e["stream"] == "stderr"]
    assert "No conversation found" in "".join(stderr)


def test_killed_before_the_session_has_a_name(stopped_box: Box, tmp_path: Path) -> None:
    """It starts over, with the first prompt."""
    box, hold = stopped_box, tmp_path / "hold"
    wait = f"while [ -e {hold} ]; do sleep 0.02; done; exec"
    text = runner(tmp_path, "json").replace(
        f'argv = ["{sys.executable}", "{AGENT}"',
        f'argv = ["sh", "-c", \'{wait} "$@"\', "sh", "{sys.executable}", "{AGENT}"',
        1,
    )
    hold.touch()
    box.configure(text)
    box.start()
    run = submit(box, "one")
    wait_until(lambda: box.show(run)["status"] == "running", "it runs")
    box.kill()
    hold.unlink()
    box.start()
    box.runctl("wait", run)
    assert told(tmp_path) == ["one"]


def test_a_prompt_that_is_long_goes_to_stdin(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure(runner(tmp_path, "json").replace(', "--prompt={prompt}"', ""))
    box.start()
    prompt = "x" * 200_000
    (tmp_path / "hold").touch()
    run = box.runctl("submit", "t", "--runner", "agent", "-", input=prompt.encode()).strip()
    wait_until_half(tmp_path)
    box.kill()
    (tmp_path / "hold").unlink()
    box.start()
    box.runctl("wait", run)
    assert told(tmp_path)[0] == prompt
    assert told(tmp_path)[1].startswith("You were interrupted.")
    assert told(tmp_path)[1].endswith(prompt)


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_another_machine(house: House, tmp_path: Path, shared: bool) -> None:
    """Sessions are where the agent keeps them: on shared storage it goes on, elsewhere the same
    attempt begins anew with the whole task."""
    boxes = []
    for name in ("a", "b"):
        sessions = tmp_path if shared else tmp_path / name
        sessions.mkdir(exist_ok=True)
        more = f'env = {{ SESSIONS = "{sessions}" }}\n[takeover]\nenabled = true\nafter = "2s"\n'
        boxes.append(house.box(name, runner(tmp_path, "uuid", more), start=False))
    a, b = boxes
    a.start()
    (tmp_path / "hold").touch()
    run = submit(a, "one")
    watch = Watch(a, "--run", run, "t")
    wait_until_half(tmp_path)
    b.start()
    a.kill()
    (tmp_path / "hold").unlink()
    assert watch.wait() == 0
    assert [x["type"] for x in events(valid(watch))].count("done") == 1
    assert count(tmp_path, "effects") == (1 if shared else 2)
    assert house.bus.run(run).executor == "b"
    assert told(tmp_path)[1].startswith("You were interrupted.") is shared
    assert told(tmp_path)[1].endswith("one")


def test_each_thread_has_a_directory_of_its_own(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure(
        '[runners.own]\nkind = "command"\n'
        'argv = ["sh", "-c", \'pwd; echo "$A $1 $2"\', "--", "{thread}", "{run}"]\n'
        f'cwd = "{tmp_path}/work/{{thread}}"\nenv = {{ A = "a-{{thread}}-{{run}}" }}\n'
    )
    box.start()
    for thread in ("plain", "../../up {run}"):
        run = box.runctl("submit", thread, "--runner", "own").strip()
        watch = Watch(box, "--run", run, thread)
        assert watch.wait() == 0
        directory, words = watch.text().splitlines()
        name = "plain" if thread == "plain" else "x_Li4vLi4vdXAge3J1bn0"
        assert directory == f"{tmp_path}/work/{name}"
        assert words == f"a-{name}-{run} {thread} {run}"
    box.runctl("submit", "--runner", "own", "--", "-dash", code=0)


# ---- parts -------------------------------------------------------------------------------------


def test_what_was_filled_in_is_not_filled_again() -> None:
    values = {"{prompt}": "{session} {run}", "{session}": "s", "{run}": "{prompt}"}
    assert fill("a{prompt}b{session}{run}{thread}", values) == "a{session} {run}bs{prompt}{thread}"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b'{"a": {"b": "x"}}', "x"),
        (b'  {"a": {"b": "x"}, "c": 1}\r', "x"),
        (b'{"a": {"b": 7}}', None),
        (b'{"a": "b"}', None),
        (b"[1]", None),
        (b"{", None),
        (b"", None),
        (b"a.b", None),
        (b'{"a":' * 2000, None),
    ],
)
def test_where_a_session_has_its_name(line: bytes, name: str | None) -> None:
    assert find_name(line, ["a", "b"]) == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('argv = ["a", "{session}"]', "runners.x.argv: holds {session}: say where it comes from"),
        ('session = "uuid"', "runners.x.session: needs an argv"),
        (
            'argv = ["a"]\nsession = "name"',
            'runners.x.session: expected "uuid", or { json = "KEY" }',
        ),
        ('argv = ["a"]\nsession = { json = "" }', "runners.x.session: expected"),
        ('argv = ["a"]\nsession = { file = "x" }', "runners.x.session: expected"),
        ('next_argv = ["a"]', "runners.x.next_argv: needs an argv"),
        ('argv = ["a"]\nnext_argv = ["a"]', "runners.x.next_argv: there is no session"),
        ('argv = ["a"]\nsession_missing = "x"', "runners.x.session_missing: there is no session"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n[runners.x]\nkind = "command"\n{text}\n')
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert said in str(caught.value)


def test_a_thread_that_would_be_an_option() -> None:
    config = CommandRunner("x", argv=("a", "{thread}"))
    assert "choose another name" in str(thread_refusal(config, "-rf"))
    assert thread_refusal(config, "rf") is None
    for argv in (("a", "--", "{thread}"), ("a", "--name={thread}"), ("a",)):
        assert thread_refusal(CommandRunner("x", argv=argv), "-rf") is None
