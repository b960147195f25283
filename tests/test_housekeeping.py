"""Finished runs are forgotten by age and by count; what is live or still needed stays."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from contextlib import closing

import pytest
from conftest import Box, daemon_with, wait_until


def listed(box: Box, thread: str) -> list[str]:
    answer = box.runctl("list", thread, "--json", code=None)
    return [row["run"] for row in json.loads(answer)] if answer else []


def finish(box: Box, thread: str, count: int = 1) -> list[str]:
    runs = [str(uuid.uuid4()) for _ in range(count)]
    for run in runs:
        box.runctl("submit", thread, "--id", run, "--attach", "--", "true")
    return runs


def test_age_counts_from_the_end(stopped_box: Box) -> None:
    box = stopped_box
    box.configure('[history]\nmax_age = "4s"\n')
    box.start()
    live = box.submit("live", "sleep", "1000")
    box.submit("aborted", "sleep", "1000")
    box.runctl("abort", "aborted")
    finish(box, "old", 2)
    wait_until(lambda: listed(box, "old") == [], "they are forgotten by their age")
    assert listed(box, "live") == [live]
    assert box.show(live)["status"] == "running"
    wait_until(lambda: listed(box, "aborted") == [], "an aborted one too")
    box.runctl("abort", "live")
    box.kill()
    due = time.time() + 4
    wait_until(lambda: time.time() > due, "its age is reached while there is no daemon")
    box.start()
    wait_until(lambda: listed(box, "live") == [], "a start catches up")


def test_what_hooks_leave_goes_as_well(stopped_box: Box) -> None:
    box = stopped_box
    told = box.path / "told"
    box.configure(f'[history]\nmax_age = "3s"\n[hooks]\non_end = ["touch", "{told}"]\n')
    box.start()
    finish(box, "t")

    def rows() -> list[str]:
        with closing(sqlite3.connect(box.state / "runctl.sqlite")) as db:
            return [name for (name,) in db.execute("SELECT name FROM workflow_status")]

    wait_until(told.exists, "its hook was told, so that it had a row as well")
    wait_until(lambda: rows() == [], "both are forgotten")


@pytest.mark.nightly
def test_the_oldest_ends_go_when_there_are_too_many(stopped_box: Box) -> None:
    """Counted as soon as each is recorded: a moment earlier the last one would be missed."""
    box = stopped_box
    box.prefix = daemon_with("upkeep.history_retention.PACE", 0.0)
    box.configure("[history]\nmax_runs = 3\n")
    box.start()
    live = box.submit("live", "sleep", "1000")
    finish(box, "a", 3)
    kept = finish(box, "b", 3)
    wait_until(lambda: listed(box, "a") == [], "the first three went")
    assert sorted(listed(box, "b")) == sorted(kept)
    assert listed(box, "live") == [live]
    box.term()
    box.configure("[history]\nmax_runs = 1\n")
    box.start()
    wait_until(lambda: listed(box, "b") == kept[-1:], "a start catches up")


def test_what_the_next_turn_refers_to_stays(stopped_box: Box) -> None:
    """A thread in use keeps as many of its newest runs as a chat looks back; others none."""
    box = stopped_box
    chat = '[runners.c]\nkind = "chat"\nbase_url = "http://127.0.0.1:9"\nmodel = "m"\nhistory = 2\n'
    box.configure(f'[history]\nmax_age = "3s"\n{chat}')
    box.start()
    go = box.path / "go"
    wait = f"while ! [ -e {go} ]; do sleep 0.05; done"
    box.submit("used", "sh", "-c", wait)
    used = [box.submit("used", "true") for _ in range(4)]
    live = box.submit("used", "sleep", "1000")
    go.touch()
    finish(box, "unused", 2)
    wait_until(lambda: listed(box, "unused") == [], "of a thread that nobody uses none stays")
    wait_until(lambda: sorted(listed(box, "used")) == sorted([live, *used[-2:]]), "two stay")
    box.term()
    box.start()
    assert sorted(listed(box, "used")) == sorted([live, *used[-2:]])


def forget(box: Box, run: str) -> None:
    """With max_runs = 1: more runs, until this one is not known any more."""

    def gone() -> bool:
        finish(box, "others")
        box.runctl("show", run, code=None)
        return f"no run '{run}'" in box.stderr

    wait_until(gone, f"{run} is forgotten")


def test_the_id_of_a_forgotten_run_counts_as_new(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[history]\nmax_runs = 1\n")
    box.start()
    box.submit("aborted", "sleep", "1000", run="again")
    wait_until(lambda: box.show("again")["status"] == "running", "it runs")
    box.runctl("abort", "aborted")
    forget(box, "again")
    box.submit("finished", "echo", "first", run="again")
    assert box.runctl("wait", "again").strip() == "succeeded", "not what became of the first"
    forget(box, "again")
    box.submit("finished", "echo", "second", run="again")
    assert box.runctl("wait", "again").strip() == "succeeded"
    assert box.runctl("attach", "finished", "--run", "again") == "second\n"


def test_a_run_whose_hook_waits_for_its_next_try_stays(stopped_box: Box) -> None:
    box = stopped_box
    told, up = box.path / "told", box.path / "up"
    script = f"test -e {up} && echo $RUNCTL_RUN >> {told}"
    hook = f'on = ["failed"]\ntries = 100\nbackoff = "100ms"\non_end = ["sh", "-c", "{script}"]'
    box.configure(f"[history]\nmax_runs = 1\n[hooks]\n{hook}\n")
    box.start()
    run = box.submit("t", "false")
    box.runctl("wait", run, code=None)
    for _ in range(3):
        finish(box, "others", 2)
        wait_until(lambda: len(listed(box, "others")) <= 2, "others are forgotten")
    up.touch()
    wait_until(told.exists, "the hook is told")
    forget(box, run)
    assert told.read_text().split() == [run]
