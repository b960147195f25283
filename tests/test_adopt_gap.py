"""What is asked for, started or stopped while a daemon is dead, and while the next one takes over
what runs."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from adopting import LONG, OUTLIVE, go_on, is_exact, submit_writer, wait_below
from conftest import DEADLINE, NIGHT, Box, Watch, wait_until
from proc import alive, direct_children, find_keeper

#: Longer than any start takes.
WAIT = ("--wait", "300s")
#: At TERM it cleans up, for a moment, as does a part of it in a session of its own.
CLEANING = """
import os, signal, sys, time
folder = sys.argv[1]
def clean(name):
    def handler(*_):
        time.sleep(0.2)
        open(f"{folder}/{name}", "w").close()
        os._exit(0)
    signal.signal(signal.SIGTERM, handler)
if os.fork() == 0:
    os.setsid()
    clean("part")
else:
    clean("whole")
open(f"{folder}/up-{os.getpid()}", "w").close()
time.sleep(600)
"""


@pytest.fixture
def living(stopped_box: Box) -> Box:
    stopped_box.configure(f"{LONG}[queue]\noutlive = '600s'\nstop_grace = '60s'\n")
    stopped_box.start()
    return stopped_box


def test_verbs_in_the_gap_wait_for_the_next_daemon(living: Box, tmp_path: Path) -> None:
    box = living
    run = submit_writer(box, tmp_path / "w", "w")
    cleaning = box.submit_py("c", CLEANING, str(tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2, "it is up")
    box.kill()
    verbs = {
        "list": box.popen("list", *WAIT),
        "submit": box.popen("submit", "new", *WAIT, "--", "echo", "done"),
        "abort": box.popen("abort", "c", *WAIT),
        "purge": box.popen("purge", "--yes", "w", *WAIT),
        "show": box.popen("show", run, *WAIT),
    }
    watch = Watch(box, "w", *WAIT)
    box.start()
    ends = {name: (*client.communicate(timeout=DEADLINE), client) for name, client in verbs.items()}
    codes = {name: client.returncode for name, (_, _, client) in ends.items()}
    assert codes == {"list": 0, "submit": 0, "abort": 0, "purge": 6, "show": 0}, ends
    assert b"in flight" in ends["purge"][1]
    assert (tmp_path / "whole").exists(), "its grace was its own"
    assert (tmp_path / "part").exists()
    assert not any(alive(int(x.name[3:])) for x in tmp_path.glob("up-*"))
    assert box.ended(cleaning)["status"] == "aborted"
    box.runctl("wait", ends["submit"][0].decode().strip())
    (tmp_path / "w" / "finish").touch()
    is_exact(watch, tmp_path / "w")
    assert box.show(run)["attempt"] == 1


def test_an_abort_right_after_the_start_finds_the_run(living: Box) -> None:
    """Many, all asked for before there is a daemon."""
    box = living
    runs = [box.submit(f"t{n}", "sleep", "600") for n in range(8)]
    for run in runs:
        wait_until(lambda run=run: box.show(run)["status"] == "running", "it runs")
    _, below = wait_below(box, 9)
    box.kill()
    aborts = [box.popen("abort", f"t{n}", *WAIT) for n in range(8)]
    box.start()
    assert [client.wait(DEADLINE) for client in aborts] == [0] * 8
    assert [pid for pid in below if alive(pid)] == direct_children(find_its_keeper(box))
    assert {box.ended(run)["status"] for run in runs} == {"aborted"}


def find_its_keeper(box: Box) -> int:
    pid: int = box.json("status")["keeper"]["pid"]
    return pid


def test_a_purge_under_an_adopted_run_is_for_good(living: Box, tmp_path: Path) -> None:
    """What was purged does not come back with the next daemon."""
    box = living
    secret, more = tmp_path / "secret", tmp_path / "more"
    code = (
        "import os, sys, time\n"
        "os.write(1, b'the secret\\n')\n"
        "for name in sys.argv[1:]:\n"
        "    while not os.path.exists(name): time.sleep(0.01)\n"
        "    os.write(1, name.encode())\n"
    )
    run = box.submit_py("t", code, str(secret), str(more))
    watch = Watch(box, "t")
    watch.wait_chunks(1)
    box.kill()
    box.start()
    box.runctl("purge", "--yes", "--force", "t")
    box.kill()
    box.start()
    secret.touch()
    late = Watch(box, "t")
    late.wait_chunks(1)
    box.kill()
    box.start()
    more.touch()
    assert late.wait() == 0
    assert late.text() == f"{secret}{more}"
    assert box.runctl("attach", "t") == f"{secret}{more}"
    assert box.show(run)["attempt"] == 1


@pytest.mark.parametrize("amid", [False, True], ids=["in the gap", "while one adopts"])
def test_of_two_daemons_one_takes_what_runs(living: Box, tmp_path: Path, amid: bool) -> None:
    box = living
    run = submit_writer(box, tmp_path / "w")
    watch = Watch(box, "t")
    keeper = find_keeper(box.pid)
    box.kill()
    first = box.start(ready=False)
    if amid:
        wait_until(lambda: b"go on" in box.log.read_bytes()[box._begun :], "it adopts")
    second = box.start(ready=False)
    third = box.start(ready=False)
    wait_until(lambda: box.log.read_text().count(" ready: ") == 2, "one is ready")
    wait_until(lambda: sum(x.poll() is None for x in (first, second, third)) == 1, "one is there")
    assert sorted(x.poll() or 0 for x in (first, second, third)) == [0, 75, 75]
    (box.daemon,) = (x for x in (first, second, third) if x.poll() is None)
    assert find_its_keeper(box) == keeper
    go_on(tmp_path / "w")
    (tmp_path / "w" / "finish").touch()
    is_exact(watch, tmp_path / "w")
    assert box.show(run)["attempt"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_it_starts(living: Box, tmp_path: Path, number: signal.Signals) -> None:
    """TERM ends all at once, USR1 leaves it to the next one."""
    box = living
    run = submit_writer(box, tmp_path / "w")
    keeper = find_keeper(box.pid)
    below = direct_children(keeper)
    box.kill()
    daemon = box.start(ready=False)
    wait_until(lambda: _is_connected(keeper), "it has taken all")
    daemon.send_signal(number)
    assert daemon.wait(DEADLINE) == 0
    if number == signal.SIGTERM:
        assert not any(alive(pid) for pid in (keeper, *below))
    else:
        assert all(alive(pid) for pid in (keeper, *below))
    box.start()
    wait_until(lambda: box.show(run)["status"] == "running", "it goes on")
    assert box.show(run)["attempt"] == (2 if number == signal.SIGTERM else 1)
    (tmp_path / "w" / "finish").touch()
    assert Watch(box, "t").wait() == 1


def _is_connected(keeper: int) -> bool:
    """Whether a daemon has come to ``keeper``, which does not listen to another one then."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    inodes = {x.split()[6] for x in lines if x.endswith(" keeper.sock") and x.split()[5] == "03"}
    held = set()
    for fd in Path(f"/proc/{keeper}/fd").iterdir():
        try:
            held.add(os.readlink(fd))
        except OSError:
            continue
    return any(f"socket:[{inode}]" in held for inode in inodes)


