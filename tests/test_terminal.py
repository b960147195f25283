"""What is on the operator's screen: a real pseudo-terminal, read by a terminal emulator."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from conftest import DEADLINE, Box, wait_until
from proc import children
from runctl.cli.display.lines import LineMaker, Style
from runctl.cli.display.replay_filter import ReplayFilter, Restart
from runctl.client.events import Chunk, End, Gap, Reset
from terminal import Terminal

# ---- holding back ----------------------------------------------------------------------


def chunks(attempt: int, *data: str, stream: Any = "text") -> list[Chunk]:
    return [Chunk("r", attempt, i, stream, d.encode()) for i, d in enumerate(data, 1)]


def take(hold: ReplayFilter, *events: Any) -> str:
    """What is shown: text, "|" for a restart, "." for the end."""
    out = ""
    for event in events:
        for shown in hold.take(event):
            if isinstance(shown, Chunk):
                out += shown.data.decode()
            elif isinstance(shown, Restart):
                out += "|"
            elif isinstance(shown, End):
                out += "."
            elif isinstance(shown, Gap):
                out += "_"
    return out


def end(attempt: int) -> End:
    return End("r", attempt, "succeeded", 0, None)


def test_a_repeated_prefix_is_not_shown_again() -> None:
    hold = ReplayFilter()
    assert take(hold, Reset("r", 1), *chunks(1, "one ", "two ")) == "one two "
    assert take(hold, Reset("r", 2), *chunks(2, "on", "e tw")) == ""
    assert hold.recovering == 2
    assert take(hold, *chunks(2, "o three")) == "three"
    assert hold.recovering is None
    assert take(hold, end(2)) == "."


def test_a_reply_that_differs_is_shown_whole_behind_a_mark() -> None:
    hold = ReplayFilter()
    take(hold, Reset("r", 1), *chunks(1, "one two"))
    assert take(hold, Reset("r", 2), *chunks(2, "one ", "TWO")) == "|one TWO"
    assert take(hold, Reset("r", 3), *chunks(3, "one TWO!"), end(3)) == "!."


def test_a_reply_that_ends_early_is_shown_whole() -> None:
    hold = ReplayFilter()
    take(hold, Reset("r", 1), *chunks(1, "one two"))
    assert take(hold, Reset("r", 2), *chunks(2, "one"), end(2)) == "|one."


def test_a_third_attempt_repeats_what_two_have_shown() -> None:
    hold = ReplayFilter()
    take(hold, Reset("r", 1), *chunks(1, "abcd"))
    assert take(hold, Reset("r", 2), *chunks(2, "ab")) == ""
    assert take(hold, Reset("r", 3), *chunks(3, "abcdef")) == "ef"


def test_streams_are_compared_each_by_itself() -> None:
    hold = ReplayFilter()
    take(hold, Reset("r", 1), *chunks(1, "out"), *chunks(1, "err", stream="stderr"))
    again = take(hold, Reset("r", 2), *chunks(2, "out more"))
    assert again == " more"
    assert hold.recovering == 2, "stderr has not been repeated yet"
    assert take(hold, *chunks(2, "err", stream="stderr")) == ""
    assert hold.recovering is None


def test_a_gap_ends_the_comparison() -> None:
    hold = ReplayFilter()
    take(hold, Reset("r", 1), *chunks(1, "one two"))
    assert take(hold, Reset("r", 2), Gap("r", 1, 3), *chunks(2, "x")) == "|_x"
    assert take(hold, Reset("r", 3), *chunks(3, "x")) == "|x"


def test_beyond_the_limit_a_restart_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runctl.cli.display.replay_filter.LIMIT", 10)
    hold = ReplayFilter()
    take(hold, Reset("r", 1), *chunks(1, "0123456789", "x"))
    assert take(hold, Reset("r", 2), *chunks(2, "0123")) == "|0123"


# ---- lines -----------------------------------------------------------------------------


def test_lines_with_prefix_time_and_grep() -> None:
    maker = LineMaker(Style(timestamps=True, grep=re.compile("b+")), "t | ")
    assert maker.feed(b"abb", 0.25) == b""
    assert maker.feed(b"\nno\nxb\ny", 1.0) == (
        b"t | 1970-01-01T00:00:00.250Z abb\nt | 1970-01-01T00:00:01.000Z xb\n"
    )
    assert maker.flush() == b""
    marked = LineMaker(Style(grep=re.compile("b+"), colour=True)).feed(b"abbc\n", 0)
    assert marked == b"a\x1b[1;31mbb\x1b[0mc\n"


# ---- a real terminal -------------------------------------------------------------------


# Prints two lines, goes on only when it may; a marker file makes a later attempt differ.
TALK = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
attempt = os.environ["RUNCTL_ATTEMPT"]
print("first line", flush=True)
print("same again" if len(sys.argv) < 3 else "attempt " + attempt, flush=True)
sys.stdout.write("half a ")
sys.stdout.flush()
while not (here / ("go" + attempt)).exists():
    time.sleep(0.02)
print("line, whole now", flush=True)
"""


