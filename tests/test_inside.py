"""stdin of a submit, commands that are not found, and runctl inside a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, Watch, running_box, wait_until

RUNCTL = f"{sys.executable} -m runctl.cli.main"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="whose stdin it is needs /proc")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(
        tmp_path_factory.mktemp("inside"),
        '[runners.agent]\nkind = "command"\nargv = ["cat"]\n'
        '[runners.own]\nkind = "command"\nenv = { PATH = "/nowhere" }\n',
    ) as box:
        yield box


def shell(box: Box, script: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RUNCTL_CONFIG": str(box.config)}
    return subprocess.run(
        ["sh", "-c", script.replace("runctl ", f"{RUNCTL} ")],
        env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip


def text(box: Box, thread: str, run: str) -> str:
    watch = Watch(box, "--run", run, thread)
    watch.wait()
    return watch.text()


def runs(box: Box) -> list[object]:
    found = box.runctl("list", "full", "--json", code=None)
    return list(json.loads(found)) if found else []


#: The second half begins once the first has written.
FULL = "{ echo hi; touch %s; } | { while ! [ -e %s ]; do sleep 0.02; done; exec %s; }"


@linux_only
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("runctl submit full -- cat", 'write "-" before "--"'),
        ("runctl submit full --runner agent hello", 'write "-" in its place'),
        ("runctl submit full --runner agent", 'write "-" in its place'),
    ],
)
def test_piped_input_is_not_dropped_without_a_word(
    home: Box, what: str, says: str, tmp_path: Path
) -> None:
    file = home.path / "input"
    file.write_text("hi\n")
    before = len(runs(home))

    def refused(code: int, out: str, err: str) -> None:
        assert (code, out) == (2, ""), err
        assert err.startswith("runctl: stdin holds data, which is not passed on: if it is ")
        assert err.count("\n") == 1
        assert says in err
        assert "< /dev/null" in err

    done = shell(home, FULL % (tmp_path / "go", tmp_path / "go", what))
    refused(done.returncode, done.stdout, done.stderr)
    with file.open("rb") as stdin:
        client = home.popen(*what.split()[1:], stdin=stdin)
        out, err = client.communicate(timeout=DEADLINE)
    refused(client.returncode, out.decode(), err.decode())
    assert len(runs(home)) == before
    # That of a script may be for somebody else in it.
    done = shell(home, f"{{ {what}; true; }} < {file}")
    assert done.returncode == 0
    assert says in done.stderr
    assert len(runs(home)) == before + 1


def test_input_is_passed_on_where_it_is_asked_for(home: Box) -> None:
    done = shell(home, "echo hi | runctl submit t - -- cat")
    assert text(home, "t", done.stdout.strip()) == "hi\n"


@pytest.mark.nightly
def test_the_input_of_a_loop_is_the_loops(home: Box) -> None:
    script = "while read x; do runctl submit loop -- echo $x; done"
    file = home.path / "list"
    file.write_text("a\nb\nc\n")
    quiet = script.replace("$x;", "$x < /dev/null;")
    for each, notes in (
        (f"printf 'a\\nb\\nc\\n' | {script}", 2),
        (f"printf 'a\\nb\\nc\\n' | {quiet}", 0),
        (f"{script} < {file}", 0),
    ):
        done = shell(home, each)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("runctl: what is on stdin was not passed on: if it") == notes
        assert done.stderr.count("\n") == notes
        said = [text(home, "loop", run) for run in done.stdout.split()]
        assert said == ["a\n", "b\n", "c\n"]


def test_a_pipe_that_stays_open_holds_nothing_up(home: Box) -> None:
    client = home.popen("submit", "t", "--", "true", stdin=subprocess.PIPE)
    assert client.stdin is not None
    assert client.wait(DEADLINE) == 0
    for stdin in ("<&-", "< /dev/null"):
        assert shell(home, f"runctl submit t -- true {stdin}").returncode == 0
    done = shell(home, "runctl submit t - <&-")
    assert done.returncode == 2
    assert done.stderr.startswith("runctl: no prompt can be read from standard input")


def test_a_command_that_is_not_found(home: Box) -> None:
    path = os.environ["PATH"]
    for runner, words in (
        ("shell", f"command not found: 'no-such'; runctld looks in its own PATH ({path})"),
        ("own", "command not found: 'no-such'; its runner's PATH is /nowhere"),
    ):
        run = home.runctl("submit", "t", "--runner", runner, "--", "no-such").strip()
        home.runctl("wait", run, code=1)
        error = home.show(run)["error"]
        assert error.startswith(words[:150]), error
        assert "whole path" in error
    run = home.submit("t", "./no-such")
    home.runctl("wait", run, code=1)
    error = home.show(run)["error"]
    assert error == f"command not found: './no-such' in directory {str(home.path)!r}"
    run = home.submit("t", "ls -l")
    home.runctl("wait", run, code=1)
    assert home.show(run)["error"] == (
        "command not found: 'ls -l'; it is one word here: give the command and its arguments as"
        " separate words"
    )


def test_runctl_inside_a_run_finds_its_daemon(home: Box) -> None:
    script = f"cd / && {RUNCTL} --json status; echo =$RUNCTL_CONFIG="
    said = text(home, "t", home.submit("t", "sh", "-c", script))
    status, _, named = said.partition("\n")
    assert json.loads(status)["pid"] == home.pid
    assert named == f"={home.config}=\n"


def test_runctl_inside_a_run_of_a_relative_configuration(
    stopped_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon may have been given its file by a relative path, or by a variable."""
    box = stopped_box
    monkeypatch.setenv("RUNCTL_CONFIG", box.config.name)
    with box.log.open("ab") as log:
        box.daemon = subprocess.Popen(
            [sys.executable, "-m", "runctl.supervisor.main"], stderr=log, cwd=box.path
        )
    wait_until(lambda: b"ready: " in box.log.read_bytes(), "it is ready")
    monkeypatch.delenv("RUNCTL_CONFIG")
    said = text(box, "t", box.submit("t", "sh", "-c", "echo $RUNCTL_CONFIG"))
    assert said == f"{box.config}\n"


def test_runctl_inside_a_run_without_a_configuration(
    stopped_box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a service of systemd: the state is where StateDirectory= says."""
    box = stopped_box
    monkeypatch.delenv("RUNCTL_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("STATE_DIRECTORY", str(box.state))
    with box.log.open("ab") as log:
        box.daemon = subprocess.Popen([sys.executable, "-m", "runctl.supervisor.main"], stderr=log)
    wait_until(lambda: b"ready: " in box.log.read_bytes(), "it is ready")
    monkeypatch.delenv("STATE_DIRECTORY")
    script = f"{RUNCTL} --json status; echo =$RUNCTL_CONFIG="
    said = text(box, "t", box.submit("t", "sh", "-c", script))
    assert json.loads(said.partition("\n")[0])["pid"] == box.pid
    assert said.endswith("==\n")
