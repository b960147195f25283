"""What a submitter gives never becomes an option, a program or a path of somebody else's choice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Box, Watch, running_box, wait_until
from runctl.config.load import load
from runctl.config.prompts import interpreter, refusal, warnings
from runctl.config.schema import CommandRunner, Config
from runctl.protocol import messages

P = "{prompt}"
EVIL = '--settings={"apiKeyHelper":"id > /tmp/x"}'
SHOW = "import sys; print(sys.argv[1:], sys.stdin.read())"


def runner(*argv: str, args: bool = False) -> CommandRunner:
    return CommandRunner("agent", argv=argv, args=args)


@pytest.mark.short
@pytest.mark.parametrize(
    "argv",
    [
        ["agent", P],
        ["agent", "--print", P],
        ["agent", "--prompt", P],
        ["agent", "-p", P, "--"],
        ["agent", P + P],
        ["agent", P + ".txt"],
        ["agent", "a--", P],
        ["--", P],
    ],
)
def test_a_prompt_that_would_be_an_option_is_refused(argv: list[str]) -> None:
    for prompt in (EVIL, "-", "--", "-x", "--version"):
        said = refusal(runner(*argv), prompt, ())
        assert said is not None, prompt
        assert 'begins with "-"' in said
        assert '"--", "{prompt}"' in said
    for prompt in ("hello", " -x", "a -x", "a\n-x"):
        assert refusal(runner(*argv), prompt, ()) is None
    assert any("the prompt alone" in said for _, said, _ in warned(*argv))


@pytest.mark.short
@pytest.mark.parametrize(
    "argv",
    [
        ["agent"],
        ["agent", "--", P],
        ["agent", "--", "x", P],
        ["agent", "--prompt=" + P],
        ["agent", "-p=" + P],
        ["agent", "-p" + P],
        ["agent", "prompt:" + P],
        ["sh", "-c", 'agent -- "$1"', "--", P],
    ],
)
def test_the_safe_forms_take_any_prompt(argv: list[str]) -> None:
    assert refusal(runner(*argv), EVIL, ()) is None
    assert not warned(*argv)


@pytest.mark.short
@pytest.mark.parametrize("lead", ["-", "--", "--sett", "--no-"])
def test_a_prompt_is_no_part_of_an_options_name(lead: str) -> None:
    said = refusal(runner("agent", lead + P), "ings=x", ())
    assert said is not None
    assert "argv[1] of runner 'agent' makes an option's name of the prompt" in said
    assert warned("agent", lead + P)
    assert not warned("agent", "--", lead + P)


@pytest.mark.short
@pytest.mark.parametrize(
    "argv",
    [
        ["sh", "-c", "agent " + P],
        ["/bin/bash", "-lc", "agent '" + P + "'"],
        ["env", "A=b", "bash", "-c", P],
        ["python3.11", "-c", f"print('{P}')"],
        ["perl", "-e", P],
        ["node", "--eval", P],
        ["ssh", "host", "agent", "--", P],
        [P, "x"],
    ],
)
def test_a_prompt_that_is_run_as_code_is_warned_of(argv: list[str]) -> None:
    found = warned(*argv)
    assert any("as code" in said or "chooses the program" in said for _, said, _ in found), found


@pytest.mark.short
@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (["sh"], "sh"),
        (["/bin/bash", "-s"], "bash"),
        (["env", "A=b", "python3", "-u"], "python3"),
        (["python3", "-"], "python3"),
        (["python3", "-m", "json.tool"], None),
        (["sh", "-c", "cat"], None),
        (["bash", "script.sh"], None),
        (["agent"], None),
        (["sh", "-c", "agent", "--", P], None),
        ([], None),
    ],
)
def test_a_prompt_that_is_read_as_code_is_known(argv: list[str], program: str | None) -> None:
    assert interpreter(argv) == program


@pytest.mark.short
def test_what_else_is_refused() -> None:
    template = runner("agent", "--", P)
    assert "needs a prompt" in str(refusal(template, None, ()))
    for blank in ("", " \n"):
        assert "the prompt is empty" in str(refusal(template, blank, ()))
        assert refusal(runner("agent"), blank, ()) is None  # an empty stdin is one
    assert "takes no arguments" in str(refusal(runner("agent"), None, ["--version"]))
    assert refusal(runner("agent", args=True), None, ["--version"]) is None
    assert refusal(runner(), None, ["ls", "-l"]) is None
    assert "needs a command" in str(refusal(runner(), "x", ()))


def warned(*argv: str) -> list[tuple[str, str, str]]:
    return list(warnings(Config(Path("/x"), runners={"agent": runner(*argv)})))


# ---- with a daemon -----------------------------------------------------------------------

RUNNERS = f"""
[runners.bare]
kind = "command"
argv = ['{sys.executable}', '-c', '{SHOW}', '{P}']
[runners.safe]
kind = "command"
argv = ['{sys.executable}', '-c', '{SHOW}', '--', '{P}']
[runners.value]
kind = "command"
argv = ['{sys.executable}', '-c', '{SHOW}', '--prompt={P}']
[runners.stdin]
kind = "command"
argv = ['{sys.executable}', '-c', '{SHOW}']
cwd = "submitter"
[runners.more]
kind = "command"
argv = ['{sys.executable}', '-c', '{SHOW}', '--prompt={P}']
args = true
"""


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(tmp_path_factory.mktemp("agents"), RUNNERS) as box:
        yield box


def said(box: Box, *submit: str) -> str:
    run = box.runctl("submit", *submit).strip()
    watch = Watch(box, "--run", run, submit[0])
    watch.wait()
    return watch.text().strip()


def test_prompts_arrive_as_they_are(agents: Box) -> None:
    agents.runctl("submit", "t", "--runner", "bare", "--", EVIL, code=2)
    assert "takes no arguments" in agents.stderr
    agents.runctl("submit", "t", "--runner", "bare", "-", code=2, input=EVIL.encode())
    assert agents.stderr.startswith('runctl: the prompt begins with "-", which the command would')
    assert agents.stderr.count("\n") == 1
    assert "is the prompt alone" in agents.log.read_text()
    assert said(agents, "t", "--runner", "bare", "hi") == "['hi']"
    for name, words in (("safe", f"['--', {EVIL!r}]"), ("value", f"[{'--prompt=' + EVIL!r}]")):
        run = agents.runctl("submit", "t", "--runner", name, "-", input=EVIL.encode()).strip()
        watch = Watch(agents, "--run", run, "t")
        watch.wait()
        assert watch.text().strip() == words
    assert said(agents, "t", "--runner", "stdin", "hi") == "[] hi"


def test_only_the_runners_own_argv_is_filled_in(agents: Box) -> None:
    text = said(agents, "t", "--runner", "more", "hi", "--", "-x", "a{prompt}b")
    assert text == "['--prompt=hi', '-x', 'a{prompt}b']"


def test_a_thread_may_begin_with_a_dash(agents: Box) -> None:
    run = agents.runctl(
        "submit", "--runner", "shell", "--", "-t", "--", "printenv", "RUNCTL_THREAD"
    )
    agents.runctl("wait", run.strip())
    (row,) = json.loads(agents.runctl("list", "--json", "--", "-t"))
    assert row["run"] == run.strip()


def test_a_relative_directory_is_refused(agents: Box) -> None:
    (answer,) = agents.ask(messages.Submit("t", argv=["true"], cwd="../etc"))
    assert isinstance(answer, messages.Problem)
    assert answer.message == "cwd must be a whole path, which begins with /"


def test_a_queued_prompt_meets_another_configuration(stopped_box: Box, tmp_path: Path) -> None:
    """The rows of before are checked where argv is built, and a retry is."""
    box = stopped_box
    box.configure(RUNNERS)
    box.start()
    gate = tmp_path / "gate"
    wait = f"while [ ! -e {gate} ]; do sleep 0.02; done"
    box.submit("t", "sh", "-c", wait)
    run = box.runctl("submit", "t", "--runner", "safe", "-", input=EVIL.encode()).strip()
    box.configure(RUNNERS.replace("'--', ", ""))
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "changed: runner safe" in box.log.read_text(), "it is read")
    gate.touch()
    box.runctl("wait", run, code=1)
    assert 'the prompt begins with "-"' in box.show(run)["error"]
    box.runctl("retry", run, code=2)
    assert 'the prompt begins with "-"' in box.stderr


def test_check_and_doctor_warn(stopped_box: Box) -> None:
    stopped_box.configure(RUNNERS)
    check = subprocess.run(
        [sys.executable, "-m", "runctl.supervisor.main", "-c", stopped_box.config, "--check"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [x for x in check.stderr.splitlines() if "its runs are root's" not in x]
    assert line.startswith("runctld: warning: runner bare: argv[3] is the prompt alone")
    file = stopped_box.path / "again.toml"
    file.write_text(check.stdout)
    assert load(file).runners == load(stopped_box.config).runners
    looked = stopped_box.runctl("doctor", code=None)
    assert "WARN  runner bare" in looked
    assert "WARN  runner safe" not in looked
