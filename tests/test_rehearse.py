"""runctl rehearse: recipes that continue, recipes that do not, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, wait_until
from runctl.cli.rehearsal.comparison import compare
from runctl.cli.rehearsal.kills import Kill, plan_at_checkpoints, plan_at_random
from runctl.cli.rehearsal.played_run import Played
from runctl.cli.rehearsal.recipe import Recipe, find_runner
from runctl.config.load import load
from test_agents import runner
from test_json import check

ROOT = Path(__file__).parents[1]
#: Beside Python, where an installation has runctl too.
BIN = str(Path(sys.executable).parent)
#: What takes root's rights away.
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
NIGHTLY = pytest.param(20, marks=pytest.mark.nightly)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills are found in /proc")


class Rehearsing:
    """The command, with a directory for temporary files of its own, whose path is short enough for
    sockets."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary = path, temporary
        self.stdout = self.stderr = ""

    def begin(self, *args: str) -> subprocess.Popen[str]:
        """As somebody without rights of root's, who may not see into a daemon either."""
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RUNCTL_")},
            "TMPDIR": str(self.temporary),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self.path),
        }
        return subprocess.Popen(
            [*POWERLESS, sys.executable, "-m", "runctl.cli.main", *args],
            env=env, cwd=self.path, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def call(self, *args: str, code: int) -> str:
        process = self.begin(*args)
        try:
            self.stdout, self.stderr = process.communicate(timeout=10 * DEADLINE)
        except BaseException:
            process.terminate()  # it ends what it has begun
            process.communicate()
            raise
        assert process.returncode == code, (self.stdout, self.stderr)
        return self.stdout

    def json(self, *args: str, code: int) -> Any:
        out = self.call("--json", "rehearse", *args, code=code)
        assert out.count("\n") == 1
        return check("rehearse", json.loads(out))

    def left(self) -> list[str]:
        """Of files and processes."""
        found = os.listdir(self.temporary)
        mark = os.fsencode(self.temporary)
        for folder in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                try:
                    if mark in (folder / name).read_bytes():
                        found.append(f"{folder.name}: {(folder / 'cmdline').read_bytes()!r}")
                except OSError:
                    continue
        return found


@pytest.fixture
def rehearsing(tmp_path: Path) -> Iterator[Rehearsing]:
    temporary = Path(tempfile.mkdtemp(prefix="rh-"))
    made = Rehearsing(tmp_path, temporary)
    try:
        yield made
        assert made.left() == []
    finally:
        shutil.rmtree(temporary)


def kills(found: Any, moments: str) -> list[Any]:
    return next((x["kills"] for x in found["rounds"] if x["moments"] == moments), [])


def find_seed(most: int) -> int:
    """One by which the first kill at random comes in the second half of the run."""

    def first(seed: int) -> float:
        return plan_at_random(1, most, random.Random(seed))[0].seconds

    return next(seed for seed in itertools.count() if most > 1 or 0.5 < first(seed) < 0.7)


# ---- the examples ------------------------------------------------------------------------------


def page_script(language: str) -> list[str]:
    """The command of docs/recovery.md in that language; its steps may be repeated."""
    page = (ROOT / "docs" / "recovery.md").read_text()
    script = re.findall(rf"```{language}\n(.*?)```", page, re.S)[0]
    if language == "sh":
        step = 'do_step() { echo "$1" > "step.$1"; echo "step $1"; sleep 0.1; }\n'
        assert "-lt 100" in script
        return ["sh", "-c", step + script.replace("-lt 100", "-lt 4")]
    step = "import time\ndef do_step(n):\n    print(n, file=open(f'step.{n}', 'w'))\n"
    assert "101" in script
    return [sys.executable, "-c", f"{step}    time.sleep(0.1)\n{script.replace('101', '9')}"]


@pytest.mark.long
@pytest.mark.parametrize("most", [1, NIGHTLY])
@pytest.mark.parametrize("language", ["sh", "python"])
def test_the_scripts_of_the_page_continue(rehearsing: Rehearsing, language: str, most: int) -> None:
    steps = 4 if language == "sh" else 8
    found = rehearsing.json("--kills", str(most), "--", *page_script(language), code=0)
    assert found["verdict"] == "equal"
    assert found["undisturbed"]["checkpoints"] == steps
    done = kills(found, "at checkpoints")
    assert len(done) >= min(most, steps) - 1
    assert done[0]["checkpoint"] == 1
    assert {x["then"] for x in done} <= {"continued", "ended"}
    assert done[0]["then"] == "continued"
    assert [x["compared"] for x in found["rounds"]] == [
        ["stdout", "exit code", "directory", "watcher"]
    ] * 2
    for kill in (*done, *kills(found, "at random")):
        assert kill["then"] != "started over" or kill["checkpoint"] == 0


@pytest.mark.long
@pytest.mark.parametrize("most", [1, NIGHTLY])
def test_an_agent_repeats_no_tool_call(rehearsing: Rehearsing, most: int) -> None:
    config = rehearsing.path / "runctld.toml"
    config.write_text(runner(Path("."), "uuid", 'cwd = "submitter"\n'))
    # What it says is another generation's, and on stderr is that an attempt before had no session.
    what = ["stdout", "stderr", "told", "generations", "half", "*.session"]
    ignored = [word for name in what for word in ("--ignore", name)]
    seed = find_seed(most)
    args = ("--runner", "agent", "--kills", str(most), "--seed", str(seed), *ignored, "do it")
    process = rehearsing.call("-c", str(config), "rehearse", *args, "--json", code=0)
    found = check("rehearse", json.loads(process))
    assert (found["verdict"], found["prompt"], found["command"]) == ("equal", "do it", [])
    assert most > 1 or [x["then"] for x in kills(found, "at random")] == ["continued"]


# ---- what differs ------------------------------------------------------------------------------

#: Two effects, and time to be killed after the first.
AGAIN = "echo one >> journal; sleep 1.5; echo two >> journal; echo done"


def test_repeated_effects_are_reported(rehearsing: Rehearsing) -> None:
    """The work has no checkpoints, so it starts over."""
    seed = find_seed(1)
    out = rehearsing.call(
        *("rehearse", "--kills", "1", "--seed", str(seed), "--", "sh", "-c", AGAIN), code=1
    )
    assert "killed at checkpoints" not in out
    assert re.search(r"^1 +[0-9.]+s +- +- +started over +0 B$", out, re.M), out
    assert "stdout     equal\n" in out
    assert "exit code  equal\n" in out
    assert (
        "directory  differs: the file journal has 1 line more: its effects were repeated\n"
        "              one\n"
        "             +one\n"
        "              two\n"
    ) in out
    assert "watcher    equal\n" in out
    assert "differs: after a kill it does again what it had done\n" in out
    assert "docs/recovery.md" in out
    assert f"--seed {seed}\n" in out


def test_what_ignores_its_checkpoint_differs(rehearsing: Rehearsing) -> None:
    """It is killed behind its first one, continues there, and says all again."""
    script = "echo one; runctl checkpoint --data 1; echo two; runctl checkpoint; sleep 0.3; exit 0"
    found = rehearsing.json("--kills", "1", "--", "sh", "-c", script, code=1)
    assert found["verdict"] == "differs"
    (kill,) = kills(found, "at checkpoints")
    assert (kill["then"], kill["after"], kill["checkpoint"]) == ("continued", 1, 1)
    (difference,) = found["rounds"][0]["differences"]
    assert (difference["where"], difference["repeated"]) == ("stdout", True)
    assert difference["said"] == "it has 1 line more: some came again"
    assert difference["diff"][:3] == [" one", "+one", " two"]


@pytest.mark.nightly
def test_what_is_not_deterministic_is_not_blamed_on_a_kill(rehearsing: Rehearsing) -> None:
    script = "date +%N; echo $$ > pid; echo x > same; sleep 0.5"
    out = rehearsing.call("rehearse", "--", "sh", "-c", script, code=1)
    assert "killed" not in out
    assert "stdout     differs: it has another line 1\n" in out
    assert "directory  differs: the file pid has another line 1\n" in out
    assert "not rehearsed: it is not deterministic, without any kill\n" in out
    assert "--ignore stdout --ignore pid\n" in out
    ignored = ("--ignore", "stdout", "--ignore", "p*")
    found = rehearsing.json("--kills", "2", *ignored, "--", "sh", "-c", script, code=0)
    assert found["verdict"] == "equal"


def test_what_fails_undisturbed_is_not_rehearsed(rehearsing: Rehearsing) -> None:
    args = ("--keep", "--", "sh", "-c", "echo partly > file; echo why not >&2; exit 3")
    out = rehearsing.call("rehearse", *args, code=1)
    assert out.startswith("undisturbed: exit code 3 after ")
    assert "\n  why not\n" in out
    assert "not rehearsed: it fails when nothing disturbs it\n" in out
    (kept,) = rehearsing.temporary.iterdir()
    assert rehearsing.stderr == f"runctl: everything is kept in {kept}\n"
    assert (kept / "undisturbed-1" / "file").read_text() == "partly\n"
    assert "run failed" in (kept / "undisturbed-1.log").read_text()
    shutil.rmtree(kept)


@pytest.mark.nightly
def test_a_copy_to_begin_with(rehearsing: Rehearsing) -> None:
    folder = rehearsing.path / "begin"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "input").write_text("7\n")
    script = rehearsing.path / "work.sh"
    script.write_text(
        '#!/bin/sh\ncat "$RUNCTL_REHEARSAL/deep/input"; sleep 0.5; exec rm deep/input\n'
    )
    script.chmod(0o755)
    # Killed in its sleep, it finds its input again.
    found = rehearsing.json("--copy", "begin", "--kills", "1", "--", "./work.sh", code=0)
    assert found["command"] == [str(script)]
    assert (folder / "deep" / "input").read_text() == "7\n"


