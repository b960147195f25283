"""Agents that speak ACP: an interruption repeats no tool call, and watchers get the exact text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Box, Watch, wait_until
from house import House
from runctl.client.acp.agent import read_message
from runctl.client.acp.display import clean_title
from runctl.client.acp.permissions import Policy
from runctl.client.acp.permissions import answer as answer_permission
from runctl.client.acp.session import Refused
from runctl.config.describe import describe
from runctl.config.load import load
from runctl.config.prompts import refusal
from runctl.config.schema import AcpRunner
from runctl.protocol.errors import ConfigError
from test_checkpoints import valid

AGENT = str(Path(__file__).with_name("fake_acp.py"))
#: What the first generation shows, and then the whole of an answer behind so many entries.
TOOL = "I call the tool.\n[tool] write a line — started\n[tool] write a line — completed\n"


def answer(entries: int) -> str:
    return "".join(f"{entries}.{n} " for n in range(1, 13)) + "\n"


def runner(path: Path, *options: str, more: str = "") -> str:
    argv = json.dumps([sys.executable, AGENT, str(path), *options])
    return f'[runners.agent]\nkind = "acp"\nargv = {argv}\n{more}'


def lines(path: Path, name: str) -> list[str]:
    file = path / name
    return file.read_text().splitlines() if file.exists() else []


def told(path: Path) -> list[str]:
    return [json.loads(x) for x in lines(path, "told")]


def counts(path: Path) -> tuple[int, int]:
    """Generations and effects."""
    return len(lines(path, "generations")), len(lines(path, "effects"))


def submit(box: Box, prompt: str = "do it", thread: str = "t") -> str:
    return box.runctl("submit", thread, "--runner", "agent", prompt).strip()


def wait_for(path: Path, name: str, times: int = 1) -> None:
    wait_until(lambda: len(lines(path, name)) >= times, f"{times} of {name}")


def stderr(watch: Watch) -> str:
    return "".join(e["data"] for e in watch.chunks() if e["stream"] == "stderr")


Start = Callable[..., Box]


@pytest.fixture
def start(stopped_box: Box, tmp_path: Path) -> Start:
    """A daemon with the agent, which has these options."""

    def begin(*options: str, more: str = "", outlive: bool = False) -> Box:
        more += '[queue]\noutlive = "30s"\n' if outlive else ""
        stopped_box.configure(runner(tmp_path, *options, more=more))
        stopped_box.start()
        return stopped_box

    return begin


def test_a_turn(start: Start, tmp_path: Path) -> None:
    box = start("load")
    run = submit(box)
    watch = Watch(box, "--run", run, "t")
    assert watch.wait() == 0
    assert valid(watch) == TOOL + answer(2)
    assert stderr(watch) == "hm\n"
    assert len([x for x in watch.chunks() if x["stream"] == "stdout"]) > 5, "in pieces"
    assert (told(tmp_path), counts(tmp_path)) == (["do it"], (2, 1))
    (session,) = tmp_path.glob("*.session")
    assert box.runctl("session", "show", "t").split()[-1] == session.stem
    (attempt,) = box.show(run)["attempts"]
    assert attempt["usage"] == {"input": 20, "output": 4}
    given, own = lines(tmp_path, "where")[0].split()
    assert given == own == os.path.expanduser("~")


#: How the agent goes on, and which requests show that.
WAYS = {
    ("load",): ["initialize", "session/load", "session/prompt"],
    ("resume",): ["initialize", "session/resume", "session/prompt"],
    ("resume", "load"): ["initialize", "session/resume", "session/prompt"],
    ("resume-missing", "load"): [
        *("initialize", "session/resume", "session/load", "session/prompt"),
    ],
    ("load", "stays"): ["initialize", "session/load", "session/prompt"],
    ("load", "late"): ["initialize", "session/load", "session/prompt"],
}


#: Those that differ the most are killed by day as well.
OFTEN = ("resume",), ("load", "stays")


@pytest.mark.parametrize(
    "options",
    [x if x in OFTEN else pytest.param(x, marks=pytest.mark.nightly) for x in WAYS],
    ids=lambda way: "+".join(way),
)
def test_kills_in_the_answer(start: Start, tmp_path: Path, options: tuple[str, ...]) -> None:
    box = start(*options)
    (tmp_path / "hold").touch()
    run = submit(box)
    watches = [Watch(box, "--run", run, "t")]
    for times in (1, 2):
        wait_for(tmp_path, "half", times)
        box.kill()
        box.start()
        if times == 2:
            (tmp_path / "hold").unlink()
        watches.append(Watch(box, "--run", run, "t"))
    for watch in watches:
        assert watch.wait() == 0
    watches.append(Watch(box, "--run", run, "t"))
    assert watches[-1].wait() == 0
    # The history has the tool and three prompts by then.
    assert [valid(watch) for watch in watches] == [TOOL + answer(4)] * 4
    assert counts(tmp_path) == (4, 1)
    assert [e["type"] for e in watches[0].events].count("continue") == 2
    assert told(tmp_path)[0] == "do it"
    for prompt in told(tmp_path)[1:]:
        assert prompt.startswith("You were interrupted.")
        assert prompt.endswith("do it")
    assert lines(tmp_path, "asked")[3:] == WAYS[options] * 2


def test_a_call_whose_end_is_told_too_late(start: Start, tmp_path: Path) -> None:
    """Its line stands where it was told; what came before it is void, with what was shown since
    the checkpoint before."""
    box = start("load", "lags")
    for name in ("hold", "hold-end"):
        (tmp_path / name).touch()
    run = submit(box)
    early = Watch(box, "--run", run, "t")
    wait_for(tmp_path, "half")
    wait_until(lambda: "2.6 " in early.text(), "the answer is not held for long")
    assert "completed" not in early.text()
    (tmp_path / "hold").unlink()
    wait_until(lambda: "completed" in early.text(), "the call is over")
    box.kill()
    box.start()
    (tmp_path / "hold-end").unlink()
    assert early.wait() == 0
    assert valid(early) == answer(3)
    assert counts(tmp_path) == (3, 1)


@pytest.mark.parametrize(("drops", "effects"), [(False, 1), (True, 2)])
def test_a_kill_in_the_tool(start: Start, tmp_path: Path, drops: bool, effects: int) -> None:
    """A call that the agent forgets is made again; nothing can be done about that from here."""
    box = start("load", *(["drops"] if drops else []))
    (tmp_path / "hold-tool").touch()
    run = submit(box)
    early = Watch(box, "--run", run, "t")
    wait_for(tmp_path, "effects")
    wait_until(lambda: "started" in early.text(), "the call is shown")
    box.kill()
    box.start()  # nothing of the attempt before is alive by then
    (tmp_path / "hold-tool").unlink()
    late = Watch(box, "--run", run, "t")
    assert early.wait() == late.wait() == 0
    assert valid(early) == valid(late) == (TOOL if drops else "") + answer(3)
    assert counts(tmp_path) == (3 if drops else 2, effects)
    assert told(tmp_path)[1].startswith("You were interrupted.")


def test_a_kill_of_the_daemon_alone_costs_nothing(start: Start, tmp_path: Path) -> None:
    box = start("load", outlive=True)
    (tmp_path / "hold").touch()
    run = submit(box)
    early = Watch(box, "--run", run, "t")
    for _ in range(2):
        wait_for(tmp_path, "half")
        box.kill()
        box.start()
    (tmp_path / "hold").unlink()
    assert early.wait() == 0
    late = Watch(box, "--run", run, "t")
    assert late.wait() == 0
    assert valid(early) == valid(late) == TOOL + answer(2)
    assert (counts(tmp_path), told(tmp_path)) == ((2, 1), ["do it"])
    assert box.show(run)["attempt"] == 1
    assert [e["type"] for e in early.events].count("reset") == 1


def test_killed_when_the_turn_was_over(start: Start, tmp_path: Path) -> None:
    """Its end was stored: nothing is asked for again, and the answer stays."""
    box = start("load", "stays")
    run = submit(box)
    watch = Watch(box, "--run", run, "t")
    wait_for(tmp_path, "closed")  # the agent that stays holds up the run's end
    box.kill()
    box.start()
    assert watch.wait() == 0
    assert valid(watch) == TOOL + answer(2)
    assert (counts(tmp_path), told(tmp_path)) == ((2, 1), ["do it"])


def test_later_runs_of_the_thread_go_on(start: Start, tmp_path: Path) -> None:
    box = start("load")
    for prompt in ("one", "two"):
        box.runctl("wait", submit(box, prompt))
    box.runctl("wait", submit(box, "three", "other"))
    assert told(tmp_path) == ["one", "two", "three"]
    assert len(list(tmp_path.glob("*.session"))) == 2
    assert counts(tmp_path) == (5, 2)
    box.runctl("session", "forget", "t")
    box.runctl("wait", submit(box, "four"))
    assert len(list(tmp_path.glob("*.session"))) == 3


@pytest.mark.parametrize(
    "options",
    [
        *(
            pytest.param(("load", f"unknown={code}"), marks=pytest.mark.nightly)
            for code in (-32002, -32602, -32603)
        ),
        ("load-any",),
        ("resume",),
        pytest.param((), marks=pytest.mark.nightly),
    ],
    ids="+".join,
)
def test_a_session_that_is_gone(start: Start, tmp_path: Path, options: tuple[str, ...]) -> None:
    """As on another machine: another is begun, with the task as it was given."""
    box = start(*options)
    (tmp_path / "hold").touch()
    run = submit(box)
    watch = Watch(box, "--run", run, "t")
    wait_for(tmp_path, "half")
    box.kill()
    for file in tmp_path.glob("*.session"):
        file.unlink()
    box.start()
    (tmp_path / "hold").unlink()
    assert watch.wait() == 0
    assert told(tmp_path) == ["do it", "do it"]
    assert "runctl: session " in stderr(watch)
    assert "a new one is begun" in stderr(watch)
    (session,) = tmp_path.glob("*.session")
    assert box.show(run)["session"] == session.stem


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_another_machine(house: House, tmp_path: Path, shared: bool) -> None:
    """It goes on where its sessions are on shared storage; else the task is begun anew there."""
    boxes = []
    for name in ("a", "b"):
        sessions = tmp_path if shared else tmp_path / name
        sessions.mkdir(exist_ok=True)
        more = f'env = {{ SESSIONS = "{sessions}" }}\n[takeover]\nenabled = true\nafter = "2s"\n'
        boxes.append(house.box(name, runner(tmp_path, "load", more=more), start=False))
    a, b = boxes
    a.start()
    (tmp_path / "hold").touch()
    run = submit(a)
    watch = Watch(a, "--run", run, "t")
    wait_for(tmp_path, "half")
    b.start()
    a.kill()
    wait_for(tmp_path, "half", 2)
    (tmp_path / "hold").unlink()
    assert watch.wait() == 0
    late = Watch(b, "--run", run, "t")
    assert late.wait() == 0
    assert valid(watch) == valid(late) == TOOL + (answer(3) if shared else TOOL + answer(2))
    assert counts(tmp_path) == ((3, 1) if shared else (4, 2))
    assert house.bus.run(run).executor == "b"
    assert told(tmp_path)[1].startswith("You were interrupted.") is shared


def test_an_error_that_may_pass_begins_no_other_session(start: Start, tmp_path: Path) -> None:
    box = start("load")
    box.runctl("wait", submit(box, "one"))
    box.configure(runner(tmp_path, "load", "unknown=-32050"))
    box.runctl("session", "show", "t")
    for file in tmp_path.glob("*.session"):
        file.unlink()
    box.kill()
    box.start()
    run = submit(box, "two")
    watch = Watch(box, "--run", run, "t")
    assert watch.wait() == 1
    assert "refuses session/load: Internal error: Session not found (-32050)" in stderr(watch)
    assert told(tmp_path) == ["one"]


def test_a_long_prompt(start: Start, tmp_path: Path) -> None:
    box = start("load")
    prompt = "x" * 200_000
    (tmp_path / "hold").touch()
    run = box.runctl("submit", "t", "--runner", "agent", "-", input=prompt.encode()).strip()
    wait_for(tmp_path, "half")
    box.kill()
    box.start()
    (tmp_path / "hold").unlink()
    box.runctl("wait", run)
    assert told(tmp_path)[0] == prompt
    assert told(tmp_path)[1].endswith(prompt)


@pytest.mark.parametrize("options", [("load",), ("load", "stays")], ids="+".join)
def test_an_abort_cancels_the_turn(start: Start, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Before TERM reaches the agent."""
    box = start(*options)
    (tmp_path / "hold").touch()
    run = submit(box)
    watch = Watch(box, "--run", run, "t")
    wait_for(tmp_path, "half")
    box.runctl("abort", "t")
    assert watch.wait() == 5
    assert lines(tmp_path, "cancels") == [box.show(run)["session"]]
    assert "broken off." in valid(watch)
    (tmp_path / "hold").unlink()
    box.runctl("wait", submit(box, "two"))
    assert told(tmp_path) == ["do it", "two"]
    assert len(list(tmp_path.glob("*.session"))) == 1


