"""Runs outlive their daemon: what is alive is adopted by the next one."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import Box, Watch, wait_until
from proc import alive, children, direct_children, find_keeper

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


TALKER = r"""
import os, sys, pathlib, random, time
here = pathlib.Path(sys.argv[1])
n = 0
journal = open(here / "out", "wb", buffering=0)
(here / "pids").open("a").write(f"{os.getpid()}\n")
assert os.isatty(0) and os.isatty(1)
while not (here / "finish").exists():
    n += 1
    line = f"{n} {'é' * (n % 50)}\n".encode()
    journal.write(line)
    while line:
        line = line[os.write(1, line):]
    if n % 100 == 0:
        time.sleep(0.01)
os.stat("/dev/tty"), open("/dev/tty", "wb").close()
"""
READER = """
import hashlib, os, sys, time
found = hashlib.sha256()
size = 0
while data := os.read(0, 4096):
    found.update(data)
    size += len(data)
    time.sleep(0.005)
print(size, found.hexdigest())
"""


def test_a_terminal_goes_on(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure(
        "[queue]\noutlive = '60s'\n[runners.tty]\nkind = 'command'\ntty = true\nargs = true\n"
    )
    box.start()
    argv = (sys.executable, "-c", TALKER, str(tmp_path))
    run = box.runctl("submit", "t", "--runner", "tty", "--", *argv).strip()
    watch = Watch(box, "t")
    for _ in range(5):
        size = written(tmp_path)
        wait_until(lambda size=size: written(tmp_path) > size, "it writes")
        box.kill()
        box.start()
    (tmp_path / "finish").touch()
    assert watch.wait() == 0
    assert box.show(run)["attempt"] == 1
    assert len((tmp_path / "pids").read_text().split()) == 1
    assert of(watch, "stdout") == (tmp_path / "out").read_bytes()


def test_a_prompt_that_is_half_fed(living: Box, tmp_path: Path) -> None:
    box = living
    prompt = random.Random(1).randbytes(300_000).hex()
    run = box.runctl(
        "submit", "t", "-", "--", sys.executable, "-c", READER, input=prompt.encode()
    ).strip()
    watch = Watch(box, "t")
    wait_until(lambda: box.show(run)["status"] == "running", "it runs")
    for _ in range(3):
        box.kill()
        box.start()
    assert watch.wait() == 0
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    assert watch.text() == f"{len(prompt)} {digest}\n"
    assert box.show(run)["attempt"] == 1


def test_what_ends_while_there_is_no_daemon(living: Box, tmp_path: Path) -> None:
    """Each with 60 KB of output that nobody has taken."""
    box = living
    code = (
        "import os, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "os.write(1, b'x' * 60000)\n"
        "open(sys.argv[3], 'w').close()\n"
        "if sys.argv[2] == 'signal': os.kill(os.getpid(), 9)\n"
        "sys.exit(int(sys.argv[2]))"
    )
    ways = {"zero": "0", "seven": "7", "signal": "signal"}
    runs = {
        name: box.submit_py(name, code, str(tmp_path / "go"), how, str(tmp_path / name))
        for name, how in ways.items()
    }
    for run in runs.values():
        wait_until(lambda run=run: box.show(run)["status"] == "running", "it runs")
    box.kill()
    (tmp_path / "go").touch()
    wait_until(lambda: all((tmp_path / name).exists() for name in ways), "they end")
    box.start()
    for name, code in {"zero": 0, "seven": 7, "signal": 137}.items():
        box.runctl("wait", runs[name], code=None)
        shown = box.show(runs[name])
        assert (shown["exit_code"], shown["attempt"]) == (code, 1), name
        assert box.runctl("attach", name, code=None) == "x" * 60000


def test_all_ends_where_no_daemon_comes(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[queue]\noutlive = '1s'\n")
    box.start()
    run = box.submit("t", "sleep", "600")
    wait_until(lambda: box.show(run)["status"] == "running", "it runs")
    keeper = find_keeper(box.pid)
    below = direct_children(keeper)
    assert len(below) == 2
    box.kill()
    wait_until(lambda: not any(alive(pid) for pid in (keeper, *below)), "all has ended")
    box.start()
    wait_until(lambda: box.show(run)["attempt"] == 2, "it is replayed")
    box.runctl("abort", "t")


def test_a_stop_in_order_ends_all(living: Box) -> None:
    run = living.submit("t", "sleep", "600")
    wait_until(lambda: living.show(run)["status"] == "running", "it runs")
    keeper = find_keeper(living.pid)
    below = direct_children(keeper)
    assert living.term() == 0
    assert not any(alive(pid) for pid in (keeper, *below))
    living.start()
    wait_until(lambda: living.show(run)["attempt"] == 2, "it is replayed")
    living.runctl("abort", "t")


@pytest.mark.parametrize("first", ["keeper", "daemon"])
def test_a_keeper_that_dies_with_its_daemon(living: Box, first: str) -> None:
    run = living.submit("t", "sleep", "600")
    wait_until(lambda: living.show(run)["status"] == "running", "it runs")
    keeper = find_keeper(living.pid)
    below = direct_children(keeper)
    if first == "daemon":
        living.kill()
        os.kill(keeper, signal.SIGKILL)
    else:
        os.kill(living.pid, signal.SIGSTOP)
        os.kill(keeper, signal.SIGKILL)
        living.kill()
    wait_until(lambda: not any(alive(pid) for pid in below), "all has ended")
    living.start()
    wait_until(lambda: living.show(run)["attempt"] == 2, "it is replayed")
    living.runctl("abort", "t")


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
