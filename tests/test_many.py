"""Several threads at once, and the executor that goes while NATS stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, SLACK, Box, wait_until
from natsserver import Node
from test_terminal import TALK, Terminal

THREADS = ("alpha", "日本語 thread", "a thread with a name that is far too long")


def lines_of(text: str, thread: str) -> list[str]:
    """What stands behind the thread's name, whatever was cut and padded."""
    name = thread[:19]
    return [line.partition(" | ")[2] for line in text.splitlines() if line.startswith(name[:4])]


def test_several_threads_each_line_with_its_name(box: Box) -> None:
    for n, thread in enumerate(THREADS):
        code = f"import sys\nfor i in range(5): print({n}, i)\nsys.exit({n and 3})"
        box.submit_py(thread, code)
    out = box.runctl("attach", *THREADS, code=1)
    for n, thread in enumerate(THREADS):
        assert lines_of(out, thread) == [f"{n} {i}" for i in range(5)]
    bars = {line.encode()[:40].decode(errors="ignore").index(" | ") for line in out.splitlines()}
    assert len(bars) <= 2, "the bars stand in one column (a wide character takes two)"
    assert box.stderr.count("failed: ") == 2
    assert box.runctl("attach", "alpha", "alpha") == "".join(f"0 {i}\n" for i in range(5))
    events = [json.loads(s) for s in box.runctl("attach", *THREADS, "--json", code=1).splitlines()]
    for thread in THREADS:
        mine = [e for e in events if e["thread"] == thread]
        assert [e["seq"] for e in mine if e["type"] == "chunk"] == list(range(1, len(mine) - 1))
        assert (mine[0]["type"], mine[-1]["type"]) == ("reset", "end")


def test_codes_of_several_runs_and_bad_usage(box: Box) -> None:
    for thread, argv in (("good", ["true"]), ("bad", ["false"]), ("stopped", ["sleep", "600"])):
        box.submit(thread, *argv)
    wait_until(lambda: box.json("list", "stopped")[0]["status"] == "running", "running")
    box.runctl("abort", "stopped")
    box.runctl("attach", "good", "stopped", code=5)
    box.runctl("attach", "stopped", "bad", "good", code=1)
    assert box.runctl("attach", "good", "nobody", code=3) == ""
    assert box.stderr.startswith("runctl: no thread 'nobody'; ")
    for args in (
        ("good", "--all"),
        (),
        ("good", "bad", "--run", "x"),
        ("good", "bad", "--raw"),
        ("--all", "--no-follow", "-f"),
    ):
        assert box.runctl("attach", *args, code=2) == ""
        assert box.stderr.count("\n") == 1

    def recorded() -> bool:
        rows = [box.json("list", thread)[0] for thread in ("good", "bad", "stopped")]
        return all(row["status"] != "running" for row in rows)

    wait_until(recorded, "the ends that were shown are recorded")
    assert box.runctl("attach", "--all") == ""
    assert box.stderr == "runctl: nothing is running\n"


def test_all_that_runs_and_what_comes(box: Box) -> None:
    for thread in ("one", "two"):
        box.submit_py(thread, TALK, str(box.path))
    box.runctl("wait", box.submit("over", "echo", "long ago"))
    wait_until(lambda: len(box.json("list", "--status", "running")) == 2, "both run")
    file = box.path / "seen"
    with file.open("wb") as out:
        watcher = box.popen("attach", "--all", "-f", "--grep", "line|news|next", stdout=out)
    kept = box.path / "kept"
    with kept.open("wb") as out:
        both = box.popen("attach", "--all", "--timeout", f"{DEADLINE:g}s", stdout=out)

    def shows(text: bytes) -> bool:
        return text in file.read_bytes()

    wait_until(lambda: kept.read_bytes().count(b"first line") == 2, "what runs is attached to")
    wait_until(lambda: shows(b"one | first line"), "the first thread")
    wait_until(lambda: shows(b"two | first line"), "the second thread")
    box.submit("three", "echo", "news")
    box.submit("one", "echo", "next run")
    wait_until(lambda: shows(b"three | news"), "a thread that began later")
    (box.path / "go1").touch()
    wait_until(lambda: shows(b"one | next run"), "the next run of a thread")
    seen = file.read_bytes()
    assert seen.count(b"first line") == 2
    assert b"long ago" not in seen
    assert both.wait(DEADLINE) == 0
    assert kept.read_bytes().count(b"half a line, whole now") == 2
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=DEADLINE)
    assert watcher.returncode == 130
    assert b"detached; the runs go on. Attach again: runctl attach --all" in err


