"""Ways to stop: many trees that do not want to, a second signal, and at any time before
the daemon is ready, also as process 1."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from house import Bus
from proc import alive, children, direct_children, open_files, read_proc
from runctl.protocol import messages

DEAF = 'trap "" TERM INT HUP; echo $$ > "$1/$RUNCTL_ATTEMPT-$$"; while :; do sleep 600; done'
TREES = 200


def _pids(folder: Path, attempt: int) -> list[int]:
    return [int(file.name.partition("-")[2]) for file in folder.glob(f"{attempt}-*")]


def _statuses(box: Box) -> dict[str, int]:
    with sqlite3.connect(f"file:{box.state / 'runctl.sqlite'}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT status, count(*) FROM workflow_status GROUP BY status").fetchall()
    db.close()
    return dict(rows)


@pytest.mark.nightly
def test_many_trees_that_ignore_term(stopped_box: Box, tmp_path: Path) -> None:
    box = stopped_box
    folder = tmp_path / "pids"
    folder.mkdir()
    box.configure('[queue]\nstop_grace = "1s"\n')
    box.start()
    bus = Bus(box.state)
    try:
        for n in range(TREES):
            bus.submit(f"t{n}", ["sh", "-c", DEAF, "sh", str(folder)])
    finally:
        bus.close()
    wait_until(lambda: len(_pids(folder, 1)) == TREES, "all are there", 120)
    assert box.daemon is not None

    began = time.monotonic()
    box.daemon.terminate()
    assert box.daemon.wait(DEADLINE) == 0
    print(f"stop_grace 1 s, {TREES} trees: ended after {time.monotonic() - began:.2f} s")
    assert not [pid for pid in _pids(folder, 1) if alive(pid)]
    assert _statuses(box) == {"PENDING": TREES}

    box.configure('[queue]\nstop_grace = "10m"\n')
    box.start()
    wait_until(lambda: len(_pids(folder, 2)) == TREES, "all are replayed", 120)
    begun = box.log.stat().st_size
    box.daemon.terminate()
    wait_until(lambda: "SIGTERM: stopping" in box.log.read_text()[begun:], "it heard")
    began = time.monotonic()
    box.daemon.send_signal(signal.SIGINT)
    assert box.daemon.wait(DEADLINE) == 0, "long before stop_grace"
    print(f"hastened, {TREES} trees: ended after {time.monotonic() - began:.2f} s")
    assert "SIGINT: runs get no more grace" in box.log.read_text()
    assert not [pid for pid in _pids(folder, 2) if alive(pid)]
    assert _statuses(box) == {"PENDING": TREES}


# ---- before it is ready ------------------------------------------------------------------


def _hears(pid: int, number: int) -> bool:
    """Whether it has a handler for the signal by now."""
    status = read_proc(pid, "status").decode()
    caught = [int(x.split()[1], 16) for x in status.splitlines() if x.startswith("SigCgt:")]
    return any(mask >> (number - 1) & 1 for mask in caught)


def _has_open(pid: int, path: Path) -> bool:
    return str(path.resolve()) in open_files(pid).values()


@pytest.fixture
def nobody() -> Iterator[socket.socket]:
    """Listens; who connects is told nothing."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


