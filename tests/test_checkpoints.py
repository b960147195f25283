"""Runs that store checkpoints: an interruption costs what was done since the last one, once."""

from __future__ import annotations

import base64
import os
import random
import re
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from house import House
from runctl.client import run as inside
from runctl.supervisor.execution.runners.run_files import CHECKPOINT, SOCKET, RunFiles

ROOT = Path(__file__).parents[1]
#: Each step is one line of the journal, which is its side effect, and two of output; every third
#: ends with a checkpoint. argv: the folder, how many steps, seconds between two.
STEPS = r"""
import base64, os, pathlib, signal, socket, sys, time

def ask(line):
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(os.environ["RUNCTL_SOCKET"])
                s.sendall(line + b"\n")
                answer = s.makefile("rb").readline()
            if answer:
                return answer
        except OSError:
            pass
        time.sleep(0.05)

here, steps, pause = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
step = 0
if os.environ.get("RUNCTL_RESUME"):
    step = int(open(os.environ["RUNCTL_CHECKPOINT_FILE"]).read())
    before = open(os.environ["RUNCTL_PREVIOUS_OUTPUT"]).read().split("\n")
    assert before == [f"step {n}" for n in range(1, step + 1)] + [""], before
    with open(here / "resumed", "a") as file:
        file.write(f"{os.environ['RUNCTL_ATTEMPT']} {step}\n")
while step < steps:
    step += 1
    with open(here / "journal", "a") as file:
        file.write(f"{step}\n")
    sys.stdout.write(f"step {step}\n")
    sys.stdout.flush()
    if step % 3 == 0:
        assert ask(b"CHECKPOINT " + base64.b64encode(b"%d" % step)) == b"OK\n"
    time.sleep(pause)
"""


def valid(watch: Watch) -> str:
    """What the watcher takes for the output on stdout, by what it was told."""
    chunks: list[dict[str, Any]] = []
    for event in list(watch.events):
        if event["type"] == "reset":
            chunks = []
        elif event["type"] == "continue":
            chunks = [x for x in chunks if x["seq"] <= event["after"]]
        elif event["type"] == "chunk":
            assert event["seq"] == len(chunks) + 1
            chunks.append(event)
    return "".join(x["data"] for x in chunks if x["stream"] != "stderr")


def output(steps: int) -> str:
    return "".join(f"step {n}\n" for n in range(1, steps + 1))


def submit_steps(box: Box, path: Path, steps: int, pause: float = 0.02, *more: str) -> str:
    argv = (sys.executable, "-c", STEPS, str(path), str(steps), str(pause))
    return box.runctl("submit", "t", *more, "--", *argv).strip()


def journal(path: Path) -> list[int]:
    file = path / "journal"
    return [int(x) for x in file.read_text().split()] if file.exists() else []


def test_kills_at_any_moment(box: Box, tmp_path: Path) -> None:
    rng, steps, kills = random.Random(5), 150, 4
    run = submit_steps(box, tmp_path, steps)
    watches = [Watch(box, "--run", run, "t")]
    for _ in range(kills):
        done = len(journal(tmp_path)) + rng.randrange(4, 20)
        wait_until(lambda done=done: len(journal(tmp_path)) >= done, "it goes on")
        time.sleep(rng.random() * 0.05)
        rng.choice([box.kill, box.kill_all])()
        box.start()
        watches.append(Watch(box, "--run", run, "t"))
    assert watches[0].wait() == 0
    watches.append(Watch(box, "--run", run, "t"))
    for watch in watches:
        assert watch.wait() == 0
        assert valid(watch) == output(steps)
    assert [e["type"] for e in watches[0].events].count("reset") == 1
    assert [e["type"] for e in watches[0].events].count("continue") == kills
    late = [e for e in watches[-1].events if e["type"] == "chunk"]
    assert "".join(e["data"] for e in late) == output(steps)
    shown = box.show(run)
    assert (shown["status"], shown["attempt"]) == ("succeeded", kills + 1)
    # A step is done again when its attempt died before the next checkpoint.
    done_steps = journal(tmp_path)
    assert set(done_steps) == set(range(1, steps + 1))
    assert len(done_steps) <= steps + 3 * kills
    assert not list((box.state / "run").iterdir())


