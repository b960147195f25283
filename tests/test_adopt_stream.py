"""The stream changes while no daemon is there: what it lacks then is told, and nothing that was
never written comes in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from adopting import LONG, OUTLIVE, go_on, submit_writer, wait_below, written
from conftest import Box, Watch, wait_until
from house import Bus
from runctl.protocol.subjects import STREAM, out_subject

#: Writes lines of 1,000 bytes; as many as a file says, and more when it says so.
LINES = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
(here / "pids").open("a").write(f"{os.getpid()}\\n")
n = 0
while True:
    wanted = (here / "wanted").read_text()
    if wanted == "end":
        break
    while wanted and n < int(wanted):
        os.write(1, f"{n:09} {'x' * 989}\\n".encode())
        n += 1
    (here / "wrote").write_text(str(n))
    time.sleep(0.01)
"""


@pytest.fixture
def living(stopped_box: Box) -> Box:
    stopped_box.configure(OUTLIVE)
    stopped_box.start()
    return stopped_box


@pytest.fixture
def bus(living: Box) -> Iterator[Bus]:
    """Over the server that outlives the daemon."""
    with closing(Bus(living.state)) as made:
        yield made


class Lines:
    def __init__(self, box: Box, path: Path) -> None:
        self._path = path
        self.want("0")
        (path / "wrote").write_text("0")
        self.run = box.submit_py("t", LINES, str(path))

    def want(self, text: str) -> None:
        (self._path / "next").write_text(text)
        (self._path / "next").rename(self._path / "wanted")

    def write(self, count: int) -> None:
        """Up to so many in all."""
        self.want(str(count))
        wait_until(lambda: (self._path / "wrote").read_text() == str(count), "it has written")

    def is_one(self) -> bool:
        return len((self._path / "pids").read_text().split()) == 1


def lines_of(watch: Watch) -> list[int]:
    """The numbers of the lines that it has shown whole; fails at what was never written."""
    text = watch.text()
    assert "\0" not in text
    # The first may have lost its beginning, and the last may still lack its end.
    found = text.split("\n")[1:-1]
    for line in found:
        assert line[9:] == " " + "x" * 989, line
    return [int(line[:9]) for line in found]


@pytest.mark.parametrize("lost", ["the stream", "all of it", "nothing"])
def test_what_nats_has_lost(living: Box, bus: Bus, tmp_path: Path, lost: str) -> None:
    """Of a run that has written more than is kept in memory, and is silent meanwhile."""
    box, lines = living, Lines(living, tmp_path)
    early = Watch(box, "t")
    lines.write(2000)
    wait_until(lambda: early.text().count("\n") == 2000, "all of it is seen")
    subject = out_subject("t", lines.run)
    box.kill()
    if lost == "the stream":
        bus.call(f"$JS.API.STREAM.DELETE.{STREAM}", limit=60)
    elif lost == "all of it":
        bus.call(f"$JS.API.STREAM.PURGE.{STREAM}", f'{{"filter": "{subject}"}}'.encode())
    box.start()
    lines.write(2100)
    late = Watch(box, "t")
    wait_until(lambda: late.text().count("\n") >= 1 and lines_of(late)[-1:] == [2099], "it goes on")
    lines.want("end")
    assert late.wait() == 0
    seen = lines_of(late)
    assert seen[-100:] == list(range(2000, 2100)), "what was written since is there"
    gaps = [b - a for a, b in pairwise(seen) if b != a + 1]
    told = [e for e in late.events if e["type"] == "gap"]
    if lost == "nothing":
        assert seen == list(range(1, 2100))
        assert not told
    else:
        assert len(gaps) <= 1
        assert 2000 - seen[-1 - 100] > 60 or seen[-101] == 1999, "the newest is kept in memory"
        assert told or lost == "all of it", "what is missing is told"
    assert early.wait() == 0
    assert "\0" not in early.text()
    assert box.show(lines.run)["attempt"] == 1
    assert lines.is_one()


def test_a_silent_run_whose_output_has_expired(living: Box, bus: Bus, tmp_path: Path) -> None:
    box, lines = living, Lines(living, tmp_path)
    watch = Watch(box, "t")
    lines.write(10)
    wait_until(lambda: watch.text().count("\n") == 10, "all of it is seen")
    for _ in range(2):
        box.kill()
        body = f'{{"filter": "{out_subject("t", lines.run)}"}}'.encode()
        bus.call(f"$JS.API.STREAM.PURGE.{STREAM}", body)
        box.start()
        assert box.show(lines.run)["attempt"] == 1
    lines.write(20)
    late = Watch(box, "t")
    wait_until(lambda: late.text().endswith(f"{19:09} {'x' * 989}\n"), "it goes on")
    lines.want("end")
    assert (late.wait(), watch.wait()) == (0, 0)
    assert watch.text().endswith(f"{19:09} {'x' * 989}\n")
    assert box.show(lines.run)["attempt"] == 1
    assert lines.is_one()


def test_a_stream_that_takes_nothing_at_the_adoption(living: Box, bus: Bus, tmp_path: Path) -> None:
    """The run goes on, and waits; what it has said is stored once the stream takes it. An abort
    gets through."""
    import json

    box, lines = living, Lines(living, tmp_path)
    lines.write(10)
    box.submit("other", "sleep", "600")
    wait_below(box, 3)
    box.kill()
    settings = json.loads(bus.call(f"$JS.API.STREAM.INFO.{STREAM}"))["config"]
    full = settings | {"discard": "new", "max_bytes": 2000}
    answer = json.loads(bus.call(f"$JS.API.STREAM.UPDATE.{STREAM}", json.dumps(full).encode()))
    assert "error" not in answer, answer
    box.start(ready=False)
    lines.write(30)  # what a pipe holds
    wait_until(lambda: box.json("status", "--wait", "300s")["running"] == 2, "it is adopted")
    box.runctl("abort", "other", "--wait", "300s")
    bus.call(f"$JS.API.STREAM.UPDATE.{STREAM}", json.dumps(settings).encode())
    watch = Watch(box, "t")
    wait_until(lambda: watch.text().count("\n") == 30, "all of it is stored")
    lines.want("end")
    assert watch.wait() == 0
    assert box.show(lines.run)["attempt"] == 1
    assert lines.is_one()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 40 MB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.long
def test_a_full_disk_at_the_adoption(stopped_box: Box, small: Path, tmp_path: Path) -> None:
    """The daemon may fail to start; nothing is lost, and the one that has room goes on."""
    box = stopped_box
    box.state = small / "state"
    box.configure(f"start_timeout = '5s'\n{OUTLIVE.removeprefix(LONG)}".replace("600s", "5s"))
    box.start()
    run = submit_writer(box, tmp_path / "w")
    watch = Watch(box, "t")
    box.kill()
    with suppress(OSError), (small / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    daemon = box.start(ready=False)
    wait_until(
        lambda: daemon.poll() is not None or b" ready: " in box.log.read_bytes()[box._begun :],
        "it is there, or has given up",
    )
    (small / "fill").unlink()
    if daemon.poll() is not None:
        assert daemon.poll() == 69, box.log.read_text()[-2000:]
        box.start()
    go_on(tmp_path / "w", 100_000)
    (tmp_path / "w" / "finish").touch()
    assert watch.wait() == 1
    assert written(tmp_path / "w") == len(
        "".join(e["data"] for e in watch.chunks() if e["stream"] == "stdout").encode()
    )
    assert box.show(run)["attempt"] == 1
    assert os.path.exists(box.state)