@pytest.mark.parametrize("what", ["nats", "postgres", "keeper"])
def test_while_it_waits_for_what_it_needs(
    stopped_box: Box, nobody: socket.socket, what: str
) -> None:
    box = stopped_box
    port = nobody.getsockname()[1]
    where = {
        "nats": f'[nats]\nurl = "nats://127.0.0.1:{port}"\n',
        "postgres": f'[database]\nurl = "postgresql://u@127.0.0.1:{port}/x"\n',
        "keeper": "",
    }[what]
    box.configure(f'executor_id = "x"\nstart_timeout = "10m"\n{where}')
    box.state.mkdir(mode=0o700)
    lock = os.open(box.state / "keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    if what == "keeper":
        fcntl.flock(lock, fcntl.LOCK_EX)
    asked: socket.socket | None = None
    try:
        daemon = box.start(ready=False)
        if what == "keeper":
            wait_until(lambda: _has_open(daemon.pid, box.state / "keeper.lock"), "it waits")
        else:
            nobody.settimeout(DEADLINE)
            asked, _ = nobody.accept()
        daemon.terminate()
        assert daemon.wait(DEADLINE) == 0
    finally:
        if asked is not None:
            asked.close()
        os.close(lock)
    assert "SIGTERM: stopping" in box.log.read_text()
    assert "Traceback" not in box.log.read_text()


def test_at_any_time(stopped_box: Box) -> None:
    """A run that was recovered meanwhile is replayed by the next daemon."""
    box = stopped_box
    box.configure("[queue]\nmax_attempts = 100\n")
    box.start()
    run = box.submit_py("t", "import time; print('up', flush=True); time.sleep(600)")
    wait_until(lambda: box.show(run)["status"] == "running", "it runs")
    box.kill()
    steps: dict[str, Callable[[], object]] = {
        "it hears": lambda: _hears(box.pid, signal.SIGTERM),
        "it holds its lock": lambda: _has_open(box.pid, box.state / "lock"),
        "it has its nats-server": lambda: children(box.pid, "nats-server"),
        "it has opened its database": lambda: _has_open(box.pid, box.state / "runctl.sqlite"),
        "it runs again": lambda: "run started" in box.log.read_text()[begun:],
        "it is ready": lambda: "ready: " in box.log.read_text()[begun:],
    }
    for step, met in steps.items():
        begun = box.log.stat().st_size
        daemon = box.start(ready=False)
        wait_until(met, step)
        daemon.terminate()
        assert daemon.wait(DEADLINE) == 0, step
    assert "Traceback" not in box.log.read_text()
    assert _statuses(box) in ({"PENDING": 1}, {"ENQUEUED": 1})
    box.start()
    wait_until(lambda: box.show(run)["status"] == "running", "it runs again")


def test_as_process_1(stopped_box: Box) -> None:
    """There, a signal without a handler is lost."""
    unshare = shutil.which("unshare")
    command = [unshare or "", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a PID namespace")
    box = stopped_box
    box.prefix = command
    for _ in range(2):
        outer = box.start(ready=False)

        def inner(pid: int = outer.pid) -> int:
            return next(iter(direct_children(pid)), 0)

        pid = wait_until(inner, "the daemon is there")
        wait_until(lambda pid=pid: _hears(pid, signal.SIGTERM), "it hears")
        os.kill(pid, signal.SIGTERM)
        assert outer.wait(DEADLINE) == 0
    daemon = box.start()
    (pid,) = direct_children(daemon.pid)
    run = box.submit("t", "sleep", "600")
    wait_until(lambda: box.show(run)["status"] == "running", "it runs")
    os.kill(pid, signal.SIGTERM)
    assert daemon.wait(DEADLINE) == 0


def _on_terminal(box: Box, *command: str) -> tuple[int, int]:
    """(pid, terminal) of a daemon that is started from one."""
    argv = [*command, sys.executable, "-m", "runctl.supervisor.main", "-c", str(box.config)]
    pid, terminal = pty.fork()
    if pid == 0:
        log = os.open(box.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.execvp(argv[0], argv)
    try:
        wait_until(lambda: box.log.exists() and "ready: " in box.log.read_text(), "ready")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    return pid, terminal


def _code(pid: int) -> Callable[[], int | None]:
    def ended() -> int | None:
        found, status = os.waitpid(pid, os.WNOHANG)
        return 100 + os.waitstatus_to_exitcode(status) if found else None  # true, if 0

    return ended


def test_its_terminal_is_closed(stopped_box: Box) -> None:
    pid, terminal = _on_terminal(stopped_box)
    os.close(terminal)
    try:
        assert wait_until(_code(pid), "it has ended") == 100
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    assert "SIGHUP: stopping" in stopped_box.log.read_text()


def test_its_terminal_is_closed_and_nohup_was_asked_for(stopped_box: Box) -> None:
    pid, terminal = _on_terminal(stopped_box, "nohup")
    try:
        os.close(terminal)
        wait_until(lambda: "SIGHUP: " in stopped_box.log.read_text(), "it heard")
        assert "stopping" not in stopped_box.log.read_text()
        stopped_box.runctl("list")
    finally:
        os.kill(pid, signal.SIGTERM)
        assert wait_until(_code(pid), "it has ended") == 100


# ---- handlers that clean up ------------------------------------------------------------------

#: Its handler of TERM says, also in the file $1, whether what it runs could end.
TIDY = """file=$1
tidy() { { WHAT; } && r=done || r=KILLED; echo $r; echo $r > "$file"; exit; }
trap tidy TERM
echo up > "$file"
echo up
while :; do sleep 0.1; done"""
HANDLERS = {
    "command": "sleep 1",
    "pipeline": "{ sleep 1 && echo piped; } | grep piped",
    "tree": "sh -c 'sh -c \"sleep 1 && true\" && true'",
    "several": "sleep 0.3 && sleep 0.3 && sh -c 'sleep 0.3 && true'",
    "substitution": 'test -n "$(sleep 1 && echo x)"',
    "session": "setsid -w sleep 1",
    "background": "sleep 1 & wait $!",
}


def _tidy(folder: Path, name: str) -> list[str]:
    return ["sh", "-c", TIDY.replace("WHAT", HANDLERS[name]), "sh", str(folder / name)]


def test_handlers_may_clean_up(box: Box, tmp_path: Path) -> None:
    """At an abort, at a natural end, at SIGTERM of the daemon; and what they say is stored."""
    for thread in ("abort", "end"):
        (tmp_path / thread).mkdir()
        argv = _tidy(tmp_path / thread, "command")
        if thread == "end":  # its main process leaves it behind
            ready = f"until [ -s {shlex.quote(argv[-1])} ]; do sleep 0.05; done"
            argv = ["sh", "-c", f'"$@" & {ready}; exit 3', "sh", *argv]
        box.submit(thread, *argv)
        watch = Watch(box, thread)
        wait_until(lambda watch=watch: "up" in watch.text(), "it runs")
        if thread == "abort":
            box.runctl("abort", thread)
        watch.wait()
        assert watch.text().splitlines()[-1] == "done"
    box.ask(*[messages.Submit(name, argv=_tidy(tmp_path, name)) for name in HANDLERS])
    watch = Watch(box, "pipeline")
    for name in HANDLERS:
        wait_until((tmp_path / name).exists, f"{name} runs")
    wait_until(lambda: "up" in watch.text(), "it is watched")
    assert box.term() == 0
    said = {name: (tmp_path / name).read_text() for name in HANDLERS}
    assert said == dict.fromkeys(HANDLERS, "done\n")
    wait_until(lambda: "piped\ndone\n" in watch.text(), "what it says is shown")


HEARS = (
    'trap "echo HUP" HUP; trap "echo TERM; exit 0" TERM; {}; echo up'
    "; while :; do sleep 600 & wait $!; done"
)


def test_a_signal_of_its_own(stopped_box: Box) -> None:
    """It comes first, to all that runs; TERM to whoever is still there in the middle of the grace;
    what a command has left behind hears TERM alone."""
    box = stopped_box
    box.configure(
        '[queue]\nstop_grace = "8s"\n[runners.shell]\nkind = "command"\nstop_signal = "HUP"\n'
    )
    box.start()
    leave = "(" + HEARS.format("exec 0</dev/null") + ") & sleep 0.2"
    jobs = {
        "content": 'trap "echo HUP; exit 0" HUP; echo up; while :; do sleep 600 & wait $!; done',
        "deaf": HEARS.format("trap '' HUP"),
        "both": HEARS.format(":"),
        "left": leave,
    }
    watches = {}
    for name, job in jobs.items():
        box.submit(name, "bash", "-c", job)
        watches[name] = Watch(box, name)
    for name in jobs:
        wait_until(lambda name=name: "up\n" in watches[name].text(), f"{name} is up")
    for name in ("content", "deaf", "both"):
        box.runctl("abort", name)
    for watch in watches.values():
        watch.wait()
    said = {name: watch.text().split() for name, watch in watches.items()}
    assert said == {
        "content": ["up", "HUP"],
        "deaf": ["up", "TERM"],
        "both": ["up", "HUP", "TERM"],
        "left": ["up", "TERM"],
    }