@pytest.mark.parametrize("policy", ["allow", "deny", None])
def test_permissions(start: Start, tmp_path: Path, policy: str | None) -> None:
    box = start("load", "asks", more=f'permissions = "{policy}"\n' if policy else "")
    run = submit(box)
    watch = Watch(box, "--run", run, "t")
    assert watch.wait() == 0
    allowed = policy == "allow"
    assert lines(tmp_path, "permissions") == ["o-allow_once" if allowed else "o-reject_once"]
    assert counts(tmp_path)[1] == allowed
    said = "allowed" if allowed else 'denied (permissions = "deny")'
    assert f"[permission] write a line — {said}\n" in stderr(watch)
    assert ("[tool] write a line — failed\n" in valid(watch)) is not allowed


STOPS = [
    ("max_tokens", 10, "has cut its answer"),
    ("max_turn_requests", 11, "has asked its model as often"),
    ("refusal", 12, "refuses to go on"),
    ("cancelled", 13, "has broken off by itself"),
    ("new_reason", 14, "has failed"),
]


def test_how_a_turn_ends(stopped_box: Box, tmp_path: Path) -> None:
    box, text = stopped_box, ""
    for reason, _, _ in STOPS:
        (tmp_path / reason).mkdir()
        own = runner(tmp_path / reason, "load", f"stop={reason}")
        text += own.replace("[runners.agent]", f"[runners.{reason}]")
    box.configure(text)
    box.start()
    for reason, code, said in STOPS:
        run = box.runctl("submit", reason, "--runner", reason, "do it").strip()
        watch = Watch(box, "--run", run, reason)
        assert watch.wait() == 1
        shown = box.ended(run)
        assert (shown["exit_code"], shown["status"]) == (code, "failed")
        assert shown["error"].startswith(f"{Path(sys.executable).name} {said}")
        assert reason in stderr(watch)


