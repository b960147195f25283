"""PostgreSQL through PgBouncer: session mode works on its defaults, the others are found out at
the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from house import House
from pgbouncer import MISSING, Bouncer
from test_lease import WORK, assert_counted

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING)]

Make = Callable[..., Bouncer]


@pytest.fixture
def bouncer(house: House) -> Iterator[Make]:
    made: list[Bouncer] = []

    def make(mode: str, more: str = "") -> Bouncer:
        made.append(Bouncer(house.postgres, mode, more))
        return made[-1]

    yield make
    house.close()
    for one in made:
        one.close()


def _line(box: Box, code: int) -> str:
    assert box.daemon is not None
    assert box.daemon.wait(DEADLINE) == code, box.log.read_text()
    (line,) = box.log.read_text().splitlines()
    return line


def _assert_works(house: House, boxes: list[Box], tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = boxes[0].submit_py("t", WORK, str(tmp_path / "journal"), str(go))
    queued = boxes[1].submit("t", "true")
    watch = Watch(boxes[0], "t", "--run", run)
    watch.wait_chunks(3)
    asked = house.sql("SELECT now() AS at")[0]["at"]
    leases = (
        "SELECT count(*) AS n FROM pg_stat_activity WHERE application_name LIKE 'runctld pid %'"
        " AND datname = current_database() AND query_start > $1::timestamptz + interval '1 s'"
    )
    wait_until(lambda: house.sql(leases, asked)[0]["n"] == 2, "each lease is asked for again")
    go.touch()
    assert_counted(watch)
    for done in (run, queued):
        assert boxes[1].runctl("wait", done).strip() == "succeeded"
    for n in range(10):  # prepared statements are made at the fifth
        assert boxes[n % 2].runctl("wait", boxes[n % 2].submit(f"t{n}", "true")).strip()

    def states() -> dict[str, str]:
        return {x["executor_id"]: x["state"] for x in boxes[0].json("status")["executors"]}

    wait_until(lambda: states() == {"a": "up", "b": "up"}, "both answer")
    second = house.box("a", start=False)
    text = boxes[0].config.read_text()
    second.config.write_text(text.replace(str(boxes[0].state), f"{tmp_path}/x"))
    second.start(ready=False)
    assert "is held by runctld pid" in _line(second, 75)
    owned = boxes[0].submit("dead", "sleep", "600")
    wait_until(lambda: boxes[1].show(owned)["status"] == "running", "it runs")
    for box in boxes:
        assert "Traceback" not in box.log.read_text()
        assert not box.warnings()


def test_session_mode_works_on_its_defaults(house: House, tmp_path: Path, bouncer: Make) -> None:
    # Two executors, and a third that is refused, may want more sessions than its default of 20.
    url = bouncer("session", "default_pool_size = 80\n").url(house.url)
    _assert_works(house, [house.box(name, url=url) for name in "ab"], tmp_path)


@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "busy"])
def test_other_modes_are_found_out(house: House, bouncer: Make, mode: str, busy: bool) -> None:
    """Also where the pool has many connections, which take turns."""
    more = "server_round_robin = 1\nmin_pool_size = 5\n" if busy else ""
    box = house.box("a", url=bouncer(mode, more).url(house.url), start=False)
    for _ in range(3):
        box.log.unlink(missing_ok=True)
        box.start(ready=False)
        assert "database.url" in (line := _line(box, 78))
        assert "pool_mode = session" in line
    assert not house.sql(
        "SELECT 1 FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE locktype = 'advisory' AND datname = current_database()"
    )
