"""The parts of ``runctl top``, and what happens to it at the edges."""

from __future__ import annotations

import json
import re
import signal
import unicodedata
from pathlib import Path

import pytest
from conftest import Box, wait_until
from natsserver import Node
from proc import read_proc
from rich.cells import set_cell_size
from runctl.cli.top.board import Board, Line, Meter
from runctl.cli.top.key_decoder import Keys
from runctl.cli.top.view import AROUND, View, age, layout, number, pace, picture
from runctl.protocol.model import Run, Status, ThreadRow
from runctl.protocol.records import Summary
from terminal import Terminal

# Says a number each time the file "say" has grown, until it may end.
STEPS = """
import os, pathlib, sys, time
say = pathlib.Path(sys.argv[1])
said = 0
while not say.with_suffix(".end").exists():
    while say.exists() and said < say.stat().st_size:
        said += 1
        print(said, flush=True)
        time.sleep(0.005)
    time.sleep(0.02)
"""
WIDE = "顧客サポート-東京-第二営業部-山田様-再発行"


def row(terminal: Terminal, thread: str) -> list[str]:
    """The fields of the thread's line; without the mark of the selection."""
    for line in terminal.text().splitlines():
        fields = line.removeprefix(">").split()
        if fields and fields[0] == thread:
            return fields
    return []


def until_chunks(terminal: Terminal, box: Box, thread: str, last: int) -> None:
    """Until number ``last`` was said and top shows as many chunks as are stored: lines
    that come close together may share a chunk."""

    def stored() -> int:
        out = box.runctl("attach", thread, "--no-follow", "--json", code=None)
        chunks = [x for x in map(json.loads, out.splitlines()) if x["type"] == "chunk"]
        return len(chunks) if "".join(x["data"] for x in chunks).endswith(f"{last}\n") else 0

    count = wait_until(stored, f"{last} is stored")
    wait_until(lambda: row(terminal, thread)[5:6] == [str(count)], f"{count} chunks shown")


def step(box: Box, name: str, count: int) -> None:
    """Let the run that watches file ``name`` print ``count`` more."""
    with (box.path / name).open("a") as file:
        file.write("x" * count)


def submit(box: Box, thread: str, file: str = "say", run: str | None = None) -> str:
    return box.submit_py(thread, STEPS, str(box.path / file), run=run)


def started(box: Box, *args: str, **options: object) -> Terminal:
    terminal = Terminal(box, "top", **options)  # type: ignore[arg-type]
    terminal.until("THREAD")
    return terminal


def quit(terminal: Terminal) -> None:
    terminal.send("q")
    assert terminal.wait() == 0


# ---- live ------------------------------------------------------------------------------


def test_what_was_there_before_is_shown_with_its_chunks(box: Box) -> None:
    step(box, "say", 5)
    (box.path / "say.end").touch()
    box.runctl("wait", box.submit("old", "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.1; done"))
    (box.path / "say.end").unlink()
    submit(box, "live")
    terminal = started(box)
    until_chunks(terminal, box, "live", 5)
    until_chunks(terminal, box, "old", 3)
    wait_until(lambda: row(terminal, "old")[1:7:5] == ["succeeded", "-"], "its whole line")
    wait_until(
        lambda: "".join(terminal.text().splitlines()[2:3]).startswith("> live"),
        "live threads come first",
    )
    quit(terminal)


def test_killed_daemon_behind_a_nats_of_its_own(stopped_box: Box, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    server = Node(tmp_path / "server")
    server.start()
    box = stopped_box
    try:
        box.configure(f'[nats]\nurl = "{server.url}"\n')
        box.start()
        submit(box, "a")
        terminal = started(box)
        wait_until(lambda: row(terminal, "a")[1:2] == ["running"], "a is there, and runs")
        box.kill()
        terminal.until("runctld is not running")
        wait_until(lambda: row(terminal, "a")[1:2] == ["running"], "the last picture stays")
        box.start()
        wait_until(lambda: row(terminal, "a")[3:4] == ["2"], "attempt 2")
        wait_until(lambda: "not running" not in terminal.text(), "the line is taken back")
        server.kill()
        terminal.until("connection lost")
        server.start()
        wait_until(lambda: "connection lost" not in terminal.text(), "reconnected")
        quit(terminal)
        box.term()
    finally:
        server.kill()


def test_the_screen_holds_at_any_size(box: Box) -> None:
    for name in (WIDE, "[red]plain", "a" * 60):
        submit(box, name)
    for i in range(22):
        box.submit(f"t{i}", "true")
    terminal = started(box)
    terminal.until("3 running   0 queued")
    terminal.until("1-20 of 25")
    terminal.until("[red]plain")
    wait_until(lambda: "顧客サポート-" in terminal.text().replace(" ", ""), "the wide one")
    wait_until(lambda: fits(terminal, 80, 24), "fits")
    terminal.send("\x1b[F")
    terminal.until("6-25 of 25")
    for columns, lines in ((40, 10), (20, 24), (5, 3), (132, 40)):
        terminal.resize(columns, lines)
        wait_until(lambda c=columns, n=lines: fits(terminal, c, n), f"fits {columns}x{lines}")
    terminal.until("EXECUTOR")
    terminal.until(WIDE[:19])
    quit(terminal)


def fits(terminal: Terminal, columns: int, lines: int) -> bool:
    """Whether the last whole picture was made for this size and no line is too long."""
    frames = terminal.raw.decode(errors="ignore").split("\x1b[1;1H")
    if len(frames) < 3:
        return False
    written = re.split(r"\x1b\[\d+;1H", frames[-2])
    plain = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", x).rstrip("\r\n") for x in written]
    widths = [sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in x) for x in plain]
    return len(written) == lines and max(widths) == columns


