"""What the tests of adoption have in common: work that notes down what it does, and how its
output is compared with that."""

from __future__ import annotations

from pathlib import Path

from conftest import Box, Watch, wait_until
from proc import direct_children, find_keeper

#: Longer than any test takes.
LONG = "start_timeout = '600s'\n"
LIVE_ON = "[queue]\noutlive = '600s'\n"
OUTLIVE = LONG + LIVE_ON
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
#: As that, on a terminal, where there is one stream.
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


def written(path: Path) -> int:
    return (path / "out").stat().st_size if (path / "out").exists() else 0


def of(watch: Watch, stream: str) -> bytes:
    return "".join(e["data"] for e in watch.chunks() if e["stream"] == stream).encode()


def is_exact(watch: Watch, path: Path, code: int = 1) -> None:
    """What was seen is what was written, by one process. ``code``: of the attach."""
    assert watch.wait() == code
    assert [e["type"] for e in watch.events].count("reset") == 1
    assert of(watch, "stdout") == (path / "out").read_bytes()
    assert of(watch, "stderr") == (path / "err").read_bytes()
    assert len((path / "pids").read_text().split()) == 1


def submit_writer(box: Box, path: Path, thread: str = "t") -> str:
    """A run of WRITER, once it writes."""
    path.mkdir(exist_ok=True)
    run = box.submit_py(thread, WRITER, str(path), thread)
    wait_until(lambda: written(path) > 1000, "it writes")
    return run


def wait_below(box: Box, count: int) -> tuple[int, list[int]]:
    """The keeper, and the ``count`` processes below it, its nats-server among them, once they are
    there: a run's status is "running" a moment before its process exists."""
    keeper = find_keeper(box.pid)

    def all_of_them() -> list[int]:
        below = direct_children(keeper)
        return below if len(below) == count else []

    return keeper, wait_until(all_of_them, f"{count} are below the keeper")


def submit_sleeper(box: Box) -> tuple[str, int, list[int]]:
    """A run that sleeps, on thread t, once it does: its ID, the keeper, and what is below that."""
    run = box.submit("t", "sleep", "600")
    wait_until(lambda: box.show(run)["status"] == "running", "it runs")
    return run, *wait_below(box, 2)


def go_on(path: Path, more: int = 1) -> None:
    """Wait until the work has written ``more`` bytes."""
    size = written(path)
    wait_until(lambda: written(path) >= size + more, "it writes")


def wait_stored(watch: Watch, path: Path) -> None:
    """Wait until ``watch`` has seen what the work writes from now on: the daemon that is there
    has stored it, and no earlier one."""
    begin = written(path)
    count = size = 0

    def is_beyond() -> bool:
        nonlocal count, size
        new = watch.chunks()[count:]
        count += len(new)
        size += sum(len(e["data"].encode()) for e in new if e["stream"] == "stdout")
        return size > begin

    wait_until(is_beyond, "what is written now is stored")
