"""``runctl top`` on a real terminal, with a real daemon."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest
from conftest import DEADLINE, Box, wait_until
from proc import alive
from terminal import Terminal

# Prints a chunk each 50 ms until it may end.
TICKS = """
import os, sys, time
while not os.path.exists(sys.argv[1]):
    print("tick", flush=True)
    time.sleep(0.05)
"""
KEYS = "↑↓ select   enter attach   x abort   p purge   / filter   ? help   q quit"


@pytest.fixture
def top(box: Box) -> Iterator[Terminal]:
    terminal = Terminal(box, "top", hold=True)
    try:
        terminal.until(KEYS)
        yield terminal
    finally:
        terminal.process.kill()
        terminal.wait()


def row(terminal: Terminal, thread: str) -> list[str]:
    """The words of the thread's line, without the mark of the selected one; none: []."""
    for line in terminal.text().splitlines()[2:-2]:
        words = line.removeprefix(">").split()
        if words and words[0] == thread:
            return words
    return []


def chunks(terminal: Terminal, thread: str) -> int:
    """How many are shown; -1 while they, or the line, are not: it may be half drawn."""
    words = row(terminal, thread)
    return int(words[5]) if len(words) > 6 and words[5].isdigit() else -1


def counted(terminal: Terminal, thread: str) -> int:
    return int(wait_until(lambda: max(0, chunks(terminal, thread)), "its chunks are shown"))


def until_status(terminal: Terminal, thread: str, status: str) -> None:
    wait_until(lambda: status in row(terminal, thread), f"{thread} is {status}")


def select(terminal: Terminal, thread: str) -> None:
    def selected() -> bool:
        lines = [line for line in terminal.text().splitlines() if line.startswith("> ")]
        if lines and lines[0].split()[1] == thread:
            return True
        terminal.send("j" if terminal.text().find(f"  {thread} ") > 0 else "k")
        return False

    wait_until(selected, f"{thread} is selected")


def test_threads_come_count_and_go_without_a_key(box: Box, top: Terminal) -> None:
    top.until("no threads yet")
    go = box.path / "go"
    run = box.submit_py("busy", TICKS, str(go))
    until_status(top, "busy", "running")
    box.submit("busy", "true")
    top.until("1 running   1 queued")
    wait_until(lambda: row(top, "busy")[7:8] == ["1"], "its queue")
    # thread status run try age chunks rate executor queue
    first = counted(top, "busy")
    wait_until(lambda: chunks(top, "busy") > first + 10, "chunks are counted")
    words = wait_until(lambda: (found := row(top, "busy"))[7:] and found, "its whole line")
    assert words[6].endswith("/s")
    assert run.endswith(words[2].removeprefix("…"))
    box.submit("宽 thread", "sleep", "600")
    top.until("宽 thread")
    go.touch()
    until_status(top, "busy", "succeeded")
    top.until("1 running   0 queued")
    assert all(len(line) <= 80 for line in top.text().splitlines())
    top.send("q")
    assert top.process.wait(DEADLINE) == 0
    assert top.attributes() == top.before


def test_abort_and_purge_by_key(box: Box, top: Terminal) -> None:
    run = box.submit_py("one", TICKS, str(box.path / "never"))
    other = box.submit_py("two", TICKS, str(box.path / "never"))
    until_status(top, "one", "running")
    until_status(top, "two", "running")
    select(top, "one")
    top.send("x")
    top.until(f"abort? y/n   run {run} of thread one")
    top.send("n")
    wait_until(lambda: KEYS in top.text(), "not confirmed")
    top.send("p")
    top.until("purge stored output? y/n")
    top.send("y")
    top.until("has run")  # refused: it is in flight
    assert box.show(run)["status"] == "running"
    select(top, "one")
    top.send("x")
    top.until("abort? y/n")
    top.send("y")
    top.until(f"aborted run {run} of one")
    until_status(top, "one", "aborted")
    assert box.show(run)["status"] == "aborted"
    assert box.show(other)["status"] == "running"
    select(top, "one")
    top.send("p")
    top.until("purge stored output? y/n")
    top.send("y")
    top.until("purged the output of 1 run of one")
    assert "tick" not in box.runctl("attach", "one", code=5)