# ---- leaving ---------------------------------------------------------------------------


def test_stopped_and_continued(box: Box) -> None:
    terminal = started(box, hold=True)
    terminal.send("\x1a")
    wait_until(lambda: read_proc(terminal.process.pid, "stat").split()[2] == b"T", "stopped")
    assert terminal.attributes() == terminal.before
    terminal.process.send_signal(signal.SIGCONT)
    wait_until(lambda: terminal.attributes() != terminal.before, "on again")
    box.submit("a", "true")
    wait_until(lambda: row(terminal, "a"), "a is there")
    quit(terminal)


def test_an_error_at_the_start_leaves_no_mess(stopped_box: Box) -> None:
    terminal = Terminal(stopped_box, "top", hold=True)
    wait_until(lambda: terminal.process.poll() is not None, "top has ended")
    assert terminal.attributes() == terminal.before
    assert terminal.wait() == 4
    assert "no runctld has run" in " ".join(terminal.text().split())
    assert b"1049" not in terminal.raw


# ---- the listing -----------------------------------------------------------------------


def test_list_by_status_finds_live_threads_only(box: Box) -> None:
    for name in ("idle1", "idle2"):
        box.runctl("wait", box.submit(name, "true"))
    submit(box, "busy", run="b1")
    submit(box, "both", run="c1")
    box.submit("both", "true", run="c2")
    box.submit("both", "true", run="c3")
    box.runctl("abort", "both", "--run", "c3")
    for run in ("b1", "c1"):
        wait_until(lambda r=run: box.show(r)["status"] == "running", f"{run} runs")

    def listed(status: str) -> set[tuple[str, str, str, int]]:
        rows = box.json("list", "--status", status)
        return {(x["thread"], x["status"], x["run"]["run"], x["queued"]) for x in rows}

    assert listed("running") == {("busy", "running", "b1", 0), ("both", "running", "c1", 1)}
    assert {x[0] for x in listed("idle")} == {"idle1", "idle2"}
    assert listed("queued") == {("both", "running", "c1", 1)}, "those on which a run waits"
    terminal = started(box)
    shown = wait_until(lambda: (found := row(terminal, "both"))[3:] and found, "both is there")
    assert shown[2] == "c1", "the running one, not the latest"
    quit(terminal)


# ---- parts -----------------------------------------------------------------------------


def thread_row(name: str, status: Status = Status.RUNNING, run: str = "", queued: int = 0):  # type: ignore[no-untyped-def]
    at = "2026-01-01T00:00:00.000Z"
    attempt = 0 if status is Status.QUEUED else 1
    made = Run(run or f"{name}1", name, status, attempt, "shell", "box", at, at)
    kind = status.value if not status.terminal else "idle"
    return ThreadRow(name, kind, made, queued)


