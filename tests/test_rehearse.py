"""``runctl rehearse``: what continues is told from what does not."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import wait_until
from runctl.cli.rehearsal.directory import compare_directories, compare_texts, read_directory
from runctl.cli.rehearsal.plan import plan_many, plan_moments
from test_checkpoints import _scripts

ROOT = Path(__file__).parents[1]
RUNCTL = [sys.executable, "-m", "runctl.cli.main"]
#: In one place what a performance does, in another each time that it does so.
JOURNAL = 'for n in 1 2 3 4 5; do echo "step $n"; echo $n >> journal; sleep 0.2; done'


def start(path: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUNCTL, *args],
        cwd=path,
        env={**os.environ, "TMPDIR": str(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def rehearse(path: Path, *args: str, code: int = 0) -> str:
    """Its stdout, and stderr behind it."""
    client = start(path, *args)
    out, err = client.communicate(timeout=570)
    assert client.returncode == code, out + err
    nothing_is_left(path)
    return out + err


def nothing_is_left(path: Path) -> None:
    assert not list(path.glob("runctl-rehearsal-*"))
    assert not processes(path)


def processes(path: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(path / "runctl-rehearsal-") in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("language", ["sh", "python"])
def test_the_scripts_of_the_page_continue(tmp_path: Path, language: str) -> None:
    """Their steps are safe to repeat: each writes a file of its own."""
    (script,) = [text for kind, text in _scripts() if kind == language]
    runctl = shlex.join(RUNCTL)
    if language == "sh":
        script = script.replace("-lt 100", "-lt 9").replace(
            "runctl checkpoint", f"{runctl} checkpoint"
        )
        script = script.replace(
            'do_step "$step"', 'echo "step $step"; echo x > "file-$step"; sleep 0.2'
        )
    else:
        step = "import time; time.sleep(0.2); open(f'file-{step}', 'w').close()"
        script = script.replace("do_step(step)", step).replace("101", "10")
    (tmp_path / "steps").write_text(script)
    program = "sh" if language == "sh" else sys.executable
    said = rehearse(tmp_path, "rehearse", "--kills", "2", "--", program, "steps")
    assert "9 lines of output, 9 files, 9 checkpoints" in said
    assert re.search(r"chunk \d+, at a checkpoint +continued after chunk \d", said)
    assert said.count("equal\n") >= 5
    assert "differs" not in said
    assert "It continues, and what comes of it is the same as without a kill." in said


def test_what_repeats_its_effects_is_found_out(tmp_path: Path) -> None:
    args = ["rehearse", "--kills", "2", "--seed", "3"]
    said = rehearse(tmp_path, *args, "--", "sh", "-c", JOURNAL, code=1)
    assert "output:      equal\n" in said
    assert "directory:   differs\n" in said
    assert re.search(r"kill [12]: journal: \d+ lines? more, line \d is '1', not '\d'", said)
    assert "It starts over, and what comes of it is not the same" in said
    assert "--seed 3" in said
    found = json.loads(rehearse(tmp_path, *args, "--json", "--", "sh", "-c", JOURNAL, code=1))
    assert (found["equal"], found["seed"], found["exit_code"]) == (False, 3, 0)
    assert [x["performance"] for x in found["performances"]] == ["kill-1", "kill-2", "all-in-one"]
    assert not found["differences"]["output"]
    assert found["differences"]["directory"]


def test_other_ends_and_outputs_are_found_out(tmp_path: Path) -> None:
    script = (
        'echo "attempt $RUNCTL_ATTEMPT"; sleep 1; echo on stderr >&2'
        '; [ "$RUNCTL_ATTEMPT" = 1 ] || exit 3'
    )
    said = rehearse(tmp_path, "rehearse", "--kills", "1", "--", "sh", "-c", script, code=1)
    assert "kill 1: stdout: line 1 is 'attempt 2', not 'attempt 1'" in said
    assert "kill 1: failed, exit code 3 after the kill, succeeded, exit code 0 without" in said


def test_what_cannot_be_rehearsed_is_said(tmp_path: Path) -> None:
    args = ["rehearse", "--kills", "1"]
    said = rehearse(tmp_path, *args, "--", "sh", "-c", "cat /proc/sys/kernel/random/uuid", code=1)
    assert "two undisturbed performances differ, so a kill cannot be told from chance" in said
    said = rehearse(tmp_path, *args, "--", "./nothing", code=1)
    assert "undisturbed it fails:" in said
    said = rehearse(tmp_path, *args, "--timeout", "1s", "--", "sleep", "600", code=1)
    assert "undisturbed-1 did not end within 1.0s; see --timeout" in said
    rehearse(tmp_path, "rehearse", code=2)
    said = rehearse(tmp_path, "rehearse", "--runner", "nope", "x", code=2)
    assert "no runner 'nope' is configured" in said


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    client = start(tmp_path, "rehearse", "--", "sleep", "600")
    wait_until(lambda: any(b"sleep" in line for line in command_lines(tmp_path)), "it runs")
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=120)
    assert client.returncode == 130
    assert err.strip() == "runctl: interrupted"
    nothing_is_left(tmp_path)


def command_lines(path: Path) -> list[bytes]:
    lines = []
    for pid in processes(path):
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue
    return lines


def test_a_configured_runner(tmp_path: Path) -> None:
    """With its own arguments and environment; what it is given is a prompt."""
    (tmp_path / "c.toml").write_text(
        f'state_dir = "{tmp_path}/elsewhere"\n'
        '[runners.echo]\nkind = "command"\n'
        """argv = ["sh", "-c", 'echo "$GREETING $1"; sleep 0.5; touch "$RUNCTL_REHEARSAL/x"',"""
        ' "sh", "{prompt}"]\n'
        'env = { GREETING = "hello \\"you\\" ü" }\n'
    )
    args = ["-c", "c.toml", "rehearse", "--kills", "1", "--runner", "echo", "--keep"]
    client = start(tmp_path, *args, "big world")
    out, err = client.communicate(timeout=300)
    assert client.returncode == 0, out + err
    assert "1 line of output, 1 file, 0 checkpoints" in out
    assert "It starts over, and what comes of it is the same" in out
    (kept,) = re.findall(r"kept: (\S+)\n", err)
    assert sorted(os.listdir(kept)) == ["kill-1", "undisturbed-1", "undisturbed-2"]
    assert os.listdir(Path(kept) / "kill-1") == ["x"]
    assert not processes(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    assert "takes one PROMPT" in rehearse_kept(tmp_path, *args[:-1], "two", "words")


def rehearse_kept(path: Path, *args: str) -> str:
    client = start(path, *args)
    out, err = client.communicate(timeout=60)
    assert client.returncode == 2, out + err
    return err


# ---- its parts ---------------------------------------------------------------------------------


@pytest.mark.short
def test_how_directories_differ(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for root in (a, b):
        (root / "sub").mkdir(parents=True)
        (root / "same").write_text("x")
        (root / "sub" / "text").write_text("1\n2\n")
        (root / "mode").write_text("")
        (root / "link").symlink_to("same")
    assert compare_directories(read_directory(a), read_directory(b)) == []
    (a / "gone").write_text("")
    (b / "new").mkdir()
    (b / "sub" / "text").write_text("1\n3\n4\n")
    (b / "mode").chmod(0o600)
    (a / "mode").chmod(0o644)
    (b / "link").unlink()
    (b / "link").write_text("same")
    assert compare_directories(read_directory(a), read_directory(b)) == [
        "gone: missing after the kill",
        "link: a file after the kill, a link without",
        "mode: its mode is 600 after the kill, 644 without",
        "new: there only after the kill",
        "sub/text: 1 line more, line 2 is '3', not '2'",
    ]
    assert compare_texts(b"1\n2\n", b"1\n") == "1 line fewer, line 2 is missing, not '2'"
    assert compare_texts(b"a", b"a\n") == "line 1 has an end, and had none"


@pytest.mark.short
def test_when_it_is_killed() -> None:
    moments = plan_moments(5, 10, 2.0, 1)
    assert [x.checkpoints for x in moments] == [1, 5, 10, None, None]
    assert all(0 < x.seconds < 2 for x in moments if x.checkpoints is None)
    assert moments == plan_moments(5, 10, 2.0, 1) != plan_moments(5, 10, 2.0, 2)
    assert [x.checkpoints for x in plan_moments(3, 0, 1.0, 1)] == [None] * 3
    assert [x.checkpoints for x in plan_moments(1, 1, 1.0, 1)] == [1]
    assert [x.checkpoints for x in plan_moments(4, 1, 1.0, 1)] == [1, None, None, None]
    many = list(plan_many(4, 8, 4.0, 1))
    assert [x.checkpoints is None for x in many] == [False, True, False, True]
    assert all(x.seconds < 1 for x in many)
