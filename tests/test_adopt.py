"""Runs outlive their daemon: what is alive is adopted by the next one."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from conftest import Box, Watch, wait_until
from proc import alive, children, find_keeper

#: Writes numbered lines to both streams, and what it wrote to files, until it is told to stop.
WRITER = """
import os, sys, pathlib, random, time
here = pathlib.Path(sys.argv[1])
chance = random.Random(sys.argv[2])
files = {1: open(here / "out", "wb", buffering=0), 2: open(here / "err", "wb", buffering=0)}
(here / "pids").open("a").write(f"{os.getpid()}\\n")
n = 0
while not (here / "finish").exists():
    n += 1
    fd = chance.choice((1, 1, 2))
    line = f"{n} {'é' * chance.randint(0, 60)}\\n".encode()
    files[fd].write(line)
    while line:
        line = line[os.write(fd, line):]
    if chance.random() < 0.02:
        time.sleep(0.01)
sys.exit(7)
"""


@pytest.fixture
def living(stopped_box: Box) -> Box:
    stopped_box.configure("[queue]\noutlive = '60s'\n")
    stopped_box.start()
    return stopped_box


def written(path: Path) -> int:
    return (path / "out").stat().st_size if (path / "out").exists() else 0


def of(watch: Watch, stream: str) -> bytes:
    return "".join(e["data"] for e in watch.chunks() if e["stream"] == stream).encode()


def test_a_command_goes_on_through_kills_of_its_daemon(living: Box, tmp_path: Path) -> None:
    box = living
    run = box.submit_py("t", WRITER, str(tmp_path), "1")
    early = Watch(box, "t")
    keeper, (server,) = find_keeper(box.pid), children(box.pid, "nats-server")
    chance = random.Random(1)
    for _ in range(5):
        size = written(tmp_path)
        wait_until(lambda size=size: written(tmp_path) > size, "it writes")
        time.sleep(chance.uniform(0, 0.3))
        box.kill()
        box.start()
    assert alive(keeper)
    assert alive(server)
    (tmp_path / "finish").touch()
    assert early.wait() == 1
    late = Watch(box, "t")
    assert late.wait() == 1
    shown = box.show(run)
    assert (shown["status"], shown["exit_code"], shown["attempt"]) == ("failed", 7, 1)
    assert len((tmp_path / "pids").read_text().split()) == 1
    for watch in (early, late):
        assert [e["type"] for e in watch.events].count("reset") == 1
        assert of(watch, "stdout") == (tmp_path / "out").read_bytes()
        assert of(watch, "stderr") == (tmp_path / "err").read_bytes()
        assert [e["seq"] for e in watch.chunks()] == list(range(1, len(watch.chunks()) + 1))
    assert box.term() == 0
    wait_until(lambda: not alive(keeper) and not alive(server), "all has ended")
