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
from adopting import (
    OUTLIVE,
    TALKER,
    WRITER,
    go_on,
    is_exact,
    of,
    submit_sleeper,
    wait_below,
    wait_stored,
    written,
)
from conftest import DEADLINE, Box, Watch, wait_until
from proc import alive, children, find_keeper
from runctl.supervisor.execution.found_runs import is_harmful
from runctl.supervisor.processes.keeper_visit import About


@pytest.fixture
def living(stopped_box: Box) -> Box:
    stopped_box.configure(OUTLIVE)
    stopped_box.start()
    return stopped_box


#: Reads a part of its stdin, and the rest once it may; says what that was.
READER = """
import hashlib, os, sys, time
found = hashlib.sha256()
size = 0
while data := os.read(0, 4096):
    found.update(data)
    size += len(data)
    while size > 100_000 and not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
print(size, found.hexdigest())
"""


def test_a_terminal_goes_on(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure(f"{OUTLIVE}[runners.tty]\nkind = 'command'\ntty = true\nargs = true\n")
    box.start()
    argv = (sys.executable, "-c", TALKER, str(tmp_path))
    run = box.runctl("submit", "t", "--runner", "tty", "--", *argv).strip()
    watch = Watch(box, "t")
    for _ in range(5):
        wait_stored(watch, tmp_path)  # else it may seem to take its daemons down
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
        *("submit", "t", "-", "--", sys.executable, "-c", READER, str(tmp_path / "go")),
        input=prompt.encode(),
    ).strip()
    watch = Watch(box, "t")
    wait_below(box, 2)
    for n in range(3):
        box.kill()
        if n == 1:
            (tmp_path / "go").touch()
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
    wait_below(box, 4)
    box.kill()
    (tmp_path / "go").touch()
    wait_until(lambda: all((tmp_path / name).exists() for name in ways), "they end")
    box.start()
    for name, exit_code in {"zero": 0, "seven": 7, "signal": 137}.items():
        box.runctl("wait", runs[name], code=None)
        shown = box.show(runs[name])
        assert (shown["exit_code"], shown["attempt"]) == (exit_code, 1), name
        assert box.runctl("attach", name, code=None) == "x" * 60000


