"""Runs outlive their daemon where executors share a database: the keeper holds the lease."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from adopting import LIVE_ON, LONG, WRITER, written
from conftest import wait_until
from house import House
from pgserver import Postgres
from proc import alive, find_keeper
from runctl.protocol import messages, subjects

TAKEOVER = "[takeover]\nenabled = true\nafter = '2s'\n"


@pytest.fixture
def house(tmp_path: Path, postgres: Postgres, nats_server: str) -> Iterator[House]:
    made = House(tmp_path, postgres, nats_server)
    try:
        yield made
    finally:
        made.close()


def test_peers_leave_alone_what_goes_on_without_its_daemon(house: House, tmp_path: Path) -> None:
    a = house.box("a", TAKEOVER + LIVE_ON, top=LONG)
    run = house.bus.submit("t", [sys.executable, "-c", WRITER, str(tmp_path), "1"], "a")
    wait_until(lambda: written(tmp_path) > 1000, "it writes")
    b = house.box("b", TAKEOVER)
    for _ in range(3):
        a.kill()
        size = written(tmp_path)
        other = house.bus.submit("other", ["true"], "b")
        house.bus.wait_end("other", other)
        time.sleep(3)  # more than peers wait
        assert written(tmp_path) >= size
        assert house.bus.run(run).attempt == 1
        a.start()
        wait_until(lambda size=size: written(tmp_path) > size + 100_000, "it goes on")
    for executor in ("a", "b"):  # a peer knows what only the run's executor does
        shown = house.ask(subjects.control_subject("show", executor), messages.Show(run))
        listed = house.ask(subjects.control_subject("list", executor), messages.List("t"))
        assert isinstance(shown, messages.RunDetails)
        assert isinstance(listed, messages.Runs)
        assert [len(shown.run.adopted_at), len(listed.runs[0].adopted_at)] == [3, 3]
    (tmp_path / "finish").touch()
    house.bus.wait_end("t", run)
    wait_until(lambda: house.bus.run(run).status == "failed", "it is recorded")
    assert house.bus.run(run).attempt == 1
    assert len((tmp_path / "pids").read_text().split()) == 1
    assert b.daemon is not None
    assert b.daemon.poll() is None


@pytest.mark.nightly
def test_peers_take_over_what_no_daemon_came_for(house: House, tmp_path: Path) -> None:
    a = house.box("a", TAKEOVER + "[queue]\noutlive = '1s'\n")
    run = house.bus.submit("t", [sys.executable, "-c", WRITER, str(tmp_path), "1"], "a")
    wait_until(lambda: written(tmp_path) > 1000, "it writes")
    house.box("b", TAKEOVER)
    keeper = find_keeper(a.pid)
    a.kill()
    wait_until(lambda: not alive(keeper), "all of it has ended")
    wait_until(lambda: house.bus.run(run).executor == "b", "the peer has it")
    assert house.bus.run(run).attempt == 2
    (tmp_path / "finish").touch()
    house.bus.wait_end("t", run)


def test_a_database_that_goes_ends_what_has_no_daemon(house: House, tmp_path: Path) -> None:
    a = house.box("a", LIVE_ON, top=LONG)
    house.bus.submit("t", [sys.executable, "-c", WRITER, str(tmp_path), "1"], "a")
    wait_until(lambda: written(tmp_path) > 1000, "it writes")
    keeper = find_keeper(a.pid)
    a.kill()
    house.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE"
        " application_name LIKE 'runctld %'"
    )
    wait_until(lambda: not alive(keeper), "all of it has ended")