def test_files_are_taken_from_here(rehearsing: Rehearsing) -> None:
    script = rehearsing.path / "work.sh"
    script.write_text('cat > copy < "$1"; sleep 0.5; exit 7\n')
    # It fails, so it is run once, and told of.
    found = rehearsing.json("--", "sh", "work.sh", "work.sh", "x" * 300, code=1)
    assert (found["verdict"], found["undisturbed"]["exit_code"]) == ("failed", 7)
    assert found["command"] == ["sh", str(script), str(script), "x" * 300]


@pytest.mark.nightly
def test_another_exit_code_and_output(rehearsing: Rehearsing) -> None:
    script = 'echo "attempt $RUNCTL_ATTEMPT"; sleep 1; [ "$RUNCTL_ATTEMPT" = 1 ] || exit 3'
    args = ("--kills", "1", "--seed", str(find_seed(1)), "--", "sh", "-c", script)
    (killed,) = rehearsing.json(*args, code=1)["rounds"]
    assert [(x["where"], x["said"], x["diff"]) for x in killed["differences"]] == [
        ("stdout", "it has another line 1", ["-attempt 1", "+attempt 2", " "]),
        ("exit code", "3, not 0", []),
    ]


def test_what_does_not_end_is_given_up(rehearsing: Rehearsing) -> None:
    rehearsing.call("rehearse", "--timeout", "1s", "--", "sleep", "600", code=1)
    assert "an undisturbed run did not end within 1.0s" in rehearsing.stderr