@pytest.mark.short
def test_board_merges_listing_and_streams() -> None:
    board = Board()
    board.replace(
        [thread_row("a"), thread_row("b", Status.QUEUED)], [thread_row("c", Status.FAILED)]
    )
    assert [x.thread for x in board.lines("", 0, 0)] == ["a", "b", "c"]
    assert board.counts() == (1, 0)
    board.summarise("a1", Summary("chunk", 1, 10), 0.0)
    board.summarise("a1", Summary("chunk", 1, 40), 2.0)
    (a,) = board.lines("a1", 2.0, 0)
    assert (a.chunks, a.rate) == (40, 15.0)
    # A new attempt's reset comes before the listing that has it.
    board.summarise("b1", Summary("reset", 1), 2.0)
    assert board.lines("b1", 2.0, 0)[0].status == "running"
    board.summarise("a1", Summary("reset", 2), 3.0)
    (a,) = board.lines("a1", 3.0, 0)
    assert (a.attempt, a.chunks, a.rate) == (2, 0, 0.0)
    # So does an end, and until it is listed the listing is not settled.
    assert not board.unsettled()
    board.summarise("a1", Summary("end", 2, 7, "failed"), 4.0)
    (a,) = board.lines("a1", 4.0, 0)
    assert (a.status, a.chunks, a.rate) == ("failed", 7, None)
    assert board.unsettled()
    assert board.counts() == (0, 0)
    board.replace([thread_row("b"), thread_row("d")], [thread_row("a", Status.FAILED)])
    assert not board.unsettled()
    assert [x.thread for x in board.lines("", 4, 0)] == ["d", "b", "a"], "b keeps its place"
    board.forget("a")
    assert board.lines("a", 4, 0)[0].chunks is None


@pytest.mark.short
def test_rates_follow_the_last_seconds() -> None:
    meter = Meter()
    assert meter.rate(0.0) == 0
    for i in range(100):
        meter.count(1, i * 2, i * 0.1)
    assert 18 < meter.rate(9.9) < 22
    assert 0 < meter.rate(13.0) < 12
    assert meter.rate(15.0) == 0
    meter.count(2, 5, 16.0)
    assert meter.rate(17.0) == 0


@pytest.mark.short
def test_keys_come_whole_however_they_are_cut() -> None:
    text = "j\x1b[A\x1bOB\x1b[5~\x1b[1;5Cé顧\r\x7f\x1b[200~x\t".encode()
    wanted = ["j", "up", "down", "pageup", "é", "顧", "enter", "backspace", "x"]
    assert Keys().feed(text) == wanted
    keys = Keys()
    assert [k for i in range(len(text)) for k in keys.feed(text[i : i + 1])] == wanted
    assert keys.feed(b"\x1b") == []
    assert keys.pending
    assert keys.flush() == ["escape"]
    assert keys.feed(b"\x1bq") == ["escape", "q"]


@pytest.mark.short
def test_pictures_have_the_size_they_are_asked_for() -> None:
    line = Line(WIDE, "succeeded", "01m87mz4dnnqfdk5teer8k09ft", 12, 1e7, 10**7, 1e5, "e" * 30, 999,
                True, "")  # fmt: skip
    for count in (0, 1, 5, 500):
        view = View(lines=[line] * count, selected=max(0, count - 1), empty="no threads yet")
        for width, height in ((80, 24), (132, 50), (60, 24), (30, 8), (12, 6), (5, 5), (1, 1)):
            lines = picture(view, None, width, height)
            assert len(lines) == height
            assert all(x.cell_len <= width for x in lines), (width, [x.plain for x in lines])
    view = View(lines=[line] * 500, selected=499)
    title = picture(view, ("away", 3.0), 80, 24)[0].plain
    assert title.endswith(f"{500 - 24 + AROUND + 1}-500 of 500")


@pytest.mark.short
def test_columns_fit_or_go_and_stay_under_their_titles() -> None:
    line = Line(WIDE, "running", "01m87mz4dnnqfdk5teer8k09ft", 2, 61, 7, 1, "e" * 30, 12, True, "")
    for width in range(1, 150):
        widths = layout([line], width)
        assert sum(widths.values()) + len(widths) - 1 <= width
        head, first = picture(View(lines=[line]), None, width + 2, 24)[1:3]
        if "queue" in widths:
            at = head.plain.index("QUEUE") + len("QUEUE")  # in cells: nothing wide before it
            assert set_cell_size(first.plain, at).endswith("12")
    assert list(layout([line], 34)) == ["thread", "status", "work"]
    assert list(layout([line], 50)) == ["thread", "status", "chunks", "queue", "work"]
    assert len(layout([line], 90)) == 10
    assert layout([line], 140)["run"] == 26


@pytest.mark.short
def test_figures_fit_their_columns() -> None:
    for power in range(12):
        for digits in (1, 1.5, 9.949, 9.95, 9.996):
            value = digits * 10**power
            assert len(number(value)) <= 6, value
            assert len(pace(min(value, 9e8))) <= 6, value
            assert len(age(value)) <= 6 or value > 1e9, value
    assert (age(9.9), age(125), age(90_000), age(-3)) == ("9s", "2m5s", "1d1h", "0s")
    assert (number(99_999), number(100_000), number(1.25e6)) == ("99999", "100k", "1.2M")
    assert [pace(x) for x in (0.04, 3.21, 9.96, 98765)] == ["0/s", "3.2/s", "10/s", "99k/s"]