#: Whose attempt 2 stops behind its first line, while it repeats the one before.
STOPPING = TALK.replace(
    'print("first line", flush=True)\n',
    'print("first line", flush=True)\n'
    'while attempt == "2" and not (here / "on").exists():\n    time.sleep(0.02)\n',
)


def replay(box: Box, *extra: str) -> Terminal:
    """Watch a run through a SIGKILL of its daemon, until attempt 2 is there. It goes on when
    there is a file "on"."""
    run = box.submit_py("t", STOPPING, str(box.path), *extra)
    terminal = Terminal(box, "attach", "t")
    terminal.until("half a")
    box.kill()
    terminal.until("connection lost; waiting for runctld")
    box.start()
    wait_until(lambda: box.show(run)["attempt"] == 2, "attempt 2")
    return terminal


def test_a_reply_that_repeats_itself_goes_on_where_it_was(box: Box) -> None:
    terminal = replay(box)
    wait_until(lambda: b"recovering, attempt 2" in terminal.raw, "said that it is recovered")
    (box.path / "on").touch()
    (box.path / "go2").touch()
    assert terminal.wait() == 0
    assert terminal.text() == "first line\nsame again\nhalf a line, whole now"


def test_a_reply_that_differs_starts_over_behind_a_rule(box: Box) -> None:
    terminal = replay(box, "differs")
    (box.path / "on").touch()
    (box.path / "go2").touch()
    assert terminal.wait() == 0
    lines = terminal.text().splitlines()
    assert lines[:3] == ["first line", "attempt 1", "half a"]
    assert "attempt 2 starts over" in " ".join(lines[3:5])
    assert lines[-3:] == ["first line", "attempt 2", "half a line, whole now"]


def test_a_hanging_server_is_noticed(box: Box) -> None:
    box.submit_py("t", TALK, str(box.path))
    terminal = Terminal(box, "attach", "t")
    terminal.until("half a")
    assert box.daemon is not None
    (server,) = children(box.daemon.pid, "nats-server")
    os.kill(server, signal.SIGSTOP)
    try:
        terminal.until("connection lost")
    finally:
        with suppress(ProcessLookupError):  # another one serves by now
            os.kill(server, signal.SIGCONT)
    wait_until(lambda: "connection lost" not in terminal.text(), "the status line is gone")
    (box.path / "go1").touch()
    assert terminal.wait() == 0
    assert terminal.text() == "first line\nsame again\nhalf a line, whole now"


def test_stderr_is_red_unless_colours_are_unwanted(box: Box) -> None:
    box.submit_py("t", "import sys; sys.stderr.write('oops\\n')")
    red = Terminal(box, "attach", "t")
    assert red.wait() == 0
    assert red.text() == "oops"
    assert b"\x1b[31moops" in red.raw
    for plain in (
        Terminal(box, "attach", "t", env={"NO_COLOR": "1"}),
        Terminal(box, "attach", "t", "--raw"),
    ):
        assert plain.wait() == 0
        assert b"\x1b[31m" not in plain.raw


def test_grep_times_since_and_their_misuse(box: Box) -> None:
    run = box.submit_py("t", "print('alpha'); print('beta'); print('alphabet')")
    box.runctl("wait", run)
    assert box.runctl("attach", "t", "--grep", "alpha") == "alpha\nalphabet\n"
    stamped = box.runctl("attach", "t", "--timestamps").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \w+$", s) for s in stamped)
    assert box.runctl("attach", "t", "--since", "1h") == "alpha\nbeta\nalphabet\n"
    assert box.runctl("attach", "t", "--since", "0.000001s") == ""
    box.runctl("attach", "t", "--grep", "(", code=2)
    assert "not a regular expression" in box.stderr
    box.runctl("attach", "t", "--grep", "x", "--raw", code=2)
    box.runctl("attach", "t", "--timestamps", "--json", code=2)


def test_raw_bytes_come_as_they_were(box: Box) -> None:
    code = "import os; os.write(1, bytes(range(256)) * 4)"
    run = box.submit("t", sys.executable, "-c", code)
    box.runctl("wait", run)
    client = box.popen("attach", "t", "--raw", stderr=subprocess.PIPE)
    out, err = client.communicate(timeout=DEADLINE)
    assert (out, err) == (bytes(range(256)) * 4, b"")