def test_another_executor_goes_on(house: House, tmp_path: Path) -> None:
    takeover = "[takeover]\nenabled = true\nafter = '2s'\n[queue]\noutlive = '0s'\n"
    a = house.box("a", takeover)
    argv = [sys.executable, "-c", STEPS, str(tmp_path), "120", "0.05"]
    run = house.bus.submit("t", argv, "a")
    early = Watch(a, "--run", run, "t")
    b = house.box("b", takeover)
    done = len(journal(tmp_path)) + random.Random().randrange(1, 40)
    wait_until(lambda: len(journal(tmp_path)) > done, "it works")
    midway = Watch(b, "--run", run, "t")
    a.kill_all()
    for watch in (early, midway):
        assert watch.wait() == 0
    for watch in (early, midway, late := Watch(b, "--run", run, "t")):
        assert watch.wait() == 0
        assert valid(watch) == output(120)
    assert late.text() == output(120)
    assert house.bus.run(run).executor == "b"
    assert len(journal(tmp_path)) <= 123


def test_what_an_orderly_stop_costs(box: Box, tmp_path: Path) -> None:
    """A program that is told to end stores where it is."""
    script = r"""
import base64, os, pathlib, signal, socket, sys, time
here = pathlib.Path(sys.argv[1])
def stop(*_):
    print("stopping", flush=True)
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(os.environ["RUNCTL_SOCKET"])
        s.sendall(b"CHECKPOINT " + base64.b64encode(b"told") + b"\n")
        (here / "answer").write_bytes(s.makefile("rb").readline())
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
if os.environ.get("RUNCTL_RESUME"):
    print("resumed", open(os.environ["RUNCTL_CHECKPOINT_FILE"]).read())
    sys.exit()
print("begun", flush=True)
time.sleep(600)
"""
    run = box.submit("t", sys.executable, "-c", script, str(tmp_path))
    watch = Watch(box, "--run", run, "t")
    wait_until(lambda: watch.text() == "begun\n", "it runs")
    assert box.term() == 0
    assert (tmp_path / "answer").read_bytes() == b"OK\n"
    box.start()
    assert watch.wait() == 0
    assert valid(watch) == "begun\nstopping\nresumed told\n"