def test_json(start: Start, tmp_path: Path) -> None:
    box = start("load", more='output = "json"\nmode = "auto"\n')
    watch = Watch(box, "--run", submit(box), "t")
    assert watch.wait() == 0
    *updates, end = [json.loads(line) for line in valid(watch).splitlines()]
    assert end["stopReason"] == "end_turn"
    kinds = [x["sessionUpdate"] for x in updates]
    assert kinds[:7] == [
        *["agent_message_chunk"] * 2,
        *("tool_call", *["tool_call_update"] * 4),
    ]
    assert kinds[7:] == ["agent_thought_chunk", *["agent_message_chunk"] * 12]
    assert lines(tmp_path, "modes") == ["auto"]


FAIL: list[tuple[list[str], str, str]] = [
    (["sh", "-c", "echo Usage: agent; exit 2"], "", "sh: has ended by itself (exit code 2); it"),
    (["sh", "-c", "echo Usage: agent; exit 2"], "", "but wrote 'Usage: agent': does argv have"),
    (["yes"], "", "yes: does not speak ACP; it has sent no message of ACP, but wrote 'y'"),
    (["cat"], "", "cat: it answers with an error: Method not found"),
    (["no-such-agent"], "", "command not found: no-such-agent"),
    (["/"], "", "/ cannot be started: Permission denied"),
    ([sys.executable, AGENT, "{path}", "crash"], "", "has ended by itself (exit code 3)\n"),
    ([sys.executable, AGENT, "{path}", "login"], "", "it wants to be logged in (Auth"),
    (
        [sys.executable, AGENT, "{path}"],
        'mode = "none"\n',
        "it does not take mode = 'none': Invalid params: no mode none (-32602)",
    ),
]


