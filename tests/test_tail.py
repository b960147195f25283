"""``--tail``: the last lines of what is stored, however it was cut into chunks."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from conftest import DEADLINE, Box, wait_until
from hypothesis import given
from hypothesis import strategies as st
from natsserver import connected
from runctl.cli.display.tail import Tail
from runctl.client.events import Chunk
from runctl.protocol import subjects
from test_terminal import Terminal


def feed(tail: Tail, pieces: list[str]) -> tuple[str, str]:
    for seq, piece in enumerate(pieces, 1):
        tail.add(Chunk("r", 1, seq, "stdout", piece.encode()))
    left_out, shown = tail.take()
    return tuple("".join(c.data.decode() for c in part) for part in (left_out, shown))  # type: ignore[return-value]


pieces = st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=12)


@pytest.mark.short
@given(pieces, st.integers(0, 8))
def test_the_last_lines_and_all_that_was_before_them(pieces: list[str], count: int) -> None:
    left_out, shown = feed(Tail(count, lines=True), pieces)
    text = "".join(pieces)
    assert left_out + shown == text
    lines = text.splitlines(keepends=True)
    assert shown == "".join(lines[-count:] if count else [])


@pytest.mark.short
@given(pieces, st.integers(0, 8))
def test_the_last_chunks(pieces: list[str], count: int) -> None:
    left_out, shown = feed(Tail(count, lines=False), pieces)
    assert shown == "".join(pieces[-count:] if count else [])
    assert left_out + shown == "".join(pieces)


def test_lines_at_a_terminal_chunks_as_json(box: Box) -> None:
    box.runctl("wait", box.submit_py("t", "for i in range(2000): print(i)"))
    assert box.runctl("attach", "t", "--tail", "2") == "1998\n1999\n"
    assert box.runctl("attach", "t", "--tail", "0") == ""
    assert len(box.runctl("attach", "t", "--tail", "1", "--json").splitlines()) == 3


# Says "new part" when it may, and goes on when its attempt may.
SLOW = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
def wait(name):
    while not (here / name).exists(): time.sleep(0.02)
print("old line", flush=True)
wait("more")
print("new part", end=" ", flush=True)
wait("go" + os.environ["RUNCTL_ATTEMPT"])
print("and the end", flush=True)
"""


def _watchers(box: Box) -> int:
    """The JetStream consumers of the stream."""

    async def count() -> int:
        client = await connected(box.state)
        try:
            js = client.jetstream(timeout=DEADLINE)
            return len(await js.consumers_info(subjects.STREAM))
        finally:
            await client.close()

    return asyncio.run(count())


@pytest.mark.parametrize("only", ["--tail", "--since"])
def test_a_recovery_does_not_bring_back_what_was_left_out(box: Box, only: str) -> None:
    box.submit_py("t", SLOW, str(box.path))
    wait_until(lambda: "old line" in box.runctl("attach", "t", "--no-follow"), "it has begun")
    if only == "--tail":
        (box.path / "more").touch()
        wait_until(lambda: "new part" in box.runctl("attach", "t", "--no-follow"), "it goes on")
        terminal = Terminal(box, "attach", "t", "--tail", "1")
    else:
        recent = ("attach", "t", "--since", "1s")
        wait_until(lambda: box.runctl(*recent, "--no-follow") == "", "the line has become old")
        before = _watchers(box)
        terminal = Terminal(box, *recent)
        # By then it knows since when, however long its start takes.
        wait_until(lambda: _watchers(box) > before, "it watches")
        (box.path / "more").touch()
    wait_until(lambda: terminal.text() == "new part", "only the new part")
    box.kill()
    terminal.until("connection lost")
    box.start()
    (box.path / "go2").touch()
    assert terminal.wait() == 0
    assert terminal.text() == "new part and the end"


def test_what_goes_on_is_not_waited_for(box: Box) -> None:
    """Only the record of an end that was seen is."""
    box.submit_py("t", "import time; print('begun', flush=True); time.sleep(600)")
    code = (
        "import runctl.client.attachment; from runctl.cli.start import main\n"
        "runctl.client.attachment.RECORD_TIMEOUT = 600; main()"
    )
    argv = [sys.executable, "-c", code, "-c", str(box.config), "attach", "t", "--no-follow"]

    def read() -> str:
        return subprocess.run(
            argv, capture_output=True, text=True, check=True, timeout=DEADLINE
        ).stdout

    wait_until(lambda: read() == "begun\n", "it has begun")
