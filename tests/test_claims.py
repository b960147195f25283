"""Executors that claim from one PostgreSQL at the same moment, or whose answers are lost:
one run of a thread at a time, none is stranded, and a start goes on."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, wait_until
from house import NOTE, House, assert_no_overlap, journal

pytestmark = pytest.mark.long

#: What is stored is committed up to 20 ms later: a disk, or a standby that is waited for.
SLOW_COMMITS = (
    """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep(random() * 0.02); RETURN NULL; END $$
""",
    """
CREATE CONSTRAINT TRIGGER slow AFTER INSERT OR UPDATE OF owner_xid ON dbos.workflow_status
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()
""",
)
#: Notes the runs that were claimed and put back.
NOTE_PUT_BACK = (
    "CREATE TABLE put_back (run text)",
    """
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO put_back VALUES (NEW.workflow_uuid); RETURN NULL; END $$
""",
    """
CREATE TRIGGER note AFTER UPDATE OF status ON dbos.workflow_status FOR EACH ROW
    WHEN (OLD.status = 'PENDING' AND NEW.status = 'ENQUEUED') EXECUTE FUNCTION note()
""",
)
#: The submit of "first" is committed when "second" has been claimed, and that claim when "first"
#: has been as well: locks say to the other session what is about to be committed.
CROSSED_COMMITS = (
    """
CREATE FUNCTION wait_held(which int) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        WHILE NOT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted
                          AND classid = 4711 AND objid = which) LOOP
            PERFORM pg_sleep(0.005);
        END LOOP;
    END $$
""",
    """
CREATE FUNCTION meet() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' AND NEW.workflow_uuid = 'first' THEN
            PERFORM pg_advisory_xact_lock(4711, 1);
            PERFORM wait_held(2);
        ELSIF NEW.status = 'PENDING' AND NEW.workflow_uuid = 'second' THEN
            PERFORM pg_advisory_xact_lock(4711, 2);
            PERFORM wait_held(3);
        ELSIF NEW.status = 'PENDING' AND NEW.workflow_uuid = 'first' THEN
            PERFORM pg_advisory_lock(4711, 3);  -- until its session ends: the other may be late
        END IF;
        RETURN NULL;
    END $$
""",
    """
CREATE CONSTRAINT TRIGGER meet AFTER INSERT OR UPDATE OF owner_xid ON dbos.workflow_status
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION meet()
""",
)
#: Whether the submit of "first" waits for its commit.
FIRST_WAITS = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = 4711 AND objid = 1"
ROUNDS, THREADS, MOST_ROUNDS = 12, 2, 200


@pytest.mark.nightly
def test_two_heads_of_one_thread(house: House, tmp_path: Path) -> None:
    """What was submitted first is stored last: each executor claims another head of the thread,
    and neither sees the other's claim."""
    for name in "ab":
        house.box(name)
    for text in (*NOTE_PUT_BACK, *CROSSED_COMMITS):
        house.sql(text)
    noted = tmp_path / "journal"
    argv = [sys.executable, "-S", "-c", f"{NOTE}note('begin'); note('end')", str(noted)]
    with ThreadPoolExecutor(1) as pool:
        earlier = pool.submit(house.bus.submit, "t", argv, "a", "first")
        wait_until(lambda: house.sql(FIRST_WAITS), "the first one is about to be stored")
        house.bus.submit("t", argv, "b", "second")
        assert earlier.result() == "first"
    for run in ("first", "second"):
        house.bus.wait_end("t", run)
        wait_until(lambda run=run: house.bus.run(run).status == "succeeded", "it is recorded")
        assert house.bus.run(run).attempt == 1, "what was put back is no attempt"
    assert sorted(assert_no_overlap(journal(noted))) == ["first", "second"]
    assert house.sql("SELECT run FROM put_back"), "they did not meet: nothing was tested"