def test_agents_that_fail(stopped_box: Box, tmp_path: Path) -> None:
    box, text = stopped_box, ""
    for n, (argv, more, _) in enumerate(FAIL):
        (tmp_path / str(n)).mkdir()
        filled = [x.replace("{path}", str(tmp_path / str(n))) for x in argv]
        text += f'[runners.agent{n}]\nkind = "acp"\nargv = {json.dumps(filled)}\n{more}'
    box.configure(text)
    box.start()
    for n, (argv, _, said) in enumerate(FAIL):
        run = box.runctl("submit", f"t{n}", "--runner", f"agent{n}", "do it").strip()
        watch = Watch(box, "--run", run, f"t{n}")
        assert watch.wait() == 1
        ours = [x for x in stderr(watch).splitlines() if x.startswith("runctl: ")]
        assert len(ours) == 1, argv
        assert said in ours[0] + "\n"
        assert "Traceback" not in stderr(watch)


def test_noise_is_passed_on(start: Start, tmp_path: Path) -> None:
    box = start("load", "noise")
    watch = Watch(box, "--run", submit(box), "t")
    assert watch.wait() == 0
    assert valid(watch) == TOOL + answer(2)
    assert "npm notice: a new version\n[1, 2]\n" in stderr(watch)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'runners.x.argv: is missing: name the agent, such as ["opencode", "acp"]'),
        ('argv = ["a", "{prompt}"]', "runners.x.argv: holds {prompt}, which an ACP agent is told"),
        ('argv = ["a", "-s={session}"]', "runners.x.argv: holds {session}, which an ACP agent"),
        *(
            (f'argv = ["a"]\n{key} = {value}', f'{key}: is for kind = "command" only: remove it')
            for key, value in (
                *(("session", '"uuid"'), ("next_argv", '["a"]'), ("resume_argv", '["a"]')),
                *(("session_missing", '"x"'), ("args", "true"), ("tty", "true")),
                *(("merge_output", "true"), ("stop_signal", '"INT"')),
            )
        ),
        ('argv = ["a"]\npermissions = "ask"', 'permissions: expected "allow" or "deny", got "ask"'),
        ('argv = ["a"]\noutput = "xml"', 'output: expected "text" or "json", got "xml"'),
        ('argv = ["a"]\nmodel = "x"', "runners.x.model: unknown key"),
    ],
)
@pytest.mark.short
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n[runners.x]\nkind = "acp"\n{text}\n')
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert said in str(caught.value)