def test_all_ends_where_no_daemon_comes(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[queue]\noutlive = '1s'\n")
    box.start()
    run, keeper, below = submit_sleeper(box)
    box.kill()
    wait_until(lambda: not any(alive(pid) for pid in (keeper, *below)), "all has ended")
    box.start()
    wait_until(lambda: box.show(run)["attempt"] == 2, "it is replayed")
    box.runctl("abort", "t")


def test_a_stop_in_order_ends_all(living: Box) -> None:
    run, keeper, below = submit_sleeper(living)
    assert living.term() == 0
    assert not any(alive(pid) for pid in (keeper, *below))
    living.start()
    wait_until(lambda: living.show(run)["attempt"] == 2, "it is replayed")
    living.runctl("abort", "t")


def test_where_no_socket_can_be_made_all_ends_with_the_daemon(stopped_box: Box) -> None:
    box = stopped_box
    box.configure(OUTLIVE)
    (box.state / "keeper.sock").mkdir(parents=True)
    box.start()
    said = "commands end with this daemon, since no other one could adopt them: keeper.sock cannot"
    wait_until(lambda: said in box.log.read_text(), "it is told")
    run, keeper, below = submit_sleeper(box)
    box.kill()
    wait_until(lambda: not any(alive(pid) for pid in (keeper, *below)), "all has ended")
    box.start()
    wait_until(lambda: box.show(run)["attempt"] == 2, "it is replayed")
    box.runctl("abort", "t")


@pytest.mark.parametrize("first", ["keeper", "daemon"])
def test_a_keeper_that_dies_with_its_daemon(living: Box, first: str) -> None:
    run, keeper, below = submit_sleeper(living)
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
        go_on(tmp_path)
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


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_kills_at_any_time_of_the_start(living: Box, tmp_path: Path, seed: int) -> None:
    """Also while it adopts. Several runs, of which some end meanwhile. Every other daemon stores
    something of each run: of three in a row that do not, the run would be to blame."""
    box, chance = living, random.Random(seed)
    names = [f"t{n}" for n in range(6)]
    runs, watches = {}, {}
    for name in names:
        (tmp_path / name).mkdir()
        runs[name] = box.submit_py(name, WRITER, str(tmp_path / name), name)
        watches[name] = Watch(box, name)
    for name in names:
        wait_until(lambda name=name: written(tmp_path / name) > 10_000, "it writes")
    for n in range(12):
        box.kill()
        if n in (3, 6, 9):
            (tmp_path / names[n // 3 - 1] / "finish").touch()
        box.start(ready=n % 2 == 1)
        if n % 2 == 0:
            time.sleep(chance.uniform(0, 1.2))
            continue
        for name in names[n // 3 :]:
            wait_stored(watches[name], tmp_path / name)
    for name in names:
        (tmp_path / name / "finish").touch()
    for name in names:
        assert watches[name].wait() == 1, name
        shown = box.show(runs[name])
        assert (shown["exit_code"], shown["attempt"]) == (7, 1), name
        assert len((tmp_path / name / "pids").read_text().split()) == 1, name
        for watch in (watches[name], late := Watch(box, name)):
            if watch is late:
                assert watch.wait() == 1
            assert [e["type"] for e in watch.events].count("reset") == 1, name
            assert of(watch, "stdout") == (tmp_path / name / "out").read_bytes(), name
            assert of(watch, "stderr") == (tmp_path / name / "err").read_bytes(), name


@pytest.mark.nightly
def test_what_takes_its_daemon_down_is_not_adopted_for_ever(living: Box) -> None:
    """Each daemon dies right after it has adopted the run, before anything of it is stored. Not
    so the one that leaves."""
    run = living.submit("t", "sleep", "600")
    wait_below(living, 2)
    for times in range(1, 6):
        if times <= 3:
            assert living.daemon is not None
            living.daemon.send_signal(signal.SIGUSR1)
            assert living.daemon.wait(DEADLINE) == 0
        else:
            living.kill()
        living.start()
        wait_until(lambda n=times: len(living.show(run)["adopted_at"]) == n, "it is adopted")
        assert living.show(run)["attempt"] == 1
    living.kill()
    living.start()
    wait_until(lambda: living.show(run)["attempt"] == 2, "it is replayed")
    assert f"run {run} seems to take its daemon down" in living.log.read_text()
    living.runctl("abort", "t")


@pytest.mark.short
def test_who_counts_as_harmful() -> None:
    def harmful(*adopted: tuple[float, int]) -> bool:
        return is_harmful(About("run", "r", 1, adopted=list(adopted)), 10_000)

    assert not harmful()
    assert not harmful((9990, 5), (9995, 5))
    assert harmful((9985, 5), (9990, 5), (9995, 5))
    assert harmful((9985, -1), (9990, -1), (9995, -1))
    assert harmful((9985, 5), (9990, -1), (9995, 5))
    assert not harmful((9985, 4), (9990, -1), (9995, 5)), "something was stored"
    assert not harmful((9985, 5), (9990, 5), (9995, 5), (9996, 6))
    assert not harmful((9980, -1), (9985, 4), (9990, -1), (9995, 5), (9999, -1)), "by every other"
    assert not harmful((9800, 5), (9870, 5), (9935, 5)), "each lived for more than a minute"
    assert not harmful((9885, 5), (9890, 5), (9895, 5)), "the last one did"
    assert harmful(*((6500 + 30 * n, n) for n in range(100))), "so many in an hour"
    assert not harmful(*((6500 + 60 * n, n) for n in range(50)))
    on_purpose = About("run", "r", 1, adopted=[(9985, 5), (9990, 5), (9995, 5)], calm_since=9990)
    assert not is_harmful(on_purpose, 10_000)


@pytest.mark.nightly
def test_the_program_is_started_again_under_a_command(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    box.configure(OUTLIVE)
    box.start(cold=True)
    run = box.submit_py("t", WRITER, str(tmp_path), "1")
    watch = Watch(box, "t")
    daemon, keeper = box.pid, find_keeper(box.pid)
    for n in range(2, 4):
        go_on(tmp_path)
        said = box.runctl("restart", "--wait", "60s")
        assert f"pid {daemon}; 1 run goes on" in said
        assert box.log.read_text().count(" ready: ") == n
    assert box.daemon is not None
    assert box.daemon.poll() is None
    assert find_keeper(daemon) == keeper
    (tmp_path / "finish").touch()
    is_exact(watch, tmp_path)
    assert box.show(run)["attempt"] == 1
    assert box.term() == 0
    assert not alive(keeper)


def test_a_daemon_that_leaves(living: Box, tmp_path: Path) -> None:
    run = living.submit_py("t", WRITER, str(tmp_path), "1")
    watch = Watch(living, "t")
    wait_until(lambda: written(tmp_path) > 1000, "it writes")
    os.kill(living.pid, signal.SIGUSR1)
    assert living.daemon is not None
    assert living.daemon.wait(DEADLINE) == 0
    living.start()
    (tmp_path / "finish").touch()
    is_exact(watch, tmp_path)
    assert living.show(run)["attempt"] == 1