@pytest.mark.nightly
def test_submits_through_two_executors_at_once(house: House) -> None:
    """They may get the same place on their thread; each executor then finds another head."""
    for name in "ab":
        house.box(name)
    for text in (*NOTE_PUT_BACK, *SLOW_COMMITS):
        house.sql(text)
    code = (
        "import os, sys, time\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
        "def note(what):\n"
        "    thread, run = os.environ['RUNCTL_THREAD'], os.environ['RUNCTL_RUN']\n"
        "    line = f'{thread} {run} {what} {os.getpid()} {time.monotonic()}\\n'\n"
        "    os.write(fd, line.encode())\n"
        "note('begin'); time.sleep(0.3); note('end')\n"
    )
    notes = house.path / "journal"
    argv = [sys.executable, "-S", "-c", code, str(notes)]

    def submit(place: tuple[str, str]) -> str:
        return house.bus.submit(place[0], argv, place[1])

    with ThreadPoolExecutor(2 * THREADS) as pool:
        for n in range(MOST_ROUNDS):
            if n >= ROUNDS and house.sql("SELECT run FROM put_back"):
                break
            places = [(f"t{n}-{t}", executor) for t in range(THREADS) for executor in "ab"]
            runs = list(pool.map(submit, places))
            for (thread, _), run in zip(places, runs, strict=True):
                house.bus.wait_end(thread, run)
    times: dict[str, list[tuple[float, str]]] = {}
    for line in notes.read_text().splitlines():
        thread, _, what, _, at = line.split()
        times.setdefault(thread, []).append((float(at), what))
    assert house.sql("SELECT run FROM put_back"), "no two ever met: nothing was tested"
    assert len(times) >= ROUNDS * THREADS
    for thread, found in times.items():
        assert [what for _, what in sorted(found)] == ["begin", "end"] * 2, thread
    for (thread, _), run in zip(places, runs, strict=True):
        assert house.bus.run(run).attempt == 1, f"{thread}: what was put back is no attempt"


class Cutter:
    """Passes on to a PostgreSQL. Once ``armed``, a client that commits a statement with all
    of these ``words`` gets its connection cut instead of the answer."""

    def __init__(self, target: int, *words: bytes) -> None:
        self.armed, self.cuts = False, 0
        self._words = words
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._session, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def _do(self, work: Any) -> Any:
        async def run() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(DEADLINE)

    async def _session(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        server, on = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {back, on}
        there = cut = False

        async def up() -> None:
            nonlocal there, cut
            while data := await client.read(65536):
                there = there or all(word in data for word in self._words)
                if there and b"COMMIT" in data:
                    there = False
                    if self.armed:
                        self.armed, cut = False, True
                        self.cuts += 1
                on.write(data)
                await on.drain()

        async def down() -> None:
            while data := await server.read(65536):
                if cut:
                    back.transport.abort()
                    on.transport.abort()
                    return
                back.write(data)
                await back.drain()

        await asyncio.gather(up(), down(), return_exceptions=True)
        for writer in (back, on):
            writer.close()

    def before(self, house: House) -> str:
        return house.url.replace(f":{house.postgres.port}/", f":{self.port}/")

    def close(self) -> None:
        async def quit() -> None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # what was aborted is closed then

        self._do(quit())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_a_claim_whose_answer_is_lost(house: House) -> None:
    cutter = Cutter(house.postgres.port, b"rate_limited", b"SET status")
    try:
        house.box("a", url=cutter.before(house))
        house.bus.wait_end("t", house.bus.submit("t", ["true"]))
        cutter.armed = True
        run, later = (house.bus.submit("t", ["true"]) for _ in range(2))
        wait_until(lambda: cutter.cuts, "the answer is lost")
        for one in (run, later):
            tail = house.bus.wait_end("t", one)
            assert tail.attempt == 1
            # The row follows the end of the stream.
            wait_until(lambda one=one: house.bus.run(one).status == "succeeded", "recorded")
    finally:
        house.close()
        cutter.close()


def test_a_start_whose_connection_breaks_while_it_looks_at_its_queue(house: House) -> None:
    words = (b"queues.polling_interval_sec", b"WHERE dbos.queues.name")
    cutter = Cutter(house.postgres.port, *words)
    cutter.armed = True
    try:
        box = house.box("a", url=cutter.before(house))
        assert cutter.cuts == 1
        assert box.runctl("wait", box.submit("t", "true")).strip() == "succeeded"
    finally:
        house.close()
        cutter.close()
