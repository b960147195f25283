"""Which attempts count towards ``max_attempts``, and what is told of each."""

from __future__ import annotations

import itertools
import socket
import sqlite3
import sys
from pathlib import Path

from conftest import Box, wait_until
from house import House

WAITS = r"""
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
print("attempt", os.environ["RUNCTL_ATTEMPT"], flush=True)
(here / f"up-{os.environ['RUNCTL_ATTEMPT']}").touch()
while not (here / "go").exists():
    time.sleep(0.02)
"""


def submit_waiting(box: Box, path: Path) -> str:
    return box.runctl("submit", "t", "--", sys.executable, "-c", WAITS, str(path)).strip()


def wait_up(path: Path, attempt: int) -> None:
    wait_until((path / f"up-{attempt}").exists, f"attempt {attempt} works")


def wait_stored(box: Box, attempt: int) -> None:
    said = f"attempt {attempt}\n"
    wait_until(lambda: box.runctl("attach", "t", "--no-follow") == said, "its output is stored")


def test_only_deaths_count(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure("[queue]\nmax_attempts = 2\n")
    box.start()
    run = submit_waiting(box, tmp_path)
    for attempt in range(1, 5):
        wait_up(tmp_path, attempt)
        wait_stored(box, attempt)
        assert box.term() == 0
        box.start()
    wait_up(tmp_path, 5)
    wait_stored(box, 5)
    box.kill()
    box.start()
    wait_up(tmp_path, 6)
    shown = box.show(run)
    assert [x["end"] for x in shown["attempts"]] == ["stopped"] * 4 + ["died", None]
    assert [x["attempt"] for x in shown["attempts"]] == [1, 2, 3, 4, 5, 6]
    assert [x["void_bytes"] for x in shown["attempts"]] == [0, *[len("attempt n\n")] * 5]
    assert all(x["executor"] == shown["executor"] for x in shown["attempts"])
    times = [(x["started_at"], x["ended_at"]) for x in shown["attempts"]]
    assert all(began <= ended for began, ended in times[:-1])
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))
    assert times[-1][1] is None
    said = box.runctl("show", run)
    assert said.count("its daemon was stopped") == 4
    assert said.count("started over; 10 B of output void") == 5
    assert said.count("its daemon, or machine, died") == 1
    box.kill()
    box.start()
    box.runctl("wait", run, code=1)
    shown = box.show(run)
    assert shown["status"] == "dead"
    assert shown["error"] == "its daemon died in 2 attempts; not tried again"
    assert [x["end"] for x in shown["attempts"][-3:]] == ["died", "died", "dead"]


def test_the_first_one_died(box: Box, tmp_path: Path) -> None:
    """Nothing was noted of it: its own output says when and where it was."""
    run = submit_waiting(box, tmp_path)
    wait_up(tmp_path, 1)
    wait_stored(box, 1)
    began = box.show(run)["started_at"]
    box.kill()
    box.start()
    wait_up(tmp_path, 2)
    (tmp_path / "go").touch()
    box.runctl("wait", run)
    first, second = box.show(run)["attempts"]
    assert (first["end"], second["end"]) == ("died", "succeeded")
    assert first["executor"] == second["executor"]
    assert began <= first["started_at"] <= first["ended_at"] <= second["started_at"]
    assert (first["void_bytes"], second["void_bytes"]) == (0, 10)


def test_a_run_that_was_never_interrupted(box: Box) -> None:
    run = box.submit("t", "true")
    box.runctl("wait", run)
    shown = box.show(run)
    (only,) = shown["attempts"]
    assert (only["attempt"], only["end"], only["after"]) == (1, "succeeded", None)
    assert (only["started_at"], only["ended_at"]) == (shown["started_at"], shown["ended_at"])
    assert "attempt 1" not in box.runctl("show", run)


def test_an_end_that_is_found_is_of_the_attempt_that_stored_it(box: Box) -> None:
    """The daemon died between the end's record and its row: the next one only finds it."""
    run = box.submit_py("t", "import sys; print('once'); sys.exit(7)")
    box.runctl("wait", run, code=1)
    box.kill()
    box.unwrite_end(run)
    box.start()
    box.runctl("wait", run, code=1)
    shown = box.show(run)
    assert (shown["status"], shown["exit_code"], shown["attempt"]) == ("failed", 7, 1)
    assert [(x["attempt"], x["end"]) for x in shown["attempts"]] == [(1, "failed")]
    assert box.runctl("attach", "t", "--no-follow", code=1) == "once\n"


def test_a_restart_does_not_count_for_a_chat(stopped_box: Box) -> None:
    box = stopped_box
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        box.configure(
            '[queue]\noutlive = "30s"\nmax_attempts = 1\n'
            f'[runners.c]\nkind = "chat"\nbase_url = "{url}"\nmodel = "m"\ntimeout = "10m"\n'
        )
        box.start(cold=True)
        run = box.runctl("submit", "t", "--runner", "c", "hello").strip()
        for attempt in (1, 2, 3):
            wait_until(lambda n=attempt: box.show(run)["attempt"] == n, f"attempt {attempt}")
            wait_until(lambda: box.show(run)["status"] == "running", "it runs")
            box.runctl("restart", "--wait", "60s")
        shown = wait_until(lambda: (x := box.show(run))["attempt"] == 4 and x, "it goes on")
        assert [x["end"] for x in shown["attempts"]] == ["stopped"] * 3 + [None]


def test_what_is_forgotten(stopped_box: Box, tmp_path: Path) -> None:
    """With a run goes what was noted of it."""
    box = stopped_box
    box.configure("[history]\nmax_runs = 1\n")
    box.start()
    run = submit_waiting(box, tmp_path)
    wait_up(tmp_path, 1)
    box.term()
    box.start()
    wait_up(tmp_path, 2)
    (tmp_path / "go").touch()
    box.runctl("wait", run)
    assert len(notes(box)) == 2
    for _ in range(3):
        box.runctl("wait", box.submit("u", "true"))
    wait_until(lambda: notes(box) == [], "its notes are gone")


def notes(box: Box) -> list[tuple[str, int]]:
    with sqlite3.connect(f"file:{box.state / 'runctl.sqlite'}?mode=ro", uri=True) as db:
        found = db.execute("SELECT run, attempt FROM runctl_attempts").fetchall()
    db.close()
    return found


def test_another_executor_tells_it(house: House, tmp_path: Path) -> None:
    takeover = "[takeover]\nenabled = true\nafter = '2s'\n[queue]\noutlive = '0s'\n"
    a = house.box("a", takeover)
    run = house.bus.submit("t", [sys.executable, "-c", WAITS, str(tmp_path)], "a")
    wait_up(tmp_path, 1)
    b = house.box("b", takeover)
    assert a.term() == 0
    wait_up(tmp_path, 2)
    c = house.box("c", takeover)
    b.kill()
    wait_up(tmp_path, 3)
    attempts = c.show(run)["attempts"]
    assert [(x["executor"], x["end"]) for x in attempts] == [
        ("a", "stopped"),
        ("b", "died"),
        ("c", None),
    ]
    (tmp_path / "go").touch()
    c.runctl("wait", run)