# ---- kills while much is written -----------------------------------------------------------

#: Writes numbered lines to both streams as fast as it can, up to the quota in a file, and waits
#: for a larger one; says what it wrote by its hashes.
FLOOD = """
import hashlib, os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
(here / "pids").open("a").write(f"{os.getpid()}\\n")
written, n, sums = 0, 0, {1: hashlib.sha256(), 2: hashlib.sha256()}
while True:
    quota = int((here / "quota").read_text() or 0)
    if written >= quota and (here / "finish").exists():
        break
    while written < quota:
        for fd, count in ((1, 40), (2, 20)):
            lines = "".join(f"{i} {'é' * (i % 60)}\\n" for i in range(n, n + count)).encode()
            n += count
            sums[fd].update(lines)
            written += len(lines)
            while lines:
                lines = lines[os.write(fd, lines):]
    (here / "out").write_text(str(written))
    time.sleep(0.005)
(here / "sums").write_text(" ".join(x.hexdigest() for x in sums.values()))
sys.exit(7)
"""


class Sums(Watch):
    """Hashes of what comes, which may be more than is kept."""

    def _read(self, fd: int) -> None:
        import hashlib
        import json

        self.sums = {"stdout": hashlib.sha256(), "stderr": hashlib.sha256()}
        self.others: list[str] = []
        self.seq = 0
        with open(fd, "rb") as pipe:
            for line in pipe:
                event = json.loads(line)
                if event["type"] == "chunk":
                    assert event["seq"] == self.seq + 1
                    self.seq += 1
                    self.sums[event["stream"]].update(event["data"].encode())
                else:
                    self.others.append(event["type"])

    def is_exact(self, path: Path) -> None:
        assert self.wait() == 1
        assert self.others == ["reset", "end"]
        sums = " ".join(x.hexdigest() for x in self.sums.values())
        assert sums == (path / "sums").read_text()


