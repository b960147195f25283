"""A runner with an argv is closed: submitters give it a prompt, by whichever way they come."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Box, wait_until
from runctl.config.load import load
from runctl.config.schema import ChatRunner, CommandRunner, Config, ConfigError, Runner
from runctl.config.submitters import described, warnings
from runctl.protocol import messages

GIT = shutil.which("git")
#: A program that writes where an option tells it to.
WRITES = ["git", "log"] if GIT else ["sort", "/dev/null"]
TOOL = [sys.executable, "-m", "json.tool"]
CLOSED = f"""
[runners.tool]
kind = "command"
argv = {json.dumps(TOOL)}
[runners.log]
kind = "command"
argv = {json.dumps(WRITES)}
"""
OPENED = CLOSED + 'args = true\ncwd = "submitter"\n'
OPENED = OPENED.replace("[runners.log]", 'cwd = "submitter"\n[runners.log]')


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A directory of a submitter's, with a package that has the name of one that is wanted."""
    folder = tmp_path / "evil"
    (folder / "json").mkdir(parents=True)
    (folder / "json/__init__.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    (folder / "json/tool.py").touch()
    if GIT:
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "-q",
             "--allow-empty", "-m", "x"], cwd=folder, check=True,
        )  # fmt: skip
    return folder


@pytest.fixture
def box(stopped_box: Box) -> Box:
    stopped_box.configure(CLOSED)
    stopped_box.start()
    return stopped_box


def test_a_submitters_directory_is_not_entered(box: Box, evil: Path, tmp_path: Path) -> None:
    """``python -m json.tool`` where there is a package json, in every way to submit one."""
    (made,) = box.ask(messages.Submit("wire", "tool", prompt="{}", cwd=str(evil)))
    line = {"thread": "batch", "runner": "tool", "prompt": "{}", "cwd": str(evil)}
    box.runctl("submit", "--batch", "-", input=json.dumps(line).encode())
    client = subprocess.run(
        [sys.executable, "-P", "-m", "runctl.cli.main", "-c", str(box.config), "submit", "cli",
         "--runner", "tool", "{}"], cwd=evil, check=True, capture_output=True,
    )  # fmt: skip
    assert client.stdout
    for thread in ("wire", "batch", "cli"):
        assert box.runctl("attach", thread) == "{}\n"
        (run,) = box.json("list", thread)
        assert box.show(run["run"])["cwd"] is None
    # The same id from elsewhere is the same work.
    again = messages.Submit("wire", "tool", run=made.run, prompt="{}", cwd="/")
    assert box.ask(again)[0].run == made.run
    assert not (tmp_path / "owned").exists()


def test_no_option_is_taken(box: Box, evil: Path, tmp_path: Path) -> None:
    option = f"--output={tmp_path / 'owned'}"
    assert box.runctl("submit", "t", "--runner", "log", "--", option, code=2) == ""
    assert "runner 'log' takes no arguments" in box.stderr
    (answer,) = box.ask(messages.Submit("t", "log", argv=[option], cwd=str(evil)))
    assert isinstance(answer, messages.Problem)
    line = {"thread": "t", "runner": "log", "argv": [option], "cwd": str(evil)}
    out = box.runctl("submit", "--batch", "-", input=json.dumps(line).encode(), code=1)
    assert json.loads(out)["code"] == "bad-request"
    box.runctl("list", "t", code=3)


def test_what_was_queued_while_it_was_open(stopped_box: Box, evil: Path, tmp_path: Path) -> None:
    """Rows of before a reload, and of an earlier version, which opened it, and their retries."""
    box, owned = stopped_box, tmp_path / "owned"
    box.configure(OPENED)
    box.start()
    gate = f"while [ ! -e {tmp_path / 'gate'} ]; do sleep 0.02; done"
    made = box.ask(
        messages.Submit("a", "shell", argv=["sh", "-c", gate]),
        messages.Submit("a", "tool", prompt="{}", cwd=str(evil)),
        messages.Submit("b", "shell", argv=["sh", "-c", gate]),
        messages.Submit("b", "log", argv=[f"--output={owned}"], cwd=str(evil)),
    )
    tool, option = made[1].run, made[3].run
    box.configure(CLOSED)
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "changed: runner log, runner tool" in box.log.read_text(), "it is read")
    (tmp_path / "gate").touch()
    assert box.runctl("attach", "a", "--run", tool) == "{}\n"
    box.runctl("wait", option, code=1)
    assert "takes no arguments" in box.show(option)["error"]
    box.runctl("retry", option, code=2)
    # One that failed in the submitter's directory is not tried there again.
    box.runctl("abort", "c", "--queued", code=3)
    assert not owned.exists()


def test_what_is_opened_is_open(stopped_box: Box, evil: Path, tmp_path: Path) -> None:
    """Or the above would prove nothing: with both keys, both attacks succeed."""
    box, owned = stopped_box, tmp_path / "owned"
    box.configure(OPENED)
    box.start()
    (made,) = box.ask(messages.Submit("a", "tool", prompt="{}", cwd=str(evil)))
    box.runctl("wait", made.run, code=None)
    assert owned.exists()
    owned.unlink()
    (made,) = box.ask(messages.Submit("b", "log", argv=[f"--output={owned}"], cwd=str(evil)))
    box.runctl("wait", made.run)
    assert owned.exists()