def test_two_recoveries_on_one_terminal(box: Box) -> None:
    for thread in ("one", "two"):
        box.submit_py(thread, TALK, str(box.path))
    terminal = Terminal(box, "attach", "one", "two")
    wait_until(lambda: terminal.text().count("same again") == 2, "both have begun")
    box.kill()
    terminal.until("connection lost; waiting for runctld")
    box.start()
    wait_until(lambda: b"recovering, attempt 2" in terminal.raw, "said that it is recovered")
    (box.path / "go2").touch()
    assert terminal.wait() == 0
    lines = terminal.text().splitlines()
    for thread in ("one", "two"):
        assert [line for line in lines if line.startswith(thread)] == [
            f"{thread} | first line",
            f"{thread} | same again",
            f"{thread} | half a line, whole now",
        ]
    assert len(lines) == 6, lines


def test_names_have_colours_unless_they_are_unwanted(box: Box) -> None:
    for thread in ("one", "two"):
        box.submit(thread, "echo", "hello")
    coloured = Terminal(box, "attach", "one", "two", columns=30)
    assert coloured.wait() == 0
    assert b"\x1b[36mone | \x1b[0mhello" in coloured.raw
    assert b"\x1b[33mtwo | \x1b[0mhello" in coloured.raw
    plain = Terminal(box, "attach", "one", "two", env={"NO_COLOR": "1"})
    assert plain.wait() == 0
    assert b"\x1b[" not in plain.raw
    assert sorted(plain.text().splitlines()) == ["one | hello", "two | hello"]


@pytest.mark.nightly
def test_a_closed_pipe_ends_it_quietly(box: Box) -> None:
    for thread in ("one", "two"):
        box.submit_py(thread, "for i in range(20_000): print(i)")
    for args in (("one",), ("one", "two"), ("one", "--json"), ("one", "--timestamps")):
        client = box.popen("attach", *args)
        head = subprocess.run(
            ["head", "-n", "1"], stdin=client.stdout, capture_output=True, timeout=DEADLINE
        )
        assert client.stdout is not None
        client.stdout.close()
        assert head.stdout
        assert client.wait(DEADLINE) == 0
        assert client.stderr is not None
        assert client.stderr.read() == b""


# ---- a NATS of its own -----------------------------------------------------------------


@pytest.fixture
def apart(stopped_box: Box, tmp_path: Path) -> Iterator[Box]:
    """A daemon whose NATS is not its child."""
    (tmp_path / "own").mkdir()
    server = Node(tmp_path / "own")
    server.start()
    stopped_box.configure(f'[nats]\nurl = "{server.url}"\n')
    stopped_box.start()
    try:
        yield stopped_box
    finally:
        stopped_box.close()
        server.kill()


@pytest.mark.nightly
def test_a_daemon_that_goes_while_nats_stays_is_missed(apart: Box) -> None:
    box = apart
    run = box.submit_py("t", TALK, str(box.path))
    executor = box.show(run)["executor"] or box.json("status")["executor_id"]
    terminal = Terminal(box, "attach", "t", columns=100)
    terminal.until("half a")
    box.kill()
    terminal.until(f"runctl: executor {executor} is gone; waiting for it to come back")
    pipe = box.popen("attach", "t", "--timeout", f"{3 * SLACK}s")
    out, err = pipe.communicate(timeout=DEADLINE)
    assert out == b"first line\nsame again\nhalf a "
    assert b"is gone" not in err, "not said where it cannot be taken back"
    box.start()
    wait_until(lambda: "is gone" not in terminal.text(), "it is back")
    (box.path / "go2").touch()
    assert terminal.wait() == 0
    assert terminal.text() == "first line\nsame again\nhalf a line, whole now"


def test_a_wait_says_what_it_waits_for(box: Box) -> None:
    run = box.submit_py("t", TALK, str(box.path))
    terminal = Terminal(box, "wait", run)
    terminal.until(f"runctl: run {run}: running")
    box.kill()
    terminal.until("connection lost")
    piped = box.popen("wait", run)
    assert piped.wait(DEADLINE) == 4
    box.start()
    terminal.until(f"run {run}: running, attempt 2")
    (box.path / "go2").touch()
    assert terminal.wait() == 0
    assert terminal.text() == "succeeded"


def test_an_abort_says_what_it_waits_for(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[queue]\nstop_grace = '1h'\n")
    box.start()
    code = "import os, signal, time; signal.signal(15, signal.SIG_IGN)"
    code += "; print(os.getpid(), flush=True); time.sleep(600)"
    run = box.submit("t", sys.executable, "-c", code)
    pid = int(wait_until(lambda: box.runctl("attach", "t", "--no-follow"), "it has begun"))
    terminal = Terminal(box, "abort", "t")
    terminal.until("runctl: ending the processes of t")
    os.kill(pid, signal.SIGKILL)
    assert terminal.wait() == 0
    assert terminal.text() == f"aborted {run}"
