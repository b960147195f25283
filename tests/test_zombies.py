"""A daemon that was stopped, replaced under its own executor ID, and continued: it ends
with 75 before it writes anything, and nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
import trio
from conftest import DEADLINE, Box, Daemon, Watch, wait_until
from house import House
from nats.errors import NoRespondersError
from proc import alive, open_files, read_proc
from runctl.client.link import Link, LinkLost, dial
from runctl.config.load import load
from runctl.protocol import messages, subjects
from runctl.protocol.errors import LeaseHeld, LeaseLost
from runctl.supervisor.cluster.file_lease import hold_file_lease
from runctl.supervisor.processes.keeper_start import open_keeper
from runctl.supervisor.processes.proctable import scan

# The first attempt floods its pipe, has a descendant without mark, session or parent in
# common with it, and ends as failed once "over" exists: while the daemon is stopped, so that
# it must not wait for a reader. The second one ends well once "go" exists.
WORK = r"""
import os, signal, sys, time
folder, attempt = sys.argv[1], os.environ["RUNCTL_ATTEMPT"]
def note():
    with open(f"{folder}/pids-{attempt}", "a") as file:
        file.write(f"{os.getpid()}\n")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        note()
        os.closerange(0, 100)
        os.execve("/bin/sleep", ["sleep", "600"], {})
    os._exit(0)
os.wait()
os.set_blocking(1, attempt != "1")
def say(text):
    try:
        os.write(1, f"{attempt}.{text}\n".encode())
    except BlockingIOError:
        pass
n = 0
while not os.path.exists(f"{folder}/{'over' if attempt == '1' else 'go'}"):
    n += 1
    say(f"{n:0{200 if attempt == '1' else 1}}")
    time.sleep(0.005 if attempt == "1" else 0.02)
say("last")
sys.exit(attempt == "1")
"""


class Stopped:
    """SIGSTOP, SIGCONT."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        daemon.send_signal(signal.SIGSTOP)
        wait_until(lambda: _states(daemon.pid) <= {b"T"}, "all of its threads are stopped")

    def go_on(self) -> None:
        self.daemon.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.daemon.kill()
        self.daemon.wait()


def _states(pid: int) -> set[bytes]:
    """Those of the threads of ``pid``."""
    threads = os.listdir(f"/proc/{pid}/task")
    stats = [read_proc(pid, f"task/{thread}/stat") for thread in threads]
    return {stat.rpartition(b")")[2].split()[0] for stat in stats if stat}