# ---- its own end -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_leaves_nothing_when_it_is_interrupted(
    rehearsing: Rehearsing, number: signal.Signals
) -> None:
    begun = rehearsing.path / "begun"
    script = f"echo $$ > {begun}; (exec sleep 600) & sleep 600"
    process = rehearsing.begin("rehearse", "--", "sh", "-c", script)
    try:
        wait_until(lambda: begun.exists() and begun.read_text(), "it runs")
        assert len(rehearsing.left()) > 4
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.communicate()
    said = "runctl: interrupted; everything that was started was ended\n"
    assert (process.returncode, out, err) == (130, "", said)
    assert rehearsing.left() == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "what to rehearse is missing"),
        (("--",), "what to rehearse is missing"),
        (("hello",), "a prompt needs --runner"),
        (("two", "words", "--", "true"), "more than one word of prompt"),
        (("--runner", "none", "hello"), "no runner 'none': there is no configuration file"),
        (("--kills", "0", "--", "true"), "'--kills': 0 is not in the range"),
        (("--kills", "many", "--", "true"), "'--kills': 'many' is not a valid integer"),
        (("--seed", "-1", "--", "true"), "'--seed': -1 is not in the range"),
        (("--copy", "none", "--", "true"), "Directory 'none' does not exist"),
        (("--timeout", "soon", "--", "true"), "'--timeout': 'soon'"),
        (("--", "./none.sh"), "none.sh: no such file"),
    ],
)
def test_bad_arguments(rehearsing: Rehearsing, args: tuple[str, ...], says: str) -> None:
    assert rehearsing.call("rehearse", *args, code=2) == ""
    assert says in rehearsing.stderr
    assert rehearsing.stderr.count("\n") == 1


def test_a_runner_that_is_wrong(rehearsing: Rehearsing) -> None:
    config = rehearsing.path / "runctld.toml"
    config.write_text(
        '[runners.a]\nkind = "command"\nargvs = ["x"]\n[runners.b]\nkind = "command"\n'
    )
    for name, says in (("a", f"{config}: runners.a.argvs: "), ("c", f"{config} has: a, b")):
        rehearsing.call("-c", str(config), "rehearse", "--runner", name, "hello", code=2)
        assert says in rehearsing.stderr


# ---- parts -------------------------------------------------------------------------------------