@pytest.mark.short
def test_what_is_shown_loads_again(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    more = 'permissions = "allow"\nmode = "auto"\noutput = "json"\ncwd = "/srv/{thread}"\n'
    text = f'state_dir = "{tmp_path}"\n[runners.x]\nkind = "acp"\nargv = ["a", "{{thread}}"]\n'
    file.write_text(text + more)
    config = load(file)
    file.write_text(describe(config))
    again = load(file)
    assert again.runners["x"] == config.runners["x"]
    assert isinstance(again.runners["x"], AcpRunner)


@pytest.mark.short
def test_a_prompt_is_needed(tmp_path: Path) -> None:
    runner = AcpRunner("x", argv=("a",))
    assert "needs a prompt" in str(refusal(runner, None, ()))
    assert "needs a prompt" in str(refusal(runner, " \n", ()))
    assert "takes no arguments" in str(refusal(runner, "p", ("b",)))
    assert refusal(runner, "-p", ()) is None, "it is no argument of anything"


@pytest.mark.short
@pytest.mark.parametrize(
    ("code", "text", "unknown"),
    [
        (-32002, "Resource not found", True),
        (-32602, "Invalid params", True),
        (-32603, "Internal error: Session not found", True),
        (-32603, "No previous sessions found for this project.", True),
        (-32603, "no rollout found for thread id 7", True),
        (-32603, "Internal error: database is locked", False),
        (-32601, "Method not found", False),
        (-32000, "no session without login", False),
    ],
)
def test_which_errors_mean_an_unknown_session(code: int, text: str, unknown: bool) -> None:
    assert Refused(code, text).says_unknown is unknown


@pytest.mark.short
@pytest.mark.parametrize(
    ("kinds", "policy", "chosen"),
    [
        (["allow_always", "allow_once", "reject_once"], "allow", "1"),
        (["allow_always", "reject_once"], "allow", "0"),
        (["allow_once", "reject_always"], "deny", "1"),
        (["reject_once"], "allow", None),
        ([], "deny", None),
    ],
)
def test_which_option_is_chosen(kinds: list[str], policy: Policy, chosen: str | None) -> None:
    options = [{"optionId": str(n), "name": x, "kind": x} for n, x in enumerate(kinds)]
    outcome = answer_permission(policy, [*options, "?", {"kind": kinds[0] if kinds else 7}])
    assert outcome["outcome"].get("optionId") == chosen
    assert outcome["outcome"]["outcome"] == ("cancelled" if chosen is None else "selected")


@pytest.mark.short
@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"x", b"[]", b"7", b"{}", b'{"id": 1}', b'{"id": [1], "result": {}}', b"\xff"),
        *(b'{"method": 1}', b'{"id": 1, "error": "x"}', b'{"result": 1}', b'{"a":' * 9000),
    ],
)
def test_what_is_no_message(line: bytes) -> None:
    assert read_message(line) is None


@pytest.mark.short
def test_what_is_a_message() -> None:
    for text in (
        *('{"id": 1, "result": null}', '{"id": "a", "error": {"code": 1}}'),
        *('{"method": "m"}', '{"id": 0, "method": "m", "params": []}'),
    ):
        assert read_message(text.encode()) == json.loads(text)


@pytest.mark.short
def test_a_title_is_one_line() -> None:
    assert clean_title("a\n b\x1b[31m\u202e") == "a b?[31m?"
    assert clean_title(None) == "a tool"
    assert len(clean_title("x" * 500)) == 200