# ---- what is said of it ------------------------------------------------------------------


def command(*argv: str, **more: object) -> CommandRunner:
    return CommandRunner("a", argv=argv, **more)  # type: ignore[arg-type]


@pytest.mark.short
@pytest.mark.parametrize(
    ("runner", "words"),
    [
        (command(cwd="submitter"),
         "program, arguments, directory, the prompt (on stdin); not environment"),
        (command("/bin/agent"),
         "the prompt (on stdin); not program, arguments, directory, environment"),
        (command("/bin/agent", "--", "{prompt}"),
         "the prompt (an argument); not program, arguments, directory, environment"),
        (command("/bin/agent", args=True, cwd="submitter"),
         "arguments, directory, the prompt (on stdin); not program, environment"),
        (command("sudo", "-u", "agent", "--", args=True),
         "program, arguments, the prompt (on stdin); not directory, environment"),
        (command("{prompt}"),
         "program, the prompt (an argument); not arguments, directory, environment"),
        (command("./agent", cwd="submitter"),
         "program, directory, the prompt (on stdin); not arguments, environment"),
        (command("agent", cwd="submitter", env={"PATH": "/bin:."}),
         "program, directory, the prompt (on stdin); not arguments, environment"),
        (command("agent", cwd="submitter", env={"PATH": "/bin"}),
         "directory, the prompt (on stdin); not program, arguments, environment"),
        (ChatRunner("a", base_url="http://h", model="m"),
         "the prompt; not program, arguments, directory, environment"),
    ],
)  # fmt: skip
def test_what_submitters_decide(runner: Runner, words: str) -> None:
    assert described(runner) == f"submitters decide {words}"


@pytest.mark.short
def test_root_is_warned_of() -> None:
    def warned(runner: CommandRunner, uid: int = 0) -> list[str]:
        config = Config(Path("/x"), runners={"a": runner})
        return [said for _, said, _ in warnings(config, uid)]

    shell = command(cwd="submitter")
    assert warned(shell) == [
        "its runs are root's, and submitters decide program, arguments, directory"
    ]
    assert warned(shell, uid=1000) == []
    assert warned(command("/bin/agent")) == []
    assert warned(command("/bin/agent", args=True)) == [
        "its runs are root's, and submitters decide arguments"
    ]
    relative = warned(command("./agent", cwd="submitter"), uid=1000)
    assert relative == ["argv[0] is looked for in the submitter's directory: ./agent"]
    (code,) = warned(command("/bin/sh"))
    assert code == "a prompt is run as code by sh, which reads it from stdin"


@pytest.mark.short
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("python3", "are code for python3, or name a file of it"),
        ("/usr/bin/bash -x", "are code for bash, or name a file of it"),
        ("git log", "may be options by which git runs programs or writes files"),
        ("bash -c", "are code for bash, or name a file of it"),
        ("deno eval", "are code for deno, or name a file of it"),
        ("flock /tmp/lock", "may be options by which flock runs programs or writes files"),
        ("sudo -u agent --", "choose the program that sudo runs"),
        ("sudo -u agent", "choose the program that sudo runs"),
        ("env -i A=b", "choose the program that env runs"),
        ("timeout 5", "choose the program that timeout runs"),
        ("timeout 5 my-agent", None),
        ("env -i my-agent", None),
        ("python3 work.py", None),
        ("sh -c work", None),
        ("my-agent --", None),
    ],
)
def test_arguments_that_reach_too_far(argv: str, words: str | None) -> None:
    runner = command(*argv.split(), args=True)
    found = [said for _, said, _ in warnings(Config(Path("/x"), runners={"a": runner}), 1000)]
    told = [x for x in found if x.startswith("arguments that submitters add ")]
    assert told == ([] if words is None else [f"arguments that submitters add {words}"])
    closed = warnings(Config(Path("/x"), runners={"a": command(*argv.split())}), 1000)
    assert not [x for x in closed if "arguments that" in x[1]]


@pytest.mark.short
@pytest.mark.parametrize("argv", ["", "argv = []\n"])
def test_closed_without_a_command_is_refused(tmp_path: Path, argv: str) -> None:
    """It would be open."""
    file = tmp_path / "c.toml"
    file.write_text(f'[runners.a]\nkind = "command"\n{argv}args = false\n')
    with pytest.raises(ConfigError, match=r"runners\.a\.args: false needs an argv: without one"):
        load(file)


def test_check_log_and_doctor_say_it(stopped_box: Box) -> None:
    box = stopped_box
    box.configure(OPENED)
    check = subprocess.run(
        [sys.executable, "-m", "runctl.supervisor.main", "-c", box.config, "--check"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = f"{described(load(box.config).runners['log'])}\n"
    assert f"# runner log: {shown}" in check.stdout
    assert "# runner shell: submitters decide program, " in check.stdout
    reach = "arguments that submitters add may be options by which "
    assert f"warning: runner log: {reach}" in check.stderr
    told = box.runctl("doctor", code=None)
    assert f"  {shown}" in told
    assert f"  {reach}" in told