def played(folder: Path, **more: Any) -> Played:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        **{"name": "x", "folder": folder, "seconds": 1.0, "status": "succeeded", "exit_code": 0},
        **{"error": None, "late": {}, "early": {}, "missing": 0, "chunks": 0, "checkpoints": 0},
        "kills": [],
    }
    return Played(**(given | more))


def said(first: Played, second: Played, *ignored: str) -> list[str]:
    return [f"{x.where}: {x.said}" for x in compare(first, second, ignored)]


@pytest.mark.short
def test_the_configuration_of_the_private_daemon(tmp_path: Path) -> None:
    """No number of kills makes a run dead, and a runner is what it is in the user's file."""
    file = tmp_path / "user.toml"
    file.write_text(
        '[runners.r]\nkind = "command"\nargv = ["a \\u007f\\"ü", "{prompt}"]\ncwd = "below"\n'
        'session = { json = "a.b" }\nenv = { A = "1" }\nlimits = { processes = 3 }\n'
    )
    recipe = Recipe([], "hi", "r", find_runner("r", file))
    recipe.write_config(tmp_path / "private.toml", tmp_path / "state")
    made, user = load(tmp_path / "private.toml"), load(file)
    assert made.state_dir == tmp_path / "state"
    assert made.runners["r"] == user.runners["r"]
    assert min(made.queue.max_attempts, made.queue.max_total_attempts) >= 1000


@pytest.mark.short
def test_directories_are_compared(tmp_path: Path) -> None:
    first, second = played(tmp_path / "1"), played(tmp_path / "2")
    for run in (first, second):
        (run.folder / "below").mkdir()
        (run.folder / "below" / "same").write_text("x\n")
        (run.folder / "mode").write_text("x\n")
        (run.folder / "mode").chmod(0o600)
    assert said(first, second) == []
    (first.folder / "gone").touch()
    (second.folder / "below" / "new").touch()
    (second.folder / "mode").chmod(0o644)
    (first.folder / "kind").touch()
    (second.folder / "kind").mkdir()
    (first.folder / "link").symlink_to("a")
    (second.folder / "link").symlink_to("b")
    (first.folder / "bytes").write_bytes(b"a\0b")
    (second.folder / "bytes").write_bytes(b"a\0c")
    (first.folder / "less").write_text("1\n2\n3\n")
    (second.folder / "less").write_text("1\n3\n")
    assert said(first, second) == [
        "directory: the file below/new is new",
        "directory: the file bytes has another byte 3",
        "directory: the file gone is missing",
        "directory: the file kind is a directory",
        "directory: the file less has 1 line less, from line 2 on",
        "directory: the symbolic link link leads to b, not a",
        "directory: the file mode has mode 644, not 600",
    ]
    assert len(said(first, second, "below", "./mode", "[bkgl]*")) == 0


@pytest.mark.short
def test_outputs_and_ends_are_compared(tmp_path: Path) -> None:
    first = played(tmp_path, late={"stdout": b"a\nb\n"}, early={"stdout": b"a\nb\n"})
    second = played(
        tmp_path,
        status="failed", exit_code=None, error="interrupted",
        late={"stdout": b"a\nb\n", "stderr": b"oh\n"},
        early={"stdout": b"a\na\nb\n", "stderr": b"oh\n"}, missing=2,
    )  # fmt: skip
    assert said(first, second) == [
        "stderr: it has 1 line more, from line 1 on",
        "exit code: failed (interrupted), not 0",
        "watcher: 2 chunks never came",
        "watcher: stdout has 1 line more: some came again",
    ]
    assert said(first, second, "stderr")[0].startswith("exit code")


@pytest.mark.short
def test_kills_are_planned_by_the_seed() -> None:
    def plan(seed: int, there: int, most: int) -> list[int]:
        return [x.number for x in plan_at_checkpoints(there, most, random.Random(seed))]

    assert plan(1, 3, 5) == [1, 2, 3]
    assert plan(1, 0, 5) == []
    assert plan(1, 9, 1) == [1]
    for seed in range(20):
        found = plan(seed, 100, 5)
        assert found == plan(seed, 100, 5)
        assert (len(set(found)), found[0], found[-1]) == (5, 1, 100)
        moments = [x.seconds for x in plan_at_random(10, 5, random.Random(seed))]
        assert min(moments) >= 0
        assert 0 < sum(moments) < 10
    assert plan(1, 100, 5) != plan(2, 100, 5)


@pytest.mark.short
def test_what_came_of_a_kill() -> None:
    found = [Kill(1.0, 3, 1, *more).then for more in ((), (2,), (2, 3))]
    assert found == ["ended", "started over", "continued"]