def test_the_next_daemon_answers_at_the_same_path(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure('[queue]\noutlive = "30s"\n')
    box.start()
    run = submit_steps(box, tmp_path, 90, 0.05)
    watch = Watch(box, "--run", run, "t")
    wait_until(lambda: len(journal(tmp_path)) > 10, "it works")
    box.kill()
    # It waits at its next checkpoint.
    wait_until(lambda: len(journal(tmp_path)) % 3 == 0, "nobody answers")
    box.start()
    assert watch.wait() == 0
    assert (valid(watch), journal(tmp_path)) == (output(90), [*range(1, 91)])
    assert box.show(run)["attempt"] == 1


@pytest.mark.parametrize("how", ["runner", "submit"])
@pytest.mark.parametrize("policy", ["restart", "fail"])
def test_other_policies(stopped_box: Box, tmp_path: Path, policy: str, how: str) -> None:
    box = stopped_box
    said = f'on_interrupt = "{policy}"\n' if how == "runner" else ""
    box.configure(
        f'[runners.r]\nkind = "command"\nargv = ["{sys.executable}"]\nargs = true\n{said}'
    )
    box.start()
    more = ["--on-interrupt", policy] if how == "submit" else []
    argv = ("-c", STEPS, str(tmp_path), "60", "0.02")
    run = box.runctl("submit", "t", "--runner", "r", *more, "--", *argv).strip()
    watch = Watch(box, "--run", run, "t")
    wait_until(lambda: len(journal(tmp_path)) > 10, "it works")
    box.kill()
    box.start()
    if policy == "restart":
        assert watch.wait() == 0
        assert valid(watch) == output(60)
        cut = len(journal(tmp_path)) - 60
        assert 10 < cut < 60
        assert journal(tmp_path) == [*range(1, cut + 1), *range(1, 61)]
        return
    assert watch.wait() == 1
    assert [e["type"] for e in watch.events].count("reset") == 1, "its output stays"
    assert watch.text().startswith(output(9))
    shown = box.show(run)
    assert (shown["status"], shown["exit_code"]) == ("failed", None)
    assert shown["error"] == f"interrupted; not run again (on_interrupt); runctl retry {run}"
    assert 10 < len(journal(tmp_path)) < 60
    assert journal(tmp_path) == [*range(1, len(journal(tmp_path)) + 1)]
    late = Watch(box, "--run", run, "t")
    assert late.wait() == 1
    assert late.text() == watch.text()


def test_a_command_of_its_own_to_go_on_with(stopped_box: Box, tmp_path: Path) -> None:
    """Of a program that has checkpoints, and no session."""
    box = stopped_box
    file = tmp_path / "steps.py"
    said = "import sys\nprint(sys.argv[4], file=open(sys.argv[1] + '/said', 'a'))\n"
    file.write_text(said + STEPS)
    begin = f'"{sys.executable}", "{file}", "{tmp_path}", "30", "0.05"'
    box.configure(
        f'[runners.r]\nkind = "command"\nargv = [{begin}, "--first={{prompt}}"]\n'
        f'resume_argv = [{begin}, "--again={{prompt}}"]\nresume_prompt = "finish {{prompt}}"\n'
    )
    box.start()
    run = box.runctl("submit", "t", "--runner", "r", "do it").strip()
    watch = Watch(box, "--run", run, "t")
    wait_until(lambda: len(journal(tmp_path)) > 6, "it works")
    box.kill()
    box.start()
    assert watch.wait() == 0
    assert valid(watch) == output(30)
    assert (tmp_path / "said").read_text() == "--first=do it\n--again=finish do it\n"


def test_a_chat_cannot_continue(stopped_box: Box) -> None:
    box = stopped_box
    box.configure('[runners.c]\nkind = "chat"\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "m"\n')
    box.start()
    box.runctl("submit", "t", "--runner", "c", "--on-interrupt", "continue", "hi", code=2)
    assert "which cannot continue" in box.stderr


@pytest.mark.parametrize(("most", "status"), [("max_attempts", "succeeded"), ("max_total", "dead")])
def test_attempts_are_counted_from_the_last_checkpoint(
    stopped_box: Box, tmp_path: Path, most: str, status: str
) -> None:
    box = stopped_box
    more = "max_total_attempts = 4\n" if most == "max_total" else ""
    box.configure(f"[queue]\nmax_attempts = 2\n{more}")
    box.start()
    run = submit_steps(box, tmp_path, 60, 0.05)
    for n in range(4):
        wait_until(lambda n=n: len(journal(tmp_path)) > 6 * (n + 1), "a checkpoint more is stored")
        box.kill()
        box.start()
    box.runctl("wait", run, code=0 if status == "succeeded" else 1)
    shown = box.show(run)
    assert (shown["status"], shown["attempt"]) == (status, 5)
    if status == "dead":
        assert shown["error"] == "it was interrupted in each of 4 attempts; not tried again"


def test_attempts_without_a_checkpoint_count(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure("[queue]\nmax_attempts = 1\n")
    box.start()
    run = submit_steps(box, tmp_path, 60, 0.05)
    watch = Watch(box, "--run", run, "t")
    wait_until(lambda: len(journal(tmp_path)) > 6, "it works")
    # The second attempt continues at once, and stores nothing: its socket is not there for it.
    box.kill()
    script = box.config.read_text()
    box.start()
    wait_until(lambda: box.show(run)["attempt"] == 2, "it continues")
    assert box.config.read_text() == script
    os.kill(box.pid, signal.SIGKILL)
    box.kill()
    box.start()
    code = watch.wait()
    found = box.show(run)
    if found["status"] == "dead":
        assert code == 1
        assert "without a checkpoint" in found["error"]
    else:
        assert (code, valid(watch)) == (0, output(60))


# ---- the page ------------------------------------------------------------------------------


def _scripts() -> list[tuple[str, str]]:
    page = (ROOT / "docs" / "recovery.md").read_text()
    found = re.findall(r"```(sh|python)\n(.*?)```", page, re.S)
    return [(kind, text) for kind, text in found if "checkpoint" in text]


@pytest.mark.parametrize("language", ["sh", "python"])
def test_the_scripts_of_the_page(box: Box, tmp_path: Path, language: str) -> None:
    script = next(text for kind, text in _scripts() if kind == language)
    runctl = f"{sys.executable} -m runctl.cli.main"
    if language == "sh":
        step = f'do_step() {{ echo "$1" >> {tmp_path}/journal; echo "step $1"; }}\n'
        script = step + script.replace("runctl checkpoint", f"{runctl} checkpoint")
        argv = ["sh", "-c", script.replace("-lt 100", "-lt 12")]
        steps = 12
    else:
        step = f"def do_step(n):\n    print(n, file=open({str(tmp_path / 'journal')!r}, 'a'))\n"
        argv = [sys.executable, "-c", step + script + "    import time; time.sleep(0.03)\n"]
        steps = 100
    run = box.submit("t", *argv)
    early = Watch(box, "--run", run, "t")
    for share in (3, 6):
        done = steps * share // 12
        wait_until(lambda done=done: len(journal(tmp_path)) > done, "it goes on")
        box.kill()
        box.start()
    assert early.wait() == 0
    assert valid(early) == output(steps)
    assert len(journal(tmp_path)) <= steps + 2


# ---- what is asked for -----------------------------------------------------------------------


def talk(path: Path, *lines: bytes) -> list[str]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.settimeout(DEADLINE)
        answers = connection.makefile("rb")
        found = []
        for line in lines:
            connection.sendall(line)
            found.append(answers.readline().decode().strip())
        return found


def test_what_is_no_request_is_refused_in_one_line(box: Box) -> None:
    run = box.submit("t", "sleep", "600", run="sleeper")
    path = RunFiles(box.state).path(run, SOCKET, None)
    wait_until(path.exists, "its socket is there")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    big = base64.b64encode(bytes(64 * 1024))
    assert talk(
        path,
        b"HELLO\n",
        b"\n",
        b"\xff\n",
        b"CHECKPOINT a\n",
        b"CHECKPOINT\n",
        b"CHECKPOINT " + big + b"\n",
        b"CHECKPOINT " + base64.b64encode(bytes(64 * 1024 + 1)) + b"\n",
    ) == [
        "ERROR no request 'HELLO'; one of: CHECKPOINT, SESSION, STATUS, USAGE",
        "ERROR no request ''; one of: CHECKPOINT, SESSION, STATUS, USAGE",
        "ERROR the request is not UTF-8",
        "ERROR the data is not base64",
        "OK",
        "OK",
        "ERROR the data has 65537 bytes; at most 65536",
    ]
    assert talk(path, b"x" * 200_000) == ["ERROR the line is too long"]
    for _ in range(40):  # more than are heard at once, and none of them says anything
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(str(path))
        idle.close()
    assert talk(path, b"CHECKPOINT\n") == ["OK"]
    box.runctl("abort", "t")
    assert not path.exists()


def test_outside_of_a_run(box: Box) -> None:
    box.runctl("checkpoint", "--data", "x", code=2)
    assert "not inside a run: RUNCTL_SOCKET is not set" in box.stderr


def test_nobody_answers(box: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUNCTL_SOCKET", str(tmp_path / "nothing"))
    box.runctl("checkpoint", "--data", "x", "--wait", "0.2s", code=4)
    assert "runctld did not answer within 0.2 s (No such file or directory)" in box.stderr


def test_a_terminal_and_a_merged_pipe(stopped_box: Box, tmp_path: Path) -> None:
    """What was written before the checkpoint is before it, whatever it went through."""
    box = stopped_box
    box.configure(
        f'[runners.tty]\nkind = "command"\nargv = ["{sys.executable}"]\nargs = true\ntty = true\n'
        f'[runners.one]\nkind = "command"\nargv = ["{sys.executable}"]\nargs = true\n'
        "merge_output = true\n"
    )
    box.start()
    runs = {}
    for runner in ("tty", "one"):
        (tmp_path / runner).mkdir()
        argv = ("-c", STEPS, str(tmp_path / runner), "60", "0.02")
        more = ("--runner", runner, "--", *argv)
        runs[runner] = box.runctl("submit", runner, *more).strip()
    wait_until(lambda: all(len(journal(tmp_path / x)) > 10 for x in runs), "they work")
    box.kill()
    box.start()
    for runner, run in runs.items():
        watch = Watch(box, "--run", run, runner)
        assert watch.wait() == 0
        assert valid(watch) == output(60)
        assert len(journal(tmp_path / runner)) <= 63


def test_a_state_directory_with_a_long_path(tmp_path: Path) -> None:
    """A socket's path is short: it is elsewhere then, in a folder that nobody else may enter."""
    state = tmp_path / ("x" * 60) / ("y" * 60)
    files = RunFiles(state)
    listener = files.listen("r", None)
    assert listener is not None
    with listener:
        path = files.path("r", SOCKET, None)
        assert path.parts[:2] == ("/", "tmp")
        assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
        with files.create("r", CHECKPOINT, None) as file:
            file.write(b"x")
        files.sweep(["r"])
        assert path.exists()
        assert files.path("r", CHECKPOINT, None).read_bytes() == b"x"
        files.sweep([])
    assert not path.parent.exists()


def test_a_folder_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").symlink_to("/tmp")
    files = RunFiles(tmp_path)
    assert files.listen("r", None) is None
    assert "there is no RUNCTL_SOCKET" in caplog.text
    with pytest.raises(OSError, match="somebody else"):
        files.create("r", CHECKPOINT, None)


def test_a_command_that_never_began_leaves_nothing(box: Box) -> None:
    box.runctl("wait", box.submit("t", "no-such-command"), code=1)
    assert not list((box.state / "run").iterdir())


def test_an_attempt_that_goes_on_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its agent's session alone."""
    monkeypatch.setenv("RUNCTL_RESUME", "1")
    monkeypatch.delenv("RUNCTL_CHECKPOINT_FILE", raising=False)
    assert inside.resumed() is None
