"""The daemon's log: a line an event, what it is about, and the journal's protocol."""

from __future__ import annotations

import array
import json
import logging
import os
import re
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import Box
from runctl.supervisor.host import journal, logs
from runctl.supervisor.host.journal import Journal

short = pytest.mark.short


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("runctld", level, "f", 1, message, (), None)


@short
def test_a_plain_line_ends_with_what_it_is_about():
    with logs.about(thread="a b", run="01x", attempt=2):
        line = logs.Plain(str).format(record("run started"))
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO runctld: run started"
        r' thread="a b" run=01x attempt=2',
        line,
    )
    assert logs.Plain(str).format(record("next")).endswith("runctld: next")


@short
def test_one_line_whatever_the_message_holds():
    with logs.about(thread="x\ny"):
        line = logs.Plain(str).format(record("first\nINFO runctld: forged\r\u2028"))
    assert line.endswith(r'runctld: first\nINFO runctld: forged\r\u2028 thread="x\ny"')
    assert len(line.splitlines()) == 1


@short
def test_no_message_steers_the_terminal_at_which_it_is_read():
    text = "\x1b]0;title\x07 of\x9b2J\u202ean endpoint"
    try:
        raise ValueError(text)
    except ValueError as error:
        entry = record(f"it said {error}")
        entry.exc_info = (type(error), error, error.__traceback__)
        line = logs.Plain(str).format(entry)
    assert line.count(r"\x1b]0;title\x07 of\x9b2J\u202ean endpoint") == 2
    assert line.isascii()
    assert "\nTraceback" in line


@short
def test_a_terminal_gets_short_lines():
    assert re.fullmatch(r"\d\d:\d\d:\d\d ready", logs.Short(str).format(record("ready")))
    warned = logs.Short(str).format(record("careful", logging.WARNING))
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: careful", warned)


@short
def test_json_and_its_secrets():
    with logs.about(thread="t", attempt=1):
        text = logs.Json(lambda x: x.replace("sesame", "***")).format(record('a "sesame"\nb'))
    found = json.loads(text)
    assert found.pop("time").endswith("Z")
    found.pop("executor", None)
    assert found == {
        "level": "info",
        "logger": "runctld",
        "message": 'a "***"\nb',
        "thread": "t",
        "attempt": "1",
    }


# ---- the journal -----------------------------------------------------------------------


def decode(data: bytes) -> dict[str, str]:
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[9 + size :]
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "journal"))
        made.settimeout(10)
        yield made


@pytest.fixture
def handler(listener: socket.socket) -> Iterator[logs.ToJournal]:
    stderr = logging.StreamHandler(sys.stderr)
    with closing(logs.ToJournal(Journal(listener.getsockname()), str, stderr)) as made:
        yield made


@short
def test_an_entry_of_the_journal(listener: socket.socket, handler: logs.ToJournal):
    with logs.about(thread="t=1", run="r", attempt=3):
        handler.emit(record("two\nlines", logging.WARNING))
    fields = decode(listener.recv(65536))
    fields.pop("EXECUTOR", None)
    assert fields == {
        "MESSAGE": 'two\nlines thread="t=1" run=r attempt=3',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "runctld",
        "LOGGER": "runctld",
        "THREAD": "t=1",
        "RUN": "r",
        "ATTEMPT": "3",
    }


@short
def test_an_entry_that_no_datagram_holds(listener: socket.socket, handler: logs.ToJournal):
    handler.emit(record("x" * (20 << 20)))
    data, ancillary, _, _ = listener.recvmsg(65536, socket.CMSG_SPACE(4))
    assert data == b""
    fds = array.array("i", ancillary[0][2])
    with open(fds[0], "rb") as file:
        file.seek(0)
        fields = decode(file.read())
        with pytest.raises(PermissionError):  # sealed
            os.ftruncate(file.fileno(), 1)
    assert len(fields["MESSAGE"]) == 20 << 20


@short
def test_a_journal_that_does_not_read_stops_nobody(
    listener: socket.socket, handler: logs.ToJournal
):
    for n in range(5000):
        handler.emit(record(f"message {n}"))
    taken = 0
    while select.select([listener], [], [], 0)[0]:
        listener.recv(65536)
        taken += 1
    handler.emit(record("again"))
    assert decode(listener.recv(65536))["RUNCTL_LOST"] == str(5000 - taken)
    handler.emit(record("and again"))
    assert "RUNCTL_LOST" not in decode(listener.recv(65536))


@short
def test_without_a_journal_stderr_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    stderr = logging.StreamHandler(sys.stderr)
    with closing(logs.ToJournal(Journal(str(tmp_path / "none")), str, stderr)) as handler:
        handler.emit(record("still said"))
    assert "still said" in capfd.readouterr().err


@short
def test_the_journal_is_known_by_its_stream():
    stat = os.fstat(2)
    assert journal.stderr_is_journal({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"})
    assert not journal.stderr_is_journal({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino + 1}"})
    assert not journal.stderr_is_journal({})


# ---- the daemon ------------------------------------------------------------------------


def test_a_run_is_told_in_two_lines(stopped_box: Box):
    box = stopped_box
    box.configure('[log]\nformat = "json"\n')
    box.start()
    run = box.submit("demo", "sh", "-c", "exit 3")
    box.runctl("wait", run, code=1)
    box.term()
    lines = [json.loads(line) for line in box.log.read_text().splitlines()]
    entries = [x for x in lines if "its runs are root's" not in x["message"]]
    assert all(entry["level"] == "info" for entry in entries)
    assert len({entry["executor"] for entry in entries}) == 1
    about = [(e["message"], e["attempt"]) for e in entries if e.get("run") == run]
    assert about == [("run started", "1"), ("run failed: sh exited with code 3", "1")]
    assert "0 unfinished runs recovered" in entries[0]["message"]