class Frozen:
    """As a machine that sleeps: no signal tells that it was."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        roots = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
        root = next((r for r in roots if (r / "cgroup.procs").exists()), roots[0])
        self.group = root / f"runctl-test-{daemon.pid}"
        try:
            self.group.mkdir(exist_ok=True)
            (self.group / "cgroup.procs").write_text(str(daemon.pid))
            (self.group / "cgroup.freeze").write_text("1")
        except OSError as error:
            with contextlib.suppress(OSError):
                self.group.rmdir()
            pytest.skip(f"no cgroup v2 that we may write: {error}")
        events = self.group / "cgroup.events"
        wait_until(lambda: "frozen 1" in events.read_text(), "it is frozen")

    def go_on(self) -> None:
        (self.group / "cgroup.freeze").write_text("0")

    def close(self) -> None:
        self.daemon.kill()
        self.daemon.wait()
        with contextlib.suppress(FileNotFoundError):
            self.group.rmdir()


Pause = Callable[[Daemon], Stopped | Frozen]


@pytest.fixture(params=[Stopped, pytest.param(Frozen, marks=pytest.mark.nightly)])
def pause(request: pytest.FixtureRequest) -> Iterator[Pause]:
    """Pauses a daemon; it is killed with the test."""
    made: list[Stopped | Frozen] = []

    def make(daemon: Daemon) -> Stopped | Frozen:
        made.append(request.param(daemon))
        database = request.getfixturevalue("stopped_box").state / "runctl.sqlite"
        while database.exists() and _locked(database):  # nobody could start beside that
            made[-1].go_on()
            time.sleep(0.05)
            made[-1] = request.param(daemon)
        return made[-1]

    yield make
    for paused in made:
        paused.close()


def _locked(database: Path) -> bool:
    """Whether it was paused in the middle of writing to its database."""
    with contextlib.closing(sqlite3.connect(database, timeout=0.3)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        db.rollback()
        return False


def _pids(folder: Path, attempt: int, count: int = 2) -> list[int]:
    file = folder / f"pids-{attempt}"
    wait_until(lambda: file.exists() and len(file.read_text().split()) >= count, "it began")
    return [int(pid) for pid in file.read_text().split()]


def _assert_ended_with_75(daemon: Daemon, said: str) -> None:
    assert daemon.wait(DEADLINE) == 75
    lines = [line for line in said.splitlines() if line.startswith("runctld: ")]
    assert len(lines) == 1, said
    assert "the lease of executor ID" in lines[0]
    assert "Traceback" not in said


def _assert_second_attempt_only(box: Box, watch: Watch, run: str) -> None:
    assert watch.wait() == 0
    resets = [e["attempt"] for e in watch.events if e["type"] == "reset"]
    assert resets == [1, 2]
    chunks = [e for e in watch.final() if e["type"] == "chunk"]
    assert {e["attempt"] for e in chunks} == {2}
    assert [e["seq"] for e in chunks] == list(range(1, len(chunks) + 1))
    assert watch.text().endswith("2.last\n")
    wait_until(lambda: box.show(run)["status"] == "succeeded", "its end is recorded")
    shown = box.show(run)
    assert (shown["attempt"], shown["exit_code"]) == (2, 0)


@pytest.mark.parametrize("outlive", ["0s", "30s", "30s, then 0s"])
def test_the_lock_file_is_gone_and_another_daemon_came(
    stopped_box: Box, tmp_path: Path, pause: Pause, outlive: str
) -> None:
    box = stopped_box
    first_outlive, _, then = outlive.partition(", then ")
    box.configure(f"[queue]\noutlive = '{first_outlive}'\n")
    box.start()
    run = box.submit_py("t", WORK, str(tmp_path))
    after = box.submit("t", "true")
    watch = Watch(box, "t", "--run", run)
    watch.wait_chunks(3)
    first = _pids(tmp_path, 1)
    zombie = box.daemon
    assert zombie is not None
    paused = pause(zombie)
    (tmp_path / "over").touch()
    wait_until(lambda: not alive(first[0]), "the first attempt ended meanwhile")
    for name in ("lock", "keeper.lock"):
        (box.state / name).unlink()
    begun = box.log.stat().st_size
    second = Box(tmp_path)
    second.log = tmp_path / "second.log"
    second.configure(f"[queue]\noutlive = '{then or first_outlive}'\n")
    try:
        second.start()
        assert not [pid for pid in first if alive(pid)], "the successor has ended them"
        served = "its keeper serves a daemon that has lost the lock"
        assert (served in second.log.read_text()) == (outlive != "0s")
        _pids(tmp_path, 2)
        wait_until(lambda: any("2." in e["data"] for e in watch.chunks()), "the second is seen")
        paused.go_on()
        assert zombie.wait(DEADLINE) == 75
        said = box.log.read_text()[begun:]
        _assert_ended_with_75(zombie, said)
        assert f"pid {second.daemon.pid if second.daemon else 0}" in said, "it names the holder"
        (tmp_path / "go").touch()
        _assert_second_attempt_only(second, watch, run)
        second.runctl("wait", after)
        assert second.term() == 0
    finally:
        second.close()


def _unlock(pid: int, path: Path) -> None:
    """Drop ``pid``'s lock on ``path``, as a file system that loses locks would: through a
    copy of its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    for fd, name in open_files(pid).items():
        if name == str(path.resolve()):
            ours = libc.syscall(438, pidfd, fd, 0)  # pidfd_getfd
            if ours < 0:
                pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
            fcntl.flock(ours, fcntl.LOCK_UN)
            os.close(ours)
    os.close(pidfd)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors of another process")
@pytest.mark.parametrize("how", ["removed", "moved", "copied", "unlocked"])
def test_a_daemon_that_runs_notices_as_well(box: Box, tmp_path: Path, how: str) -> None:
    box.submit_py("t", WORK, str(tmp_path))
    pids = _pids(tmp_path, 1)
    assert box.daemon is not None
    taken = -1
    if how == "removed":
        (box.state / "lock").unlink()
    elif how == "moved":
        box.state.rename(tmp_path / "elsewhere")
    elif how == "copied":  # a backup that is restored in place
        box.state.rename(tmp_path / "elsewhere")
        with contextlib.suppress(shutil.Error):  # of what nats-server and SQLite remove meanwhile
            shutil.copytree(tmp_path / "elsewhere", box.state, dirs_exist_ok=True)
        assert (box.state / "lock").exists()
    else:
        taken = os.open(box.state / "lock", os.O_RDWR)

        def took() -> bool:
            assert box.daemon is not None
            _unlock(box.daemon.pid, box.state / "lock")
            try:
                fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # its next look was faster
                return False
            return True

        wait_until(took, "the lock is another's")
    try:
        assert box.daemon.wait(DEADLINE) == 75
        _assert_ended_with_75(box.daemon, box.log.read_text())
        wait_until(lambda: not [pid for pid in pids if alive(pid)], "its run is gone")
    finally:
        if taken >= 0:
            os.close(taken)


