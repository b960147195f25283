"""When runs were submitted, began and ended: real times, to the millisecond."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from datetime import datetime
from typing import Any

import pytest
from conftest import Box, wait_until
from runctl.cli.display import render

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
#: Clocks are read in ns, and shown in ms.
MS = 0.001
TIMES = ("created_at", "started_at", "ended_at")


@pytest.fixture
def patient(stopped_box: Box) -> Box:
    """What is aborted is not killed within a test."""
    stopped_box.configure('[queue]\nstop_grace = "60s"\n')
    stopped_box.start()
    return stopped_box


def unix(stamp: str) -> float:
    assert STAMP.fullmatch(stamp)
    return datetime.fromisoformat(stamp).timestamp()


def end(box: Box, run: str, code: int = 0) -> Any:
    """The run as it is shown once its end, with this exit code of ``wait``, is recorded."""
    box.runctl("wait", run, code=code)
    wait_until(lambda: box.show(run)["ended_at"], "its end is recorded")
    return box.show(run)


def times(box: Box, run: str) -> tuple[Any, ...]:
    row = box.show(run)
    return tuple(row[name] and unix(row[name]) for name in TIMES)


def test_a_short_run_has_its_own_times(box: Box) -> None:
    """What it printed of the clock lies between them, and they are not whole seconds."""
    code = "import time; print(time.time()); time.sleep(0.25); print(time.time())"
    asked = time.time()
    found = []
    for i in range(3):
        run = box.submit_py("t", code, run=f"r{i}")
        end(box, run)
        first, last = map(float, box.runctl("attach", "t", "--run", run).split())
        created, started, ended = times(box, run)
        assert asked - MS <= created <= started <= first
        assert last - MS <= ended <= time.time()
        found += [created, started, ended]
        shown = box.runctl("show", run)
        assert re.search(r"duration: +\d+\.\d+s", shown), shown
        assert float(re.findall(r"duration: +([\d.]+)s", shown)[0]) >= 0.25
    assert any(moment % 1 for moment in found)


def test_an_aborted_run_began_and_ended(patient: Box) -> None:
    box = patient
    trap = "trap 'sleep 0.4; date +%s.%N > gone; exit' TERM; date +%s.%N; "
    trap += "while :; do sleep 0.05; done"
    box.submit("t", "sh", "-c", trap, run="running")
    box.submit("t", "true", run="waiting")
    wait_until(lambda: box.runctl("attach", "t", "--run", "running", "--no-follow"), "it runs")
    box.runctl("abort", "t", "--queued")
    began = float(box.runctl("attach", "t", "--run", "running", code=5))
    gone = float((box.path / "gone").read_text())
    wait_until(lambda: times(box, "running")[2] >= gone - MS, "the end of its processes is noted")
    created, started, _ = times(box, "running")
    assert created <= started <= began
    created, started, ended = times(box, "waiting")
    assert started is None
    assert created <= ended
    rows = {row["run"]: row for row in box.json("list", "t")}
    assert rows["running"]["started_at"] == box.show("running")["started_at"]
    before = [box.show(run) for run in ("running", "waiting")]
    box.term()
    box.start()
    assert [box.show(run) for run in ("running", "waiting")] == before


def test_an_abort_that_a_crash_cut_keeps_its_times(patient: Box) -> None:
    box = patient
    box.submit("t", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done", run="cut")
    wait_until(lambda: box.runctl("attach", "t", "--no-follow"), "it runs")
    aborting = box.popen("abort", "t")
    wait_until(lambda: box.show("cut")["status"] == "aborted", "its row says so")
    before = times(box, "cut")
    box.kill()
    aborting.wait()
    assert None not in before
    box.start()
    box.runctl("wait", "cut", code=5)
    assert times(box, "cut") == before


def change(box: Box, *statements: str) -> None:
    with sqlite3.connect(box.state / "runctl.sqlite") as database:
        for statement in statements:
            database.execute(statement)
    database.close()


def test_an_end_that_is_adopted_keeps_its_times(box: Box) -> None:
    """The daemon was killed between the end of the stream and the outcome of the row."""
    box.submit("t", "sh", "-c", "sleep 0.1; exit 3", run="r")
    before = end(box, "r", 1)
    box.term()
    box.unwrite_end("r")
    box.start()
    after = end(box, "r", 1)
    assert after["attempt"] == before["attempt"]
    for name in (*TIMES, "exit_code", "error"):
        assert after[name] == before[name], name


def test_times_of_an_older_version_are_shown_without_decimals(box: Box) -> None:
    for run in ("new", "old"):
        end(box, box.submit(run, "true", run=run))
    made = box.submit("made", "true")
    created = end(box, made)["created_at"]
    box.term()
    second = (int(time.time()) - 3600) * 1000
    change(
        box,
        f"UPDATE workflow_status SET created_at = {second}, started_at_epoch_ms = {second},"
        f" completed_at = {second + 2000} WHERE workflow_uuid = 'old'",
        "UPDATE workflow_status SET created_at = created_at / 1000 * 1000",
        """UPDATE workflow_output SET output = '{"status": "succeeded", "exit_code": 0}'
        WHERE workflow_uuid = 'old'""",
    )
    box.start()
    old = box.show("old")
    assert [unix(old[name]) * 1000 for name in TIMES] == [second, second, second + 2000]
    shown = box.runctl("show", "old")
    assert re.search(r"duration: +2s\n", shown)
    assert ".000" not in shown
    assert ".000" not in box.runctl("list", "old")
    assert "." in box.runctl("show", "new").partition("started: ")[2].partition("\n")[0]
    assert abs(unix(box.show(made)["created_at"]) - unix(created)) < 0.5, "its id has the time"
    assert json.loads(box.runctl("list", "--json"))


@pytest.mark.short
def test_durations() -> None:
    def passed(started: str, ended: str) -> str:
        return render.duration(f"2026-01-01T00:00:{started}Z", f"2026-01-01T00:00:{ended}Z")

    assert passed("01.500", "01.540") == "0.04s"
    assert passed("01.100", "03.150") == "2.0s"
    assert passed("01.000", "03.000") == "2s"
    assert passed("01.000", "01.000") == "<1s"
    assert passed("01.000", "41.000") == "40s"
    assert render.duration(None, None) == "-"
    assert render.moment("2026-01-01T00:00:01.000Z") == "2026-01-01T00:00:01Z"
    assert render.moment("2026-01-01T00:00:01.010Z") == "2026-01-01T00:00:01.010Z"