def test_attach_by_key_and_back(box: Box, top: Terminal) -> None:
    box.submit_py("one", TICKS, str(box.path / "go"))
    until_status(top, "one", "running")
    top.send("\r")
    top.until("attached to one; Ctrl-C comes back to top")
    top.until("tick")
    top.send("\x03")
    top.until(KEYS)
    until_status(top, "one", "running")
    top.send("a")
    wait_until(lambda: "tick" in "".join(top.text().splitlines()[-1:]), "attached again")
    (box.path / "go").touch()
    top.until("press any key to come back to top")
    top.send(" ")
    until_status(top, "one", "succeeded")
    top.send("\x03")
    assert top.process.wait(DEADLINE) == 130
    assert top.attributes() == top.before


def test_a_daemon_that_dies_is_said_and_the_picture_goes_on(box: Box, top: Terminal) -> None:
    box.submit_py("one", TICKS, str(box.path / "go"))
    until_status(top, "one", "running")
    box.kill()
    top.until("connection lost; waiting for runctld to come back")
    assert row(top, "one"), "the last picture stays"
    box.start()
    wait_until(lambda: "connection lost" not in top.text(), "it is back")
    wait_until(lambda: row(top, "one")[1:4:2] == ["running", "2"], "again")
    first = counted(top, "one")
    wait_until(lambda: chunks(top, "one") > first + 5, "chunks of attempt 2 are counted")


def test_filter_help_resize_and_scroll(box: Box, top: Terminal) -> None:
    for n in range(30):
        box.submit(f"thread-{n:02d}", "true")
    # Those that have not ended are shown above the rest.
    wait_until(lambda: all(x["status"] == "idle" for x in box.json("list")), "all have ended")
    top.until("0 running   0 queued")
    until_status(top, "thread-29", "succeeded")
    top.until("1-20 of")
    top.send("G")
    wait_until(lambda: row(top, "thread-00"), "scrolled to the oldest")
    top.send("/thread-29\r")
    wait_until(lambda: row(top, "thread-29") and not row(top, "thread-00"), "filtered")
    top.send("\x1b")
    top.until("thread-28")
    top.send("?")
    top.until("this help")
    top.send(" ")
    top.resize(50, 10)
    wait_until(lambda: "EXECUTOR" not in top.text() and "THREAD" in top.text(), "narrower")
    assert all(len(line) <= 50 for line in top.text().splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_terminal_is_given_back(box: Box, top: Terminal, number: signal.Signals) -> None:
    os.kill(top.process.pid, number)
    wait_until(lambda: not alive(top.process.pid), "it has ended")
    assert top.attributes() == top.before
    for given, taken in ((b"\x1b[?1049l", b"\x1b[?1049h"), (b"\x1b[?25h", b"\x1b[?25l")):
        assert taken in top.raw
        # What it wrote last may not be read yet.
        wait_until(lambda g=given, t=taken: top.raw.rfind(g) > top.raw.rfind(t), f"{given!r}")


def test_without_a_terminal_it_says_what_to_use(box: Box) -> None:
    for args, says in (
        (("top",), "top needs a terminal; use: runctl list"),
        (("top", "--json"), "use: runctl list --json"),
    ):
        assert box.runctl(*args, code=2) == ""
        assert says in box.stderr
        assert box.stderr.count("\n") == 1


def test_without_colours(box: Box) -> None:
    box.submit("one", "false")
    box.runctl("wait", box.submit("one", sys.executable, "-c", "pass"), code=0)
    terminal = Terminal(box, "top", env={"NO_COLOR": "1"})
    until_status(terminal, "one", "succeeded")
    terminal.send("q")
    assert terminal.wait() == 0
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7]m", terminal.raw)
