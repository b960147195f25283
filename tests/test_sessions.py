"""The sessions with the database: what is set for them, and for no other engine's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from house import House
from runctl.config.schema import Config, Database
from runctl.supervisor.queue.sessions import Sessions


@pytest.fixture
def commits() -> list[str]:
    return []


@pytest.fixture
def sessions(tmp_path: Path, commits: list[str]) -> Iterator[Sessions]:
    made = Sessions(Config(tmp_path), lambda: commits.append("commit"))
    yield made
    made.close()


def test_each_commit_is_asked_for_and_no_other_engines(
    tmp_path: Path, sessions: Sessions, commits: list[str]
) -> None:
    # As DBOS has it: with options of its own.
    theirs = sessions.engine.execution_options(schema_translate_map={None: None})
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other'}")
    with other.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    other.dispose()
    assert commits == []
    for engine in (sessions.engine, theirs):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS t (x)")
    assert commits == ["commit", "commit"]


def test_a_commit_that_may_not_be_is_none(tmp_path: Path) -> None:
    lost = False

    def wait() -> None:
        if lost:
            raise RuntimeError("the lease is lost")

    sessions = Sessions(Config(tmp_path), wait)
    with sessions.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    lost = True
    with pytest.raises(RuntimeError), sessions.engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
    with sessions.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM t").scalar() == 0
    sessions.close()


def test_sqlite_waits_for_who_writes_and_keeps_its_references(sessions: Sessions) -> None:
    for _ in range(2):  # a new connection, and one that was used
        with sessions.engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            assert driver.isolation_level == "IMMEDIATE"
            for setting, value in (("busy_timeout", 4000), ("foreign_keys", 1)):
                assert connection.exec_driver_sql(f"PRAGMA {setting}").scalar() == value


def test_one_that_is_given_back_late_is_closed(sessions: Sessions) -> None:
    connection = sessions.engine.connect()
    driver: Any = connection.connection.driver_connection
    sessions.close()
    driver.execute("SELECT 1")
    connection.close()
    with pytest.raises(Exception, match="closed database"):
        driver.execute("SELECT 1")


@pytest.mark.parametrize("idle", ["", "7s"], ids=["DBOS's", "of the URL"])
def test_postgresqls_defaults_are_ours(house: House, idle: str) -> None:
    name = house.url.rpartition("/")[2].partition("?")[0]
    for setting, value in (("isolation", "serializable"), ("deferrable", "on")):
        house.sql(f"ALTER DATABASE {name} SET default_transaction_{setting} = '{value}'")
    house.sql(f"ALTER DATABASE {name} SET statement_timeout = '1h'")
    url = house.url
    if idle:
        mark = "&" if "?" in url else "?"
        url += f"{mark}options=-c%20idle_in_transaction_session_timeout%3D{idle}"
    sessions = Sessions(Config(Path("/nowhere"), database=Database(url)), lambda: None)
    wanted = {
        "transaction_isolation": "read committed",
        "transaction_deferrable": "off",
        "statement_timeout": "0",
        "lock_timeout": "4s",
        "idle_in_transaction_session_timeout": idle or "1min",
    }
    for isolation in (None, "AUTOCOMMIT", None):  # and what it returns to
        with sessions.engine.connect() as connection:
            if isolation is not None:
                connection = connection.execution_options(isolation_level=isolation)
            found = {x: connection.exec_driver_sql(f"SHOW {x}").scalar() for x in wanted}
        assert found == wanted
    sessions.close()
