"""``database.lease_url``: the sessions with locks have a way of their own to the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from house import House
from pgbouncer import MISSING, Bouncer
from proxy import Proxy
from test_doctor import looked
from test_lease import WORK, assert_counted

Make = Callable[[str], Bouncer]
AWAY = "the connection to PostgreSQL broke"


@pytest.fixture
def bouncer(house: House) -> Iterator[Make]:
    made: list[Bouncer] = []

    def make(mode: str) -> Bouncer:
        made.append(Bouncer(house.postgres, mode))
        return made[-1]

    yield make
    house.close()
    for one in made:
        one.close()


@pytest.fixture
def way(house: House) -> Iterator[Proxy]:
    """To the database, one that can be cut."""
    proxy = Proxy(house.postgres.port)
    yield proxy
    house.close()
    proxy.close()


def _through(way: Proxy, url: str) -> str:
    return url.replace(f":{url.rpartition(':')[2].partition('/')[0]}/", f":{way.port}/")


def _box(house: House, name: str, url: str, lease_url: str, *, start: bool = True) -> Box:
    box = house.box(name, url=url, start=False)
    text = box.config.read_text()
    box.config.write_text(text.replace("[nats]", f'lease_url = "{lease_url}"\n[nats]'))
    if start:
        box.start()
    return box


def _refused(box: Box) -> str:
    """The one line with which it does not start."""
    box.start(ready=False)
    assert box.daemon is not None
    assert box.daemon.wait(DEADLINE) == 78, box.log.read_text()
    (line,) = box.log.read_text().splitlines()
    return line


def _assert_untouched(box: Box, tmp_path: Path, away: Callable[[], None]) -> None:
    """``away`` takes the pool's connections for a while: no lease, and no run, is touched."""
    go = tmp_path / "go"
    run = box.submit_py("t", WORK, str(tmp_path / "journal"), str(go))
    watch = Watch(box, "t", "--run", run)
    watch.wait_chunks(3)
    away()
    go.touch()
    assert_counted(watch)
    assert box.runctl("wait", run).strip() == "succeeded"
    assert box.show(run)["attempt"] == 1
    assert AWAY not in box.log.read_text()


def test_the_pool_is_cut_and_no_lease_with_it(house: House, way: Proxy, tmp_path: Path) -> None:
    box = _box(house, "a", _through(way, house.url), house.url)
    found = looked(box)
    assert found["lease_url"] == ("ok", "the same database as database.url", None)
    assert "held by" in found["lease"][1]
    ended = box.submit_py("u", WORK, str(tmp_path / "other"), str(tmp_path / "end"))
    Watch(box, "u", "--run", ended).wait_chunks(1)

    def away() -> None:
        way.cut()
        (tmp_path / "end").touch()
        wait_until(lambda: "run succeeded" in box.log.read_text(), "its outcome waits")
        way.heal()

    _assert_untouched(box, tmp_path, away)
    assert box.runctl("wait", ended).strip() == "succeeded"
    assert box.show(ended)["attempt"] == 1


def test_the_lease_is_cut_and_the_pool_is_not(house: House, way: Proxy) -> None:
    box = _box(house, "a", house.url, _through(way, house.url))
    way.cut()
    wait_until(lambda: AWAY in box.log.read_text(), "the lease is missed")
    way.heal()
    wait_until(lambda: "the lease is held again" in box.log.read_text(), "it is back")
    assert box.runctl("wait", box.submit("t", "true")).strip() == "succeeded"


def test_another_database_is_refused(house: House) -> None:
    box = _box(house, "a", house.url, house.postgres.database(), start=False)
    line = _refused(box)
    assert "database.lease_url leads to another database than database.url" in line
    found = looked(box, 1)
    assert found["lease_url"][:2] == (
        "fail",
        "database.lease_url leads to another database than database.url",
    )


def test_what_is_wrong_with_one_url_is_said_of_that(house: House) -> None:
    gone = f"{house.url}-is-not-there"
    assert "database.lease_url" in _refused(_box(house, "a", house.url, gone, start=False))
    line = _refused(_box(house, "b", gone, house.url, start=False))
    assert "this database.url" in line


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_pooler_restarts(house: House, bouncer: Make, tmp_path: Path) -> None:
    pool = bouncer("session")
    box = _box(house, "a", pool.url(house.url), house.url)
    assert looked(box)["lease_url"][0] == "ok"
    _assert_untouched(box, tmp_path, pool.restart)


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_neither_may_be_shared(house: House, bouncer: Make, mode: str) -> None:
    """DBOS keeps locks, settings and prepared statements in its sessions."""
    shared = bouncer(mode).url(house.url)
    line = _refused(_box(house, "a", shared, house.url, start=False))
    assert "database.url leads through a pooler" in line
    assert "DBOS" in line
    line = _refused(_box(house, "b", house.url, shared, start=False))
    assert "database.lease_url leads through a pooler" in line
