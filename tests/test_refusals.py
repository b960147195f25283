"""What the database refuses for a while: every run ends with its true status, its thread goes
on, and what can be asked meanwhile is answered. A real PostgreSQL, real SQLite files."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
import trio
from conftest import DEADLINE, Box, Watch, wait_until
from dbos._schemas.system_database import SCHEMA_PLACEHOLDER, SystemSchema
from house import House
from runctl.protocol import messages
from runctl.supervisor.queue.row_access import RowAccess
from runctl.supervisor.queue.thread_index import ThreadIndex

pytestmark = pytest.mark.long

#: Ends when the file argv[1] is there, as argv[2:] says.
UNTIL = """
import os, sys, time
print("up", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
sys.exit(int(sys.argv[2]))
"""


class Lane:
    """A run that hangs until it is released, and one behind it on its thread."""

    def __init__(self, box: Box, thread: str, code: int = 0) -> None:
        self.box, self.thread, self.code = box, thread, code
        self._file = box.path / f"go-{thread}"
        self.run = box.submit_py(thread, UNTIL, str(self._file), str(code))
        Watch(box, thread).wait_chunks(1)
        self.behind = box.submit(thread, "true")

    def release(self) -> None:
        """Its end is in the stream when this returns; what its row says is another matter."""
        self._file.touch()
        watch = Watch(self.box, self.thread, "--run", self.run)
        assert watch.wait() == (self.code != 0)

    def assert_ended(self) -> None:
        expected = "succeeded" if self.code == 0 else "failed"
        assert self.box.runctl("wait", self.run, code=int(self.code != 0)).strip() == expected
        assert self.box.runctl("wait", self.behind).strip() == "succeeded"
        row = self.box.show(self.run)
        assert (row["status"], row["exit_code"], row["attempt"]) == (expected, self.code, 1)


def waits(box: Box) -> list[messages.UnfinishedRun]:
    (status,) = box.ask(messages.StatusRequest())
    assert isinstance(status, messages.DaemonStatus), status
    assert status.running >= len(status.unfinished)
    return status.unfinished


def assert_said(box: Box, lane: Lane, words: str) -> None:
    """While its outcome is refused: by status, by doctor, and by whoever wants it aborted."""
    (waiting,) = wait_until(  # other outcomes may be refused before, and this one otherwise
        lambda: [x for x in waits(box) if x.run == lane.run and words in x.why],
        f"the outcome is refused: {words}",
    )
    assert waiting.status == ("succeeded" if lane.code == 0 else "failed")
    findings = box.runctl("doctor", code=None)
    assert f"{lane.run} on thread {lane.thread} has {waiting.status}" in findings
    box.runctl("abort", lane.thread, "--run", lane.run, code=6)
    assert "ended by itself" in box.stderr


CANCELLER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock(7);  -- two at once would both be the last one
        IF (SELECT last_value FROM refused) < $1 THEN
            PERFORM nextval('refused');
            PERFORM pg_cancel_backend(pg_backend_pid());
            PERFORM pg_sleep(60);
        END IF;
        RETURN NEW;
    END $$
"""


@pytest.mark.parametrize("times", [1, 4])
def test_a_write_of_an_outcome_that_is_cancelled(house: House, times: int) -> None:
    box = house.box("a")
    lanes = [Lane(box, f"t{n}", code) for n, code in enumerate((0, 3))]
    house.sql("CREATE SEQUENCE refused MINVALUE 0 START 0")
    house.sql("SELECT nextval('refused')")
    house.sql(CANCELLER.replace("$1", str(times)))
    house.sql(
        "CREATE TRIGGER refuse BEFORE UPDATE ON dbos.workflow_status FOR EACH ROW"
        " WHEN (NEW.status IN ('SUCCESS', 'ERROR')) EXECUTE FUNCTION refuse()"
    )
    for lane in lanes:
        lane.release()
    for lane in lanes:
        lane.assert_ended()
    (row,) = house.sql("SELECT last_value FROM refused")
    assert row["last_value"] == times
    assert waits(box) == []


@contextmanager
def locked(house: House, text: str) -> Iterator[None]:
    """``text`` holds its locks for as long as this is open."""
    release, held = threading.Event(), threading.Event()

    async def hold() -> None:
        conn = await asyncpg.connect(house.url, ssl=False)
        async with conn.transaction():
            await conn.execute(text)
            held.set()
            await asyncio.to_thread(release.wait)
        await conn.close()

    thread = threading.Thread(target=lambda: asyncio.run(hold()))
    thread.start()
    try:
        assert held.wait(DEADLINE)
        yield
    finally:
        release.set()
        thread.join()


@pytest.mark.nightly
def test_a_lock_on_the_rows_and_a_role_that_does_not_wait(house: House) -> None:
    house.sql("CREATE ROLE hasty LOGIN SUPERUSER")
    house.sql("ALTER ROLE hasty SET lock_timeout = '10ms'")
    try:
        box = house.box("a", url=house.url.replace("postgres@", "hasty@"))
        lane = Lane(box, "t")
        with locked(house, "LOCK TABLE dbos.workflow_status IN SHARE MODE"):
            lane.release()
            assert_said(box, lane, "lock timeout")
            box.runctl("submit", "other", "--", "true", code=1)
            assert "the database cannot be used now" in box.stderr
        lane.assert_ended()
        assert box.runctl("wait", box.submit("other", "true")).strip() == "succeeded"
    finally:
        house.close()
        house.sql("REASSIGN OWNED BY hasty TO postgres")
        house.sql("DROP OWNED BY hasty")
        house.sql("DROP ROLE hasty")


INDEXED = "SELECT to_regclass('dbos.runctl_thread') IS NOT NULL AS made"


def test_an_index_that_waits_for_a_lock(house: House) -> None:
    """The daemon serves meanwhile, and makes it when it can."""
    box = house.box("a")
    assert house.sql(INDEXED)[0]["made"]
    box.term()
    house.sql("DROP INDEX dbos.runctl_thread")
    with locked(house, "LOCK TABLE dbos.workflow_status IN ROW EXCLUSIVE MODE"):
        box.start()
        assert box.runctl("wait", box.submit("t", "true")).strip() == "succeeded"
        wait_until(lambda: "an index cannot be made" in box.log.read_text(), "it is refused")
    wait_until(lambda: house.sql(INDEXED)[0]["made"], "it is made")
    assert not box.warnings()


def test_an_index_that_never_gets_its_lock(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """One warning says what to do, and that does it. What is there takes no lock."""
    house.box("a").term()
    house.sql("DROP INDEX dbos.runctl_thread")
    table = "LOCK TABLE dbos.workflow_status IN ROW EXCLUSIVE MODE"
    with locked(house, table):
        make_index(house, 3.0)
    (warning,) = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert "(canceling statement due to lock timeout): lists and chats are slow" in warning
    house.sql(warning.partition("run once: ")[2])
    assert house.sql(INDEXED)[0]["made"]
    caplog.clear()
    with locked(house, table):
        make_index(house, 60.0)
    assert caplog.records == []


def test_an_index_that_a_role_may_not_make(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.box("a").term()
    house.sql("DROP INDEX dbos.runctl_thread")
    house.sql("CREATE ROLE guest LOGIN")
    house.sql("GRANT USAGE ON SCHEMA dbos TO guest")
    try:
        make_index(house, 60.0, "guest")
    finally:
        house.sql("DROP OWNED BY guest")
        house.sql("DROP ROLE guest")
    (warning,) = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert "must be owner of table workflow_status" in warning


def make_index(house: House, patience: float, role: str = "postgres") -> None:
    url = house.url.replace("postgresql://postgres@", f"postgresql+psycopg://{role}@")
    engine = sa.create_engine(url).execution_options(
        schema_translate_map={SCHEMA_PLACEHOLDER: "dbos"}
    )

    async def index() -> None:
        database: Any = SimpleNamespace(engine=engine, tables=SystemSchema, now=sa.func.now)
        access = RowAccess(
            *(database, "x", threading.Event()), threads=trio.CapacityLimiter(1), alone=False
        )
        await ThreadIndex(access).make_patiently(patience)

    try:
        trio.run(index)
    finally:
        engine.dispose()


def test_a_role_that_is_serializable(house: House) -> None:
    """Sessions of ours are not, and no statement of theirs is cut."""
    house.sql("CREATE ROLE strict LOGIN SUPERUSER")
    house.sql("ALTER ROLE strict SET default_transaction_isolation = 'serializable'")
    house.sql("ALTER ROLE strict SET statement_timeout = '300ms'")
    try:
        box = house.box("a", url=house.url.replace("postgres@", "strict@"))
        house.sql("CREATE TABLE seen AS SELECT 'none' AS status, 'none' AS isolation")
        house.sql("""
            CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                INSERT INTO seen VALUES (NEW.status, current_setting('transaction_isolation'));
                PERFORM pg_sleep(0.4);
                RETURN NEW;
            END $$
        """)
        house.sql(
            "CREATE TRIGGER note BEFORE INSERT OR UPDATE ON dbos.workflow_status"
            " FOR EACH ROW EXECUTE FUNCTION note()"
        )
        assert box.runctl("wait", box.submit("t", "true")).strip() == "succeeded"
        hanging = box.submit("t", "sleep", "600")
        Watch(box, "t", "--run", hanging)
        wait_until(lambda: box.show(hanging)["status"] == "running", "it runs")
        box.runctl("abort", "t")
        statuses = ("ENQUEUED", "PENDING", "SUCCESS", "CANCELLED")
        expected = {("none", "none"), *((status, "read committed") for status in statuses)}

        def seen() -> set[tuple[str, str]]:
            return {(r["status"], r["isolation"]) for r in house.sql("SELECT * FROM seen")}

        wait_until(lambda: seen() >= expected, "each was written")
        assert seen() == expected
    finally:
        house.close()
        house.sql("REASSIGN OWNED BY strict TO postgres")
        house.sql("DROP OWNED BY strict")
        house.sql("DROP ROLE strict")


def test_a_database_that_is_read_only_for_a_while(house: House) -> None:
    """Sessions that were opened meanwhile stay so: others are opened."""
    box = house.box("a")
    lanes = [Lane(box, f"t{n}", code) for n, code in enumerate((0, 3))]
    name = house.url.rpartition("/")[2].partition("?")[0]
    house.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    house.sql(
        "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'dbos_transact'"
    )
    lanes[0].release()
    assert_said(box, lanes[0], "read-only transaction")
    lanes[1].release()
    box.runctl("submit", "other", "--", "true", code=1)
    assert "read-only transaction" in box.stderr
    house.postgres.sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    for lane in lanes:
        lane.assert_ended()
    assert box.runctl("wait", box.submit("other", "true")).strip() == "succeeded"


@pytest.mark.nightly
def test_a_row_that_nothing_executes(house: House) -> None:
    """A hand in the database: one that has ended is adopted, one that has not is begun again."""
    box = house.box("a")
    done = box.submit("t", "echo", "done")
    box.runctl("wait", done)
    lost = box.submit("u", "true")
    box.runctl("wait", lost)
    box.runctl("purge", "u", "--yes")
    # What puts them back is refused as well, until all has been said of them.
    house.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION USING MESSAGE = 'not yet', ERRCODE = '55P03'; END $$"
    )
    house.sql(
        "CREATE TRIGGER refuse BEFORE UPDATE ON dbos.workflow_status FOR EACH ROW"
        " WHEN (OLD.status = 'PENDING' AND NEW.status = 'ENQUEUED') EXECUTE FUNCTION refuse()"
    )
    house.sql(
        "UPDATE dbos.workflow_status SET status = 'PENDING', completed_at = NULL"
        " WHERE workflow_uuid = ANY($1)",
        [done, lost],
    )
    behind = box.submit("t", "true")
    wait_until(lambda: len(waits(box)) == 2, "status tells of them")
    wait_until(lambda: "cannot be made (not yet" in box.log.read_text(), "it was tried")
    assert len(waits(box)) == 2
    assert "is not executed: nothing executes it" in box.runctl("doctor", code=None)
    house.sql("DROP TRIGGER refuse ON dbos.workflow_status")
    for run in (done, lost, behind):
        assert box.runctl("wait", run).strip() == "succeeded"
    assert box.runctl("attach", "t", "--run", done) == "done\n"
    assert waits(box) == []
    log = box.log.read_text()
    for run in (done, lost):
        assert f"run {run} was running here by its row, but nothing executed it" in log


# ---- SQLite ---------------------------------------------------------------------------------


@contextmanager
def exclusive(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program's transaction on the database."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield other
    finally:
        other.rollback()
        other.close()


@pytest.mark.nightly
def test_sqlite_that_another_program_has_locked(box: Box) -> None:
    lane = Lane(box, "t")
    with exclusive(box.state / "runctl.sqlite"):
        lane.release()
        assert_said(box, lane, "database is locked")
        box.runctl("submit", "other", "--", "true", code=1)
        assert "the database cannot be used now (database is locked)" in box.stderr
    lane.assert_ended()


@pytest.mark.parametrize("how", ["full", pytest.param("read-only", marks=pytest.mark.nightly)])
def test_sqlite_that_refuses_a_write(box: Box, how: str) -> None:
    """By a trigger: as a full disk, or a file that may not be written, is told of."""
    lanes = [Lane(box, f"t{n}", code) for n, code in enumerate((0, 3))]
    file = box.state / "runctl.sqlite"
    words = {
        "full": "database or disk is full",
        "read-only": "attempt to write a readonly database",
    }
    with sqlite3.connect(file) as db:
        db.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE ON workflow_status"
            " WHEN NEW.status IN ('SUCCESS', 'ERROR')"
            f" BEGIN SELECT RAISE(ABORT, '{words[how]}'); END"
        )
    db.close()
    for lane in lanes:
        lane.release()
    assert_said(box, lanes[0], words[how])
    with sqlite3.connect(file) as db:
        db.execute("DROP TRIGGER refuse")
    db.close()
    for lane in lanes:
        lane.assert_ended()


def test_a_stop_while_an_outcome_is_refused(box: Box) -> None:
    """The next daemon adopts the end of the stream."""
    lane = Lane(box, "t", 3)
    with exclusive(box.state / "runctl.sqlite"):
        lane.release()
        wait_until(lambda: waits(box), "the outcome is refused")
        assert box.term() == 0
    box.start()
    assert box.runctl("wait", lane.run, code=1).strip() == "failed"
    assert box.show(lane.run)["exit_code"] == 3
    assert box.runctl("wait", lane.behind).strip() == "succeeded"


# ---- threads --------------------------------------------------------------------------------

#: A run begins and ends while every thread that is for others hangs.
APART = """
import sys, threading
from pathlib import Path
import trio, trio.testing, trio_asyncio
from runctl.config.schema import Config
from runctl.supervisor.queue.engine import Durable
from runctl.supervisor.host.metrics import Meters
from runctl.protocol.model import Outcome, RunSpec, Status

async def dispatch(spec, attempt, why):
    return Outcome(Status.SUCCEEDED)

async def main():
    others, over = trio.to_thread.current_default_thread_limiter(), threading.Event()
    durable = Durable(Config(Path(sys.argv[1])), "e", lambda: None, Meters())
    with trio.fail_after(float(sys.argv[2])):
        async with trio_asyncio.open_loop() as loop, trio.open_nursery() as nursery:
            await durable.launch(loop, dispatch)
            for _ in range(int(others.total_tokens)):
                nursery.start_soon(trio.to_thread.run_sync, over.wait)
            try:
                await trio.testing.wait_all_tasks_blocked()
                assert others.available_tokens == 0
                await durable.enqueue(RunSpec("r", "t", "shell", ("true",)))
                while (await durable.rows.get("r"))[1].status is not Status.SUCCEEDED:
                    await trio.sleep(0.01)
            finally:
                over.set()
            await durable.close()

trio.run(main)
"""


def test_what_waits_for_the_database_shares_no_thread_with_others(tmp_path: Path) -> None:
    argv = [sys.executable, "-W", "ignore", "-c", APART, str(tmp_path), str(DEADLINE)]
    subprocess.run(argv, check=True)


SLOW = """
import asyncio, pathlib, sys, time
import dbos._dbos
from runctl.supervisor.main import main
from runctl.supervisor.queue import outcomes
store, stored = outcomes.Outcomes.store, pathlib.Path(sys.argv[1])
in_thread = asyncio.to_thread

def is_open():
    try:
        return dbos._dbos._get_dbos_instance()._sys_db is not None
    except Exception:
        return False

async def note(*args):
    await store(*args)
    stored.touch()

async def slow(call, *args, **named):
    def later():
        end = time.monotonic() + 1
        while stored.exists() and time.monotonic() < end and is_open():
            time.sleep(0.001)
        return call(*args, **named)
    return await in_thread(later)

outcomes.Outcomes.store, asyncio.to_thread = note, slow
sys.argv[1:] = sys.argv[5:]
main()
"""


def test_a_stop_between_an_outcome_and_dbos_which_is_told_of_it(
    stopped_box: Box, tmp_path: Path
) -> None:
    """As on a busy machine: DBOS takes a database that is closed by then for an error."""
    box, stored = stopped_box, tmp_path / "stored"
    box.prefix = [sys.executable, "-c", SLOW, str(stored)]
    box.start()
    run = box.submit("t", "true")
    wait_until(stored.exists, "its outcome is stored")
    assert box.term() == 0
    assert "Traceback" not in box.log.read_text()
    box.prefix = []
    box.start()
    assert box.show(run)["status"] == "succeeded"
    assert box.show(run)["attempt"] == 1
