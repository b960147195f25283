"""A program that names its session itself: its thread's later runs are told, and later attempts."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from conftest import Box, Watch, wait_until
from runctl.client import run as inside

#: Says its session, and names one: that of argv[1], or the one that it has. It stays while the
#: file argv[2] is there.
PROGRAM = r"""
import os, sys, time
from runctl.client import run
print("session", run.session(), flush=True)
try:
    run.name_session(sys.argv[1])
    print("named", flush=True)
except Exception as error:
    print("refused:", error, flush=True)
while os.path.exists(sys.argv[2]):
    time.sleep(0.02)
"""


def submit(box: Box, path: Path, name: str, thread: str = "t") -> str:
    argv = (sys.executable, "-c", PROGRAM, name, str(path / "hold"))
    return box.runctl("submit", thread, "--", *argv).strip()


def read(box: Box, run: str, thread: str = "t") -> list[str]:
    watch = Watch(box, "--run", run, thread)
    assert watch.wait() == 0
    return watch.text().splitlines()


def test_later_runs_of_the_thread_have_it(box: Box, tmp_path: Path) -> None:
    first, other = submit(box, tmp_path, "one"), submit(box, tmp_path, "far", "other")
    assert read(box, first) == ["session None", "named"]
    assert box.show(first)["session"] == "one"
    assert read(box, submit(box, tmp_path, "two:2.a@b")) == ["session one", "named"]
    assert box.runctl("session", "show", "t").split()[-1] == "two:2.a@b"
    assert read(box, other, "other") == ["session None", "named"]
    box.runctl("session", "forget", "t")
    assert read(box, submit(box, tmp_path, "three")) == ["session None", "named"]


def test_it_is_durable_before_the_answer(box: Box, tmp_path: Path) -> None:
    """A run that starts over, after its keeper has died too, has it."""
    (tmp_path / "hold").touch()
    run = submit(box, tmp_path, "one")
    watch = Watch(box, "--run", run, "t")
    wait_until(lambda: "named" in watch.text(), "it has named its session")
    box.kill()
    (tmp_path / "hold").unlink()
    box.start()
    assert watch.wait() == 0
    assert watch.text().splitlines()[-2:] == ["session one", "named"]
    assert [e["type"] for e in watch.events].count("reset") == 2, "a session alone is no checkpoint"


def test_what_is_no_name(box: Box, tmp_path: Path) -> None:
    for name in ("", "-x", "a b", "x" * 201, "é", "a/b"):
        said = read(box, submit(box, tmp_path, name))
        assert said[1].startswith("refused: a session's name is 1 to 200 of A-Z a-z 0-9 _ . : @ -")
    assert json.loads(box.runctl("session", "show", "t", "--json")) == []


def test_runs_without_sessions_make_no_table(box: Box) -> None:
    """A role that may not create tables runs commands all the same."""
    run = box.runctl("submit", "t", "--", "true").strip()
    box.runctl("wait", run)
    box.show(run)
    with sqlite3.connect(f"file:{box.state / 'runctl.sqlite'}?mode=ro", uri=True) as connection:
        tables = {x[0] for x in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    assert "workflow_status" in tables
    assert "runctl_sessions" not in tables


def test_outside_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNCTL_SOCKET", raising=False)
    monkeypatch.delenv("RUNCTL_SESSION", raising=False)
    assert inside.session() is None
    with pytest.raises(inside.NotInside):
        inside.name_session("x")
