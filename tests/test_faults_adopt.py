"""What fault rounds have found of runs that outlive their daemon."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_asyncio
from conftest import DEADLINE, Box, wait_until
from house import House
from proc import alive, find_keeper, open_files
from runctl.config.schema import Config, Database
from runctl.supervisor.cluster.lease_taking import hold_database_lease

OUTLIVE = "start_timeout = '600s'\n[queue]\noutlive = '600s'\nstop_grace = '600s'\n"
#: Says when TERM comes, and ends only when it may.
STUBBORN = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (here / "termed").touch())
def stay():
    (here / "pid").write_text(str(os.getpid()))
    while not (here / "go").exists():
        time.sleep(0.01)
"""
BEGIN = """
with (here / "begun").open("a") as file:
    print("begun", file=file)
"""
#: Ends with 7, and leaves one such behind.
LEAVES = f"""{STUBBORN}{BEGIN}
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 3)
    stay()
    os._exit(0)
sys.exit(7)
"""
STAYS = f"""{STUBBORN}{BEGIN}
stay()
"""


@pytest.fixture
def living(stopped_box: Box) -> Box:
    stopped_box.configure(OUTLIVE)
    stopped_box.start()
    return stopped_box


def is_there(path: Path) -> bool:
    return path.exists() and bool(path.read_text())


def test_a_command_has_ended_and_what_it_left_is_being_ended(living: Box, tmp_path: Path) -> None:
    """The daemon dies then: nothing of the command is done once more."""
    run = living.submit_py("t", LEAVES, str(tmp_path))
    wait_until(lambda: (tmp_path / "termed").exists(), "what it left is being ended")
    living.kill()
    living.start()
    (tmp_path / "go").touch()
    living.runctl("wait", run, code=1)
    shown = living.show(run)
    assert (shown["attempt"], shown["exit_code"]) == (1, 7)
    assert (tmp_path / "begun").read_text() == "begun\n"
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_command_is_ended_by_a_stop_in_order(living: Box, tmp_path: Path) -> None:
    """The daemon is killed before it has stopped: what its TERM made of the command is no end of
    its own, and it is done anew."""
    run = living.submit_py("t", STAYS, str(tmp_path))
    wait_until(lambda: is_there(tmp_path / "pid"), "it runs")
    os.kill(living.pid, signal.SIGTERM)
    wait_until(lambda: (tmp_path / "termed").exists(), "it is being ended")
    living.kill()
    pid = int((tmp_path / "pid").read_text())
    (tmp_path / "go").touch()
    wait_until(lambda: not alive(pid), "it ends")
    living.start()
    living.runctl("wait", run)
    assert living.show(run)["attempt"] == 2
    assert (tmp_path / "begun").read_text() == "begun\nbegun\n"


class Watcher:
    """A deputy that looks, when it is called, at the generation that the database has."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.calls: list[tuple[str, Any]] = []

    async def hold_lease(self, fd: int) -> None:
        os.fstat(fd)
        await self._note("hold")

    async def release_lease(self) -> bool:
        await self._note("release")
        return False

    async def _note(self, what: str) -> None:
        query = "SELECT generation FROM runctl.executors WHERE id = 'held'"
        self.calls.append((what, await trio.to_thread.run_sync(self._house.sql, query)))


async def test_the_lease_has_no_deputy_for_no_longer_than_it_takes(house: House) -> None:
    """A daemon that dies in between takes along what runs: it has it held before all else."""
    config = Config(Path("/nowhere"), database=Database(house.url))
    async with trio_asyncio.open_loop():
        async with hold_database_lease(config, "held"):
            pass
        first, second = Watcher(house), Watcher(house)
        async with hold_database_lease(config, "held", "", first):
            pass
        async with hold_database_lease(config, "held", "", second):
            pass
    assert [what for what, _ in first.calls] == ["release", "hold"]
    assert first.calls[0][1] == first.calls[1][1]
    assert second.calls[0][1] > first.calls[1][1], "it is raised after that"


LEASE = (
    "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'runctld pid %: a'"
    " AND datname = current_database()"
)


def count_unread(pid: int) -> int:
    """Bytes that came over TCP and that the process has not read."""
    fds = open_files(pid).values()
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if f"socket:[{row[9]}]" in fds)


def test_a_daemon_leaves_its_lease_to_the_keeper(house: House, tmp_path: Path) -> None:
    """The session in the database goes on, and with it what runs."""
    top, more = OUTLIVE.split("[queue]")
    a = house.box("a", f"[queue]{more}", top=top)
    run = house.bus.submit("t", [sys.executable, "-c", STAYS, str(tmp_path)], "a")
    wait_until(lambda: is_there(tmp_path / "pid"), "it runs")
    session = house.sql(LEASE)
    os.kill(a.pid, signal.SIGUSR1)
    assert a.daemon is not None
    assert a.daemon.wait(DEADLINE) == 0
    assert house.sql(LEASE) == session
    a.start()
    (tmp_path / "go").touch()
    house.bus.wait_end("t", run)
    assert house.bus.run(run).attempt == 1


def test_the_database_answers_a_daemon_that_is_gone(house: House, tmp_path: Path) -> None:
    """What it had asked of its lease last: that is no news of the lease."""
    top, more = OUTLIVE.split("[queue]")
    a = house.box("a", f"[queue]{more}", top=top)
    run = house.bus.submit("t", [sys.executable, "-c", STAYS, str(tmp_path)], "a")
    wait_until(lambda: is_there(tmp_path / "pid"), "it runs")
    keeper, session = find_keeper(a.pid), house.sql(LEASE)[0]["pid"]
    os.kill(session, signal.SIGSTOP)
    try:
        wait_until(lambda: count_unread(session), "it is asked for")
        os.kill(a.pid, signal.SIGSTOP)
    finally:
        os.kill(session, signal.SIGCONT)
    wait_until(lambda: count_unread(keeper), "it has answered")
    a.kill()
    a.start()
    assert alive(keeper)
    (tmp_path / "go").touch()
    house.bus.wait_end("t", run)
    assert house.bus.run(run).attempt == 1
