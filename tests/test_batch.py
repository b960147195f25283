"""``submit --batch``: many runs over one connection, in order."""

from __future__ import annotations

import errno
import json
import os
import random
import sqlite3
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, wait_until
from runctl.cli.commands import batch
from runctl.cli.common import run
from runctl.client import submit_lines
from runctl.client.shared_link import SharedLink
from runctl.config.load import load
from test_json import check


def written(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def answers(box: Box, data: bytes, *args: str, code: int = 0) -> list[dict[str, Any]]:
    out = box.runctl("submit", "--batch", "-", *args, input=data, code=code)
    return [json.loads(line) for line in out.splitlines()]


def order_of(box: Box, thread: str) -> list[str]:
    """The thread's runs in the order in which they began, and then will begin."""
    with sqlite3.connect(box.state / "runctl.sqlite") as database:
        rows = database.execute(
            "SELECT workflow_uuid FROM workflow_status WHERE queue_partition_key = ?"
            " ORDER BY started_at_epoch_ms IS NULL, started_at_epoch_ms,"
            " priority, created_at, workflow_uuid",
            (thread,),
        ).fetchall()
    database.close()
    return [row[0] for row in rows]


def test_each_line_is_answered_in_order_and_bad_ones_stop_nothing(box: Box) -> None:
    (box.path / "sub").mkdir()
    data = b"\xef\xbb\xbf" + written(
        {"thread": "a", "argv": ["pwd"], "id": "one"},
        {"thread": "a", "prompt": "Größe ä", "argv": ["cat"], "id": "two", "cwd": "/"},
        {"thread": "b", "argv": ["true"], "runner": "shell"},
    )
    data += b"\n  \r\nnot json\n" + written(
        {"thread": "a", "argv": ["true"], "id": "one"},  # other work under the same id
        {"argv": ["true"]},
        {"thread": "a", "argv": "true"},
        {"thread": "a", "argv": ["true"], "extra": 1},
        {"thread": "", "argv": ["true"]},
        {"thread": "a", "argv": ["true"], "id": "no/id"},
        {"thread": "a", "runner": "none", "prompt": "x"},
        ["a", "true"],
    )
    data += b'{"thread": "a", "prompt": "\xff"}\n{"thread": "a", "prompt": "\\ud800"}\n'
    data += b"[" * 100_000 + b"\n"
    data += b'{"thread": "a", "argv": ["true"], "prompt": "' + b"x" * 9_000_000 + b'"}\n'
    data += written({"thread": "a", "argv": ["true"], "prompt": "x" * 1_100_000})
    data += json.dumps({"thread": "a", "argv": ["pwd"], "id": "last", "cwd": "sub"}).encode()
    found = answers(box, data, code=1)
    assert all("run" in found[i] for i in (0, 1, 2, -1)), (found[:3], found[-1], len(found))
    for row in found:
        check("batch", row)
    good = [found[0], found[1], found[2], found[-1]]
    assert [row["thread"] for row in good] == ["a", "a", "b", "a"]
    assert (good[0]["run"], good[1]["run"], good[3]["run"]) == ("one", "two", "last")
    bad = found[3:-1]
    assert [row["line"] for row in bad] == list(range(6, 20))
    assert len(found) == 4 + len(bad)
    assert {row["code"] for row in bad} == {"bad-request", "refused"}
    assert bad[1]["code"] == "refused"
    assert bad[1]["id"] == "one"
    for row, words in zip(
        bad,
        (
            "not a run to submit", "other work", "`thread`", "`str`", "`extra`", "thread name",
            "run id", "no runner named", "`object`", "", "", "", "more than the", "larger than",
        ),
        strict=True,
    ):  # fmt: skip
        assert words in row["error"]
    assert "14 of 18 lines were not submitted" in box.stderr
    box.runctl("wait", "last")
    assert box.runctl("attach", "a", "--run", "one").strip() == str(box.path)
    assert box.runctl("attach", "a", "--run", "two") == "Größe ä"
    assert order_of(box, "a") == ["one", "two", "last"]


def test_a_producer_that_goes_on_is_answered_at_once(box: Box) -> None:
    """And a line may come in pieces."""
    client = box.popen("submit", "--batch", "-", stdin=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None
    for i in range(3):
        data = written({"thread": "t", "argv": ["true"], "id": f"r{i}"})
        for part in (data[:7], data[7:]):
            client.stdin.write(part)
            client.stdin.flush()
        assert json.loads(client.stdout.readline())["run"] == f"r{i}"
    client.stdin.close()
    client.stdin = None  # as communicate() wants it
    assert client.wait(DEADLINE) == 0


@pytest.mark.long
def test_hundreds_of_lines_keep_their_order_and_may_be_submitted_again(box: Box) -> None:
    """The daemon is killed in the middle: whatever was answered is there, and with the same
    ids the same batch is submitted to its end, once."""
    box.submit("t0", "sleep", "600", run="before")
    rows = [{"thread": f"t{i % 3}", "id": f"r{i:05}", "argv": ["sleep", "600"]} for i in range(600)]
    file = box.path / "work.jsonl"
    file.write_bytes(written(*rows))
    out = (box.path / "answers").open("wb")
    client = box.popen("submit", "--batch", str(file), stdout=out)
    # Early: all of them must not be answered before the kill, however late that comes.
    wait_until(lambda: (box.path / "answers").read_bytes().count(b"\n") > 70, "some are answered")
    box.kill()
    assert client.wait(DEADLINE) == 4
    out.close()
    assert client.stderr is not None
    said = client.stderr.read().decode()
    assert said.count("\n") == 1
    assert "lines with an id are submitted once" in said
    found = [json.loads(line) for line in (box.path / "answers").read_bytes().splitlines()]
    assert [row.get("run") or row["id"] for row in found] == [x["id"] for x in rows[: len(found)]]
    done = [row["run"] for row in found if "run" in row]
    lost = [row for row in found if "run" not in row]
    assert 0 < len(lost) <= submit_lines.MOST
    assert all("run" in row for row in found[: -submit_lines.MOST])
    assert {row["code"] for row in lost} == {"unanswered"}
    box.start()
    assert set(done) <= {run for i in range(3) for run in order_of(box, f"t{i}")}
    again = answers(box, file.read_bytes())
    assert [row["run"] for row in again] == [row["id"] for row in rows]
    for i in range(3):
        wanted = [row["id"] for row in rows if row["thread"] == f"t{i}"]
        assert [run for run in order_of(box, f"t{i}") if run != "before"] == wanted


def test_a_batch_and_other_arguments_exclude_each_other(box: Box) -> None:
    for args in (("t",), ("t", "--", "true"), ("--id", "x"), ("--attach",)):
        box.runctl("submit", "--batch", "-", *args, code=2)
        assert "only --runner can be added" in box.stderr
    box.runctl("submit", "--batch", "/nowhere", code=2)
    assert box.stderr == "runctl: --batch /nowhere: No such file or directory; name a file, or -\n"
    assert box.runctl("submit", "--batch", "/dev/null") == ""
    data = written({"thread": "t", "argv": ["true"]})
    assert answers(box, data, "--runner", "none", code=1)[0]["code"] == "bad-request"


def test_without_a_daemon_nothing_is_read(stopped_box: Box) -> None:
    assert answers(stopped_box, b"not json\n", code=4) == []
    assert stopped_box.stderr.count("\n") == 1


def test_through_several_executors_a_thread_keeps_its_order(house: Any) -> None:
    boxes = [house.box(f"e{i}") for i in range(2)]
    rows = [{"thread": f"t{i % 2}", "id": f"r{i:03}", "argv": ["sleep", "600"]} for i in range(120)]
    found = answers(boxes[0], written(*rows))
    assert [row["run"] for row in found] == [row["id"] for row in rows]
    for thread in ("t0", "t1"):
        listed = [row["run"] for row in boxes[1].json("list", thread)]
        assert listed[::-1] == [row["id"] for row in rows if row["thread"] == thread]
    wait_until(lambda: boxes[0].show("r000")["started_at"], "one runs")
    wait_until(lambda: boxes[0].show("r001")["started_at"], "the other runs")
    for row in boxes[0].json("list"):
        assert (row["status"], row["queued"]) == ("running", 59)
        assert row["run"]["run"] == {"t0": "r000", "t1": "r001"}[row["thread"]], "the first runs"
    boxes[1].runctl("abort", "t0")
    aborted = boxes[0].show("r000")
    assert aborted["status"] == "aborted"
    assert None not in (aborted["started_at"], aborted["ended_at"])
    assert boxes[0].runctl("show", "r00", code=3) == "", "several begin so"


@pytest.mark.short
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_lines_of_any_size_in_any_pieces(tmp_path: Path, kind: str) -> None:
    chance = random.Random(7)
    sizes = [0, 1, 10, 999, 1000, 1001, 5000, 0, 200_000, 3]
    text = b"\n".join(b"x" * size for size in sizes)

    def read(fd: int) -> list[int | None]:
        async def main() -> list[int | None]:
            return [None if line is None else len(line) async for line in batch.lines(fd, 1000)]

        return run(main)

    wanted = [size if size <= 1000 else None for size in sizes]
    if kind == "file":
        (tmp_path / "lines").write_bytes(text)
        fd = os.open(tmp_path / "lines", os.O_RDONLY)
        assert read(fd) == wanted
        os.close(fd)
        return
    ours, theirs = os.pipe()

    def feed() -> None:
        left = text
        while left:
            size = chance.randint(1, 3000)
            os.write(theirs, left[:size])
            left = left[size:]
        os.close(theirs)

    feeding = threading.Thread(target=feed, daemon=True)  # which blocks when the reader fails
    feeding.start()
    assert read(ours) == wanted
    feeding.join()
    os.close(ours)


def test_what_was_read_is_answered_when_no_more_can_be(
    box: Box, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk of the batch fails after some lines."""
    ours, theirs = os.pipe()
    os.write(theirs, written(*({"thread": "t", "argv": ["true"], "id": f"e{n}"} for n in range(5))))
    reads = 0

    def read(fd: int, most: int) -> bytes:
        nonlocal reads
        reads += fd == ours
        if fd == ours and reads == 2:  # somebody else has it open, and was quicker
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if fd == ours and reads == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        data = real(fd, most)
        if fd == ours:
            os.write(theirs, written({"thread": "t", "argv": ["true"], "id": f"f{reads}"}))
        return data

    real = os.read
    monkeypatch.setattr(os, "read", read)
    config = load(box.config)

    async def main() -> None:
        links = SharedLink(config)
        try:
            await batch.submit_batch(links, ours, runner="shell", ordered=True)
        finally:
            await links.close()

    try:
        with pytest.raises(OSError, match="Input/output"):
            run(main)
    finally:
        os.close(theirs)
        os.close(ours)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["run"] for line in lines] == ["e0", "e1", "e2", "e3", "e4", "f1"]
