"""What a run says of itself while it works: a line for lists, and what it has used."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import Box, wait_until
from house import House
from runctl.cli.top.board import Board
from runctl.client.run import note
from runctl.protocol.errors import BadRequest
from runctl.protocol.model import Run, Status, ThreadRow
from runctl.supervisor.execution.run_notes import read_usage
from runctl.supervisor.execution.runners.run_files import SOCKET, RunFiles
from test_checkpoints import talk

#: Says what stands in files named "1", "2", ..., each once it is there.
SAYS = r"""
import os, pathlib, sys, time
from runctl.client import run
here = pathlib.Path(sys.argv[1])
n = len(list(here.glob("*.done"))) + 1
while not (here / "end").exists():
    if (here / str(n)).exists():
        status, *usage = (here / str(n)).read_text().split("|")
        used = {k: float(v) for k, v in (x.split("=") for x in usage)}
        run.note(status if status != "-" else None, usage=used)
        (here / f"{n}.done").touch()
        n += 1
    time.sleep(0.02)
"""


def submit(box: Box, path: Path) -> str:
    return box.runctl("submit", "t", "--", sys.executable, "-c", SAYS, str(path)).strip()


def say(path: Path, n: int, text: str) -> None:
    (path / f"{n}.new").write_text(text)
    (path / f"{n}.new").rename(path / str(n))
    wait_until((path / f"{n}.done").exists, f"it has said {n}")


def test_lists_show_its_line_while_it_runs(box: Box, tmp_path: Path) -> None:
    run = submit(box, tmp_path)
    say(tmp_path, 1, "step 3  of\n7")
    (thread,) = box.json("list")
    assert thread["run"]["status_text"] == "step 3 of 7"
    (row,) = box.json("list", "t")
    assert row["status_text"] == "step 3 of 7"
    assert box.show(run)["status_text"] == "step 3 of 7"
    assert "step 3 of 7 (" in box.runctl("list")
    assert "step 3 of 7 (" in box.runctl("list", "t")
    assert "says:" in box.runctl("show", run)
    say(tmp_path, 2, "\x1b[2J" + "x" * 1000)
    shown = box.show(run)["status_text"]
    assert "\x1b" not in shown
    assert len(shown) <= 210
    say(tmp_path, 3, "")
    assert "status_text" not in box.json("list", "t")[0] or not box.show(run)["status_text"]
    say(tmp_path, 4, "nearly")
    (tmp_path / "end").touch()
    box.runctl("wait", run)
    assert not box.show(run).get("status_text")
    assert box.json("list", "t")[0].get("status_text") is None


def test_what_is_used_is_added_up_over_deaths(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure('[queue]\noutlive = "30s"\n')
    box.start()
    run = submit(box, tmp_path)
    say(tmp_path, 1, "-|input=1200|output=300|cost=0.25")
    say(tmp_path, 2, "-|input=800")
    os.kill(box.pid, signal.SIGKILL)  # the run goes on
    assert box.daemon is not None
    box.daemon.wait(60)
    box.start()
    say(tmp_path, 3, "-|cost=0.5|cached=7")
    wait_until(lambda: box.show(run)["attempt"] == 1, "the same attempt")
    used = {"input": 2000, "output": 300, "cost": 0.75, "cached": 7}
    assert box.show(run)["usage"] == used
    os.kill(box.json("status")["keeper"]["pid"], signal.SIGKILL)
    box.kill()
    box.start()
    say(tmp_path, 4, "-|input=1|output=1")
    shown = box.show(run)
    assert shown["usage"] == used | {"input": 2001, "output": 301}
    assert [x["usage"] for x in shown["attempts"]] == [used, {"input": 1, "output": 1}]
    (tmp_path / "end").touch()
    box.runctl("wait", run)
    assert "used:" in (said := box.runctl("show", run))
    assert "cost 0.75, input 2,001, output 301" in said


def test_what_is_said_again_is_counted_once(box: Box) -> None:
    box.submit("t", "sleep", "600", run="sleeper")
    path = RunFiles(box.state).path("sleeper", SOCKET, None)
    wait_until(path.exists, "its socket is there")
    assert talk(path, *[b"USAGE id=a input=5\n"] * 3, b"USAGE id=b input=2\n") == ["OK"] * 4
    assert talk(path, b"USAGE input=1\n", b"USAGE input=1\n") == ["OK", "OK"]
    assert box.show("sleeper")["usage"] == {"input": 9}
    assert talk(
        path,
        b"USAGE\n",
        b"USAGE id=c\n",
        b"USAGE input\n",
        b"USAGE input=x\n",
        b"USAGE input=-1\n",
        b"USAGE input=inf\n",
        b"USAGE In=1\n",
        b"USAGE " + b" ".join(b"n%d=1" % n for n in range(20)) + b"\n",
    ) == [
        "ERROR what was used is missing: NAME=NUMBER, as in input=1200 output=300",
        "ERROR what was used is missing: NAME=NUMBER, as in input=1200 output=300",
        "ERROR 'input' is no NAME=NUMBER, as in input=1200",
        "ERROR input is no number from 0 on: 'x'",
        "ERROR input is no number from 0 on: '-1'",
        "ERROR input is no number from 0 on: 'inf'",
        "ERROR 'In=1' is no NAME=NUMBER, as in input=1200",
        "ERROR more than 16 names: input, " + ", ".join(sorted(f"n{n}" for n in range(20))),
    ]
    assert box.show("sleeper")["usage"] == {"input": 9}


def test_the_command(box: Box, tmp_path: Path) -> None:
    runctl = f"{sys.executable} -m runctl.cli.main"
    script = (
        f"{runctl} note 'half done' --usage input=3 --usage cost=0.5 && echo said"
        f"; {runctl} note --usage input=4; {runctl} note; echo $?"
        f"; {runctl} note --usage input; echo $?; {runctl} note --usage input=-4; echo $?"
        f"; until [ -e {tmp_path}/end ]; do sleep 0.05; done"
    )
    run = box.submit("t", "sh", "-c", script)
    wait_until(
        lambda: (
            box.runctl("attach", "t", "--no-follow").count("\n2\n") == 3
            or box.runctl("attach", "t", "--no-follow").count("2\n") >= 3
        ),
        "all is said",
    )
    said = box.runctl("attach", "t", "--no-follow") + box.stderr
    assert "nothing to say: give a STATUS, or --usage NAME=NUMBER" in said
    assert "--usage 'input' is no NAME=NUMBER" in said
    assert "input is no number from 0 on: '-4'" in said
    shown = box.show(run)
    assert shown["usage"] == {"input": 7, "cost": 0.5}
    assert shown["status_text"] == "half done"
    (tmp_path / "end").touch()
    box.runctl("wait", run)
    box.runctl("note", "x", code=2)
    assert "not inside a run: RUNCTL_SOCKET is not set" in box.stderr


def test_a_peer_shows_it(house: House, tmp_path: Path) -> None:
    house.box("a")
    run = house.bus.submit("t", [sys.executable, "-c", SAYS, str(tmp_path)], "a")
    say(tmp_path, 1, "here|input=3")
    b = house.box("b")
    assert b.show(run)["status_text"] == "here"
    assert b.show(run)["usage"] == {"input": 3}
    (thread,) = b.json("list")
    assert thread["run"]["status_text"] == "here"
    (tmp_path / "end").touch()
    b.runctl("wait", run)


@pytest.mark.short
def test_top_shows_and_finds_it() -> None:
    run = Run("r", "t", Status.RUNNING, 1, "shell", "a", "2026-01-01T00:00:00Z", command="make")
    said = Run(
        *("r", "t", Status.RUNNING, 1, "shell", "a", "2026-01-01T00:00:00Z"),
        command="make",
        status_text="linking",
    )
    board = Board()
    for one, work in ((run, "make"), (said, "linking (make)")):
        board.replace([ThreadRow("t", "running", one, 0)], [])
        (line,) = board.lines("", 0.0, 0.0)
        assert line.work == work
    assert board.lines("linking", 0.0, 0.0)


@pytest.mark.short
def test_outside_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNCTL_SOCKET", raising=False)
    with pytest.raises(BadRequest, match="not inside a run"):
        note("x")


@pytest.mark.short
def test_usage_is_read() -> None:
    assert read_usage("input=1 input=2.5 id=x") == ({"input": 3.5}, "x")
    assert read_usage("cost=1e-3") == ({"cost": 0.001}, None)
