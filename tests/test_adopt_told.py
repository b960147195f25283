"""What is told of runs that outlived their daemon, and what the next daemon knows of them."""

from __future__ import annotations

import signal

import pytest
from adopting import wait_below
from conftest import Box, wait_until
from pgserver import free_port
from proc import alive, find_keeper
from terminal import Terminal
from test_metrics import get
from test_tty import SIZES, announcements, resize, shows

LIVE_ON = "start_timeout = '600s'\n[queue]\noutlive = '600s'\n"


def start_again(box: Box) -> None:
    box.kill()
    box.start()


def test_adoptions_are_told(stopped_box: Box) -> None:
    box, port = stopped_box, free_port()
    box.configure(f'{LIVE_ON}[metrics]\nlisten = "127.0.0.1:{port}"\n')
    box.start()
    run = box.submit("t", "sh", "-c", "while ! test -e go; do sleep 0.05; done")
    wait_below(box, 2)
    assert box.show(run)["adopted_at"] == []
    assert "adopted" not in box.runctl("show", run)
    for times in (1, 2):
        start_again(box)
        found = box.show(run)
        assert len(found["adopted_at"]) == times
        assert found["started_at"] < found["adopted_at"][0]
        (listed,) = box.json("list", "t")
        assert listed["adopted_at"] == found["adopted_at"]
        (thread,) = box.json("list")
        assert thread["run"]["adopted_at"] == found["adopted_at"]
        assert "\nrunctl_adopted_runs_total 1.0\n" in get(port, "/metrics")[1]
    said = f"2 times, by a new daemon, last at {found['adopted_at'][1]}: it went on as it was"
    assert said in box.runctl("show", run)
    (box.path / "go").touch()
    box.runctl("wait", run)
    assert box.show(run)["adopted_at"] == found["adopted_at"]
    start_again(box)
    assert box.show(run)["adopted_at"] == found["adopted_at"]


def test_a_keeper_without_runs_is_replaced(stopped_box: Box) -> None:
    box = stopped_box
    box.configure(LIVE_ON)
    box.start()
    first = find_keeper(box.pid)
    start_again(box)
    second = find_keeper(box.pid)
    assert second != first
    assert not alive(first)
    assert box.json("status")["keeper"]["pid"] == second
    box.submit("t", "sleep", "600")
    wait_below(box, 2)
    start_again(box)
    found = box.json("status")
    assert found["keeper"] == {"pid": second, "version": found["version"]}
    assert f"{found['version']}, pid {second}\n" in box.runctl("status")
    box.runctl("abort", "t")


def test_the_size_follows_the_first_terminal_after_an_adoption(
    stopped_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = stopped_box
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "33")
    box.configure(f"{LIVE_ON}[runners.shell]\nkind = 'command'\ntty = true\n")
    box.start()
    run = box.submit_py("t", SIZES)
    first = Terminal(box, "attach", "t", columns=100)
    shows(first, "100x24")
    count = announcements(box)
    second = Terminal(box, "attach", "t", columns=60)
    wait_until(lambda: announcements(box) > count, "the second one has said its size")
    start_again(box)
    resize(first, 110, 30)
    shows(second, "110x30")
    start_again(box)
    first.process.kill()
    shows(second, "60x24")
    assert first.wait() == -signal.SIGKILL
    assert box.show(run)["attempt"] == 1
    second.process.send_signal(signal.SIGINT)
    assert second.wait() == 130
