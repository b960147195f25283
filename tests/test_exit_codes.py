"""One run of each ending: every way to watch it exits with the same code."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator

import pytest
from conftest import DEADLINE, Box, wait_until
from proc import open_files

pytestmark = pytest.mark.long
#: How a run ends: its exit code as docs/scripting.md has it, its status.
ENDINGS = {
    "good": (0, "succeeded"),
    "red": (1, "failed"),
    "missing": (1, "failed"),
    "stopped": (5, "aborted"),
    "unborn": (5, "aborted"),
    "poison": (1, "dead"),
}
#: Each waits for a file, so that watchers are there before it ends.
GATE = "until [ -e go ]; do sleep 0.02; done; "
COMMANDS = {
    "good": ("sh", "-c", GATE + "echo good"),
    "red": ("sh", "-c", GATE + "echo red; exit 7"),
    "missing": ("./no-such-command",),
    "stopped": ("sh", "-c", "echo stopped; sleep 600"),
    "unborn": ("sh", "-c", "echo never"),
    "poison": ("sh", "-c", GATE.replace("go", "die") + 'kill -9 "$(cat pid)"; sleep 600'),
}


def ways(run: str) -> dict[str, tuple[str, ...]]:
    thread = f"t-{run}"
    return {
        "wait": ("wait", run),
        "attach": ("attach", thread, "--run", run),
        "attach --tail": ("attach", thread, "--run", run, "--tail", "1"),
        "submit": ("submit", thread, "--id", run, "--attach", "--", *COMMANDS[run]),
    }


def watchers(box: Box, run: str) -> dict[str, subprocess.Popen[bytes]]:
    found = {}
    for name, args in ways(run).items():
        found[name] = box.popen(*args)
        if "--" not in args:
            found[name + " --json"] = box.popen(*args, "--json")
        else:
            found[name + " --json"] = box.popen("--json", *args)
    return found


def codes(found: dict[str, subprocess.Popen[bytes]]) -> dict[str, int]:
    for name, process in found.items():
        out, err = process.communicate(timeout=DEADLINE)
        assert b"Traceback" not in err
        if name.endswith("--json"):
            for line in out.splitlines():
                json.loads(line)
    return {name: process.returncode for name, process in found.items()}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Box, dict[str, dict]]]:
    """All have ended, in front of watchers, whose codes come with it."""
    box = Box(tmp_path_factory.mktemp("endings"))
    box.configure("[queue]\nmax_attempts = 1\nstop_grace = '200ms'\n")
    try:
        box.start()
        assert box.daemon is not None
        (box.path / "pid").write_text(str(box.daemon.pid))
        live = {}
        for run in ("good", "red", "stopped", "poison"):
            box.submit(f"t-{run}", *COMMANDS[run], run=run)
            wait_until(lambda run=run: box.show(run)["status"] == "running", f"{run} runs")
            live[run] = watchers(box, run)
        box.submit("t-unborn", "sleep", "600")
        box.submit("t-unborn", *COMMANDS["unborn"], run="unborn")
        live["unborn"] = watchers(box, "unborn")
        live["missing"] = {"submit": box.popen(*ways("missing")["submit"])}
        box.runctl("abort", "t-stopped")
        box.runctl("abort", "t-unborn", "--run", "unborn")
        (box.path / "go").touch()
        seen = {run: codes(live[run]) for run in live if run != "poison"}
        (box.path / "die").touch()
        box.daemon.wait(DEADLINE)
        box.start()
        seen["poison"] = codes(live["poison"])
        yield box, seen
    finally:
        box.close()


@pytest.mark.parametrize("run", ENDINGS)
def test_all_ways_agree(ended: tuple[Box, dict[str, dict]], run: str) -> None:
    box, seen = ended
    code, status = ENDINGS[run]
    wait_until(lambda: box.show(run)["status"] == status, f"it is recorded as {status}")
    assert set(seen[run].values()) == {code}, ("live", seen[run])
    after = codes(watchers(box, run))
    assert set(after.values()) == {code}, ("afterwards", after)
    box.runctl("purge", f"t-{run}", "--yes")
    purged = codes(watchers(box, run))
    assert set(purged.values()) == {code}, ("purged", purged)


def test_ctrl_c_and_timeout(box: Box) -> None:
    box.submit("t", "sleep", "600", run="long")
    wait_until(lambda: box.show("long")["status"] == "running", "it goes on, when left")
    args = {
        "wait": ("wait", "long"),
        "attach": ("attach", "t"),
        "submit": ("submit", "t", "--id", "long", "--attach", "--", "sleep", "600"),
    }
    for json_ in ((), ("--json",)):
        for name, words in args.items():
            timeout = (*json_, words[0], "--timeout", "300ms", *words[1:])
            out = box.runctl(*timeout, code=1)
            assert "it goes on" in box.stderr, name
            if json_:
                assert [json.loads(line)["type"] for line in out.splitlines()] in ([], ["reset"])
        processes = [box.popen(*json_, *words) for words in args.values()]
        for process in processes:
            # Connected, so past its imports.
            wait_until(lambda p=process: connected(p.pid), "connected")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=DEADLINE)
            # Interrupted in an import Python may end by the signal itself: a shell's 130.
            assert process.returncode in (130, -signal.SIGINT)
            assert err.count(b"the run goes on") == 1, err
    assert box.show("long")["status"] == "running"
    box.runctl("submit", "t", "--timeout", "1s", "--", "true", code=2)


def connected(pid: int) -> bool:
    return any(name.startswith("socket:") for name in open_files(pid).values())
