"""A disk that is smaller than what may be stored on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, Watch, wait_until

MiB = 1024**2


@pytest.fixture
def small(stopped_box: Box) -> Iterator[Box]:
    """A state directory on a file system of 64 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = stopped_box.path / "disk"
    disk.mkdir()
    options = ("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk))
    if subprocess.run(["mount", *options], capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    stopped_box.state = disk / "state"
    try:
        yield stopped_box
    finally:
        stopped_box.close()
        subprocess.run(["umount", "-l", str(disk)], check=True)


def write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.write(b"\0" * size)


def test_it_starts_and_keeps_what_fits(small: Box) -> None:
    small.configure("")
    small.start()
    assert "stream.max_bytes is 4GiB" in small.log.read_text()
    for _ in range(4):  # twice what there is room for
        run = small.submit_py("t", "import sys; sys.stdout.write('x' * 20_000_000)")
        small.runctl("wait", run)
    assert small.json("status")["nats"]["stream_bytes"] < 48 * MiB
    assert small.term() == 0
    write(small.path / "disk" / "other", 8 * MiB)
    small.start()  # what is stored counts as room
    small.runctl("wait", small.submit("t", "true"))
    assert "Traceback" not in small.log.read_text()


#: Enough that the disk is full before it is done.
#: Until argv[1] is there, which may take its time on a busy machine.
LINES = """
import os, sys, time
i = 0
while i < 200 or not os.path.exists(sys.argv[1]):
    print(i, "x" * 2000, flush=True)
    time.sleep(0.02)
    i += 1
"""


def test_a_disk_that_fills_up(small: Box) -> None:
    """As docs/troubleshooting.md has it: reading works, new work is refused, output is whole."""
    small.configure("")
    small.start()
    enough = small.path / "enough"
    run = small.submit_py("t", LINES, str(enough))
    watch = Watch(small, "t")
    watch.wait_chunks(3)
    other = small.path / "disk" / "other"

    def fill() -> None:
        with other.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)

    fill()
    renewed = "nats-server stores nothing"
    wait_until(lambda: renewed in small.log.read_text(), "the server is replaced")
    wait_until(lambda: f'"{run}"' in small.runctl("list", "--json", code=None), "it can be read")
    fill()  # what a server that was replaced has given back
    small.runctl("submit", "other", "--", "true", code=1)
    assert "the database cannot be used now (database or disk is full)" in small.stderr
    other.unlink()
    enough.touch()
    assert watch.wait() == 0
    shown = [int(line.split()[0]) for line in watch.text().splitlines()]
    assert shown == list(range(len(shown)))
    assert len(shown) >= 200
    assert "Traceback" not in small.log.read_text()


def test_no_room_at_all_is_said(small: Box) -> None:
    small.configure("")
    small.state.mkdir(mode=0o700)
    write(small.path / "disk" / "other", 63 * MiB + 900_000)
    daemon = small.start(ready=False)
    assert daemon.wait(DEADLINE) == 69
    last = small.log.read_text().splitlines()[-1]
    assert last.startswith("runctld: ")
    assert "make room" in last