def test_nothing_is_committed_once_the_lock_is_another(box: Box) -> None:
    """The commit itself asks: the daemon's look, which comes each second, would be too late."""

    box.runctl("wait", box.submit("t", "true", run="early"))  # what it writes would be asked, too

    async def submit(link: Link) -> messages.Reply:
        request = messages.Submit("t", argv=["true"])  # without an id, or its output is looked for
        subject = subjects.control_subject("submit")
        return messages.decode_reply(
            await link.request(subject, messages.encode(request), DEADLINE)
        )

    async def main() -> None:
        link = await dial(load(box.config, client=True))
        try:
            (box.state / "lock").rename(box.state / "lock.old")
            with pytest.raises((LinkLost, NoRespondersError)):
                await submit(link)
        finally:
            await link.close()

    asyncio.run(main())
    assert box.daemon is not None
    assert box.daemon.wait(DEADLINE) == 75
    with sqlite3.connect(f"file:{box.state / 'runctl.sqlite'}?mode=ro", uri=True) as db:
        rows = db.execute("SELECT workflow_uuid FROM workflow_status").fetchall()
    db.close()
    assert rows == [("early",)]


def _count_rows(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM workflow_status").fetchone()[0])


@pytest.mark.parametrize(
    "which",
    [
        "-wal",
        "moved",
        *(pytest.param(x, marks=pytest.mark.nightly) for x in ("-shm", "-wal -shm", "both")),
        *(pytest.param(x, marks=pytest.mark.nightly) for x in ("", "replaced", "-wal replaced")),
    ],
)
def test_the_files_of_the_database_are_removed(box: Box, tmp_path: Path, which: str) -> None:
    """What was answered is there after the restart, or in a copy that the last line names."""
    main = box.state / "runctl.sqlite"
    wal, shm = Path(f"{main}-wal"), Path(f"{main}-shm")
    box.submit("busy", "sleep", "600")
    wait_until(lambda: box.json("list", "busy")[0]["status"] == "running", "it runs")
    answered = [box.submit("busy", "true") for _ in range(3)]
    earlier = main.with_name("runctl.sqlite.saved")
    if which == "moved":
        earlier.write_text("of an earlier time")
    assert box.daemon is not None
    # All of it between two of its looks: it would remove the others itself.
    paused = Stopped(box.daemon)
    if which == "-wal":
        wal.unlink()
    elif which == "-shm":
        shm.unlink()
    elif which == "-wal -shm":
        wal.unlink()
        shm.unlink()
    elif which == "-wal replaced":
        wal.rename(tmp_path / "old")
        shutil.copy(tmp_path / "old", wal)
    elif which == "replaced":
        shutil.copy(main, tmp_path / "new")
        (tmp_path / "new").rename(main)
    elif which == "moved":
        for path in (main, wal, shm):
            path.rename(tmp_path / path.name)
    else:
        main.unlink()
        if which == "both":
            wal.unlink()
    paused.go_on()
    assert box.daemon.wait(DEADLINE) == 75
    line = box.log.read_text().splitlines()[-1]
    assert "Traceback" not in box.log.read_text()
    assert str(main) in line
    if which in ("-wal", "-shm", "-wal -shm"):
        assert "Nothing is lost" in line
    else:
        saved = main.with_name("runctl.sqlite.saved" + "-2" * (which == "moved"))
        assert str(saved) in line
        assert saved.stat().st_mode & 0o777 == 0o600
        assert _count_rows(saved) == 4
        if not main.exists():  # a new one would hide what is saved
            assert box.start(ready=False).wait(DEADLINE) == 78
            assert str(saved) in box.log.read_text().splitlines()[-1]
            assert not main.exists()
        for path in (main, wal, shm):
            path.unlink(missing_ok=True)
        saved.rename(main)
        earlier.unlink(missing_ok=True)
    box.start()
    wait_until(lambda: box.json("list", "busy")[-1]["status"] == "running", "it runs again")
    box.runctl("abort", "busy")
    for run in answered:
        assert box.runctl("wait", run).strip() == "succeeded"
    assert box.term() == 0
    assert not wal.exists(), "an orderly end takes it along, and is not disturbed by that"


@pytest.mark.short
def test_the_lock_file(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with hold_file_lease(tmp_path, "x") as lease:
        for _ in range(2):
            lease.check()
        held = pytest.raises(LeaseHeld, match=r"^already running: executor 'x', pid ")
        with held, hold_file_lease(tmp_path, "x"):
            raise AssertionError("held twice")
        lease.check()
        lock.rename(tmp_path / "old")
        with pytest.raises(LeaseLost, match="was removed"):
            lease.check()
        with hold_file_lease(tmp_path, "x") as second:
            second.check()
            with pytest.raises(
                LeaseLost, match=rf"another file now \(executor 'x', pid {os.getpid()}\)"
            ):
                lease.check()
        (tmp_path / "old").replace(lock)
        lease.check()


@pytest.mark.skipif(sys.platform != "linux", reason="marks are read from /proc")
async def test_what_is_a_successors_is_not_swept(tmp_path: Path) -> None:
    """A successor ends our keeper, which looks to us as if it had been killed."""

    class Replaced(Exception):
        pass

    def held() -> None:
        raise Replaced

    env = {**os.environ, "RUNCTL_STATE": os.path.realpath(tmp_path)}
    with ExitStack() as stack:
        with pytest.raises(Replaced):  # noqa: PT012  # at the end of it
            async with open_keeper(tmp_path, wait=30, held=held) as keeper:
                (pid,) = (p for p, r in scan().items() if r.parent == os.getpid() and _is_keeper(p))
                argv = ["sleep", "600"]
                successors = stack.enter_context(
                    subprocess.Popen(argv, env=env, start_new_session=True)
                )
                stack.callback(successors.kill)
                os.kill(pid, signal.SIGKILL)
                with trio.fail_after(DEADLINE):
                    await keeper.dead.wait()
        assert successors.poll() is None


def _is_keeper(pid: int) -> bool:
    return b"keeper.py" in read_proc(pid, "cmdline")


# ---- PostgreSQL ------------------------------------------------------------------------


def _lease_session(house: House) -> int:
    (row,) = house.sql(
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name LIKE 'runctld pid %' AND datname = current_database()"
    )
    return int(row["pid"])


def test_the_session_is_gone_and_another_daemon_came(
    house: House, tmp_path: Path, pause: Pause
) -> None:
    first_box = house.box("z")
    run = first_box.submit_py("t", WORK, str(tmp_path))
    queued = [first_box.submit("t", "true") for _ in range(2)]
    watch = Watch(first_box, "t", "--run", run)
    watch.wait_chunks(3)
    pids = _pids(tmp_path, 1)
    zombie = first_box.daemon
    assert zombie is not None
    paused = pause(zombie)
    (tmp_path / "over").touch()
    wait_until(lambda: not alive(pids[0]), "the first attempt ended meanwhile")
    house.sql("SELECT pg_terminate_backend($1, 60000)", _lease_session(house))
    second = house.box("z")
    _pids(tmp_path, 2)
    wait_until(lambda: any("2." in e["data"] for e in watch.chunks()), "the second is seen")
    begun = first_box.log.stat().st_size
    others = [f"other-{n}" for n in range(20)]
    asyncio.run(_submit_unheard(house, others, second.path))
    paused.go_on()
    assert zombie.wait(DEADLINE) == 75
    _assert_ended_with_75(zombie, first_box.log.read_text()[begun:])
    wait_until(lambda: not [pid for pid in pids if alive(pid)], "its run is gone")
    (tmp_path / "go").touch()
    _assert_second_attempt_only(second, watch, run)
    for other in others:
        again = messages.Submit(other, run=other, argv=["true"], cwd=str(second.path))
        reply = house.ask(subjects.control_subject("submit"), again)
        assert isinstance(reply, messages.Submitted), reply
    for other in [*queued, *others]:
        wait_until(lambda run=other: house.bus.run(run).status == "succeeded", "not stranded")
    assert second.term() == 0


async def _submit_unheard(house: House, runs: list[str], cwd: Path) -> None:
    """Each on a thread of its own. Who of the two that listen is given which, NATS has decided
    when this returns; some are given to the one that is paused, as it knows no better."""
    client = await nats.connect(house.nats)
    try:
        for run in runs:
            request = messages.Submit(run, run=run, argv=["true"], cwd=str(cwd))
            await client.publish(
                subjects.control_subject("submit"), messages.encode(request), client.new_inbox()
            )
        await client.flush()
    finally:
        await client.close()


def test_a_pause_alone_costs_nothing(house: House, tmp_path: Path) -> None:
    """Stopped for longer than the lease may be silent, and continued: it still holds it."""
    box = house.box("paused")
    run = box.submit_py(
        "t",
        "import os, sys, time\nn = 0\n"
        "while not os.path.exists(sys.argv[1]): n += 1; print(n, flush=True); time.sleep(0.02)",
        str(tmp_path / "go"),
    )
    watch = Watch(box, "t")
    watch.wait_chunks(3)
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGSTOP)
    time.sleep(6)
    seen = len(watch.chunks())
    box.daemon.send_signal(signal.SIGCONT)
    watch.wait_chunks(seen + 10)
    (tmp_path / "go").touch()
    assert watch.wait() == 0
    assert box.show(run)["attempt"] == 1
    text: Any = watch.text().split()
    assert text == [str(n) for n in range(1, len(text) + 1)]