@pytest.mark.parametrize(
    ("kills", "size"),
    [
        pytest.param(10, 20_000_000, marks=pytest.mark.long),
        pytest.param(50, 200_000_000, marks=[pytest.mark.long, pytest.mark.nightly]),
    ],
)
@pytest.mark.nightly
def test_kills_under_a_flood(stopped_box: Box, tmp_path: Path, kills: int, size: int) -> None:
    """At any moment, also of the start. Watchers come early, amid it, and late."""
    box, chance, here = stopped_box, random.Random(kills), tmp_path
    box.configure(f"{OUTLIVE}[stream]\nmax_bytes = '1GiB'\n")
    box.start()
    (here / "quota").write_text("100000")
    run = box.submit_py("t", FLOOD, str(here))
    watches = [Sums(box, "t")]
    for kill in range(kills):
        quota = size * (kill + 1) // kills
        (here / "next").write_text(str(quota))
        (here / "next").rename(here / "quota")
        time.sleep(chance.uniform(0, 0.3))
        box.kill()
        if kill == kills // 2:
            box.start()
            watches.append(Sums(box, "t"))
        elif chance.random() < 0.5:
            box.start()
        else:
            box.start(ready=False)
            time.sleep(chance.uniform(0, 1.2))
    box.kill()
    box.start()
    wait_until(lambda: int((here / "out").read_text() or 0) >= size, "all is written")
    (here / "finish").touch()
    watches[0].wait()
    watches.append(Sums(box, "t"))
    for watch in watches:
        watch.is_exact(here)
    shown = box.show(run)
    assert (shown["status"], shown["exit_code"], shown["attempt"]) == ("failed", 7, 1)
    assert len((here / "pids").read_text().split()) == 1


#: Notes that it begins and that it ends; some time between.
BRIEF = """
import os, sys, time
def note(what):
    fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{what} {os.getpid()} {time.monotonic()}\\n".encode())
note("begin")
print("x" * 1000)
time.sleep(0.3)
note("end")
"""


@pytest.mark.long
def test_kills_as_runs_begin(living: Box, tmp_path: Path) -> None:
    """In the moments of a submit, a spawn and an end: each run ends, no process of it is there
    beside another, and none was begun again that could go on."""
    box, chance = living, random.Random(1)
    kills = 8 if NIGHT else 3
    for kill in range(kills):
        verbs = []
        for n in range(3):
            argv = sys.executable, "-c", BRIEF, str(tmp_path / f"{kill}-{n}")
            verbs.append(("submit", f"t{n}", "--id", f"r-{kill}-{n}", *WAIT, "--", *argv))
        clients = [box.popen(*verb) for verb in verbs]
        time.sleep(chance.uniform(0.1, 1.0))
        box.kill()
        time.sleep(chance.uniform(0, 0.5))
        box.start()
        for verb, client in zip(verbs, clients, strict=True):
            if client.wait(DEADLINE) == 4:  # its answer was lost: the same id is the same run
                box.runctl(*verb)
    for kill in range(kills):
        for n in range(3):
            run = f"r-{kill}-{n}"
            box.runctl("wait", run)
            shown = box.ended(run)
            assert shown["status"] == "succeeded"
            lines = [x.split() for x in (tmp_path / f"{kill}-{n}").read_text().splitlines()]
            assert [x[0] for x in lines] == ["begin", "end"], (run, shown["attempt"], lines)
            assert len({x[1] for x in lines}) == 1
            assert box.runctl("attach", f"t{n}", "--run", run) == "x" * 1000 + "\n"
