"""What one executor says and does for all: lists that name who did not answer, and verbs
that reach a run wherever it is. Real servers, real SIGSTOP and SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import nats
import pytest
import trio_asyncio
from conftest import DEADLINE, SLACK, Box, Watch, wait_until
from pgserver import Postgres
from runctl.cli.display.render import describe_silence
from runctl.config.schema import Config, Database
from runctl.protocol import messages, subjects
from runctl.protocol.errors import Refused
from runctl.protocol.model import Run, Status
from runctl.supervisor.cluster.lease_taking import hold_database_lease
from runctl.supervisor.cluster.members import Members
from runctl.supervisor.peers.remote import Others
from test_postgres import House

HANG = "import time; print('up', flush=True); time.sleep(600)"
PATIENT = "[takeover]\nenabled = true\nafter = '10m'\n"


@pytest.fixture
def home(tmp_path: Path, postgres: Postgres, nats_server: str) -> Iterator[House]:
    made = House(tmp_path, postgres, nats_server)
    try:
        yield made
    finally:
        for box in made.boxes:
            if box.daemon is not None and box.daemon.poll() is None:
                box.daemon.send_signal(signal.SIGCONT)
        made.close()


def through(home: House, executor: str, request: messages.Request) -> Any:
    """The answer of ``executor``."""
    verb = str(type(request).__struct_config__.tag)
    return home.ask(subjects.control_subject(verb, executor), request)


@contextlib.contextmanager
def alone(home: House, box: Box) -> Iterator[None]:
    """Stop the other executors meanwhile: what is queued, a replay too, is for whichever
    takes it first."""
    others = [x for x in home.boxes if x is not box and x.daemon and x.daemon.poll() is None]
    for other in others:
        assert other.daemon is not None
        other.daemon.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            assert other.daemon is not None
            other.daemon.send_signal(signal.SIGCONT)


def hanging(home: House, box: Box, thread: str) -> str:
    """A run that ``box`` executes."""
    with alone(home, box):
        request = messages.Submit(thread, argv=[sys.executable, "-u", "-c", HANG])
        run: str = through(home, box.name, request).run
        wait_until(lambda: through(home, box.name, messages.Show(run)).run.executor, "claimed")
    Watch(box, thread, "--run", run).wait_chunks(1)
    return run


def remarks(box: Box, *args: str) -> list[str]:
    """What ``list`` says beside its answer, which stays an array."""
    assert isinstance(json.loads(box.runctl("list", *args, "--json")), list)
    return box.stderr.splitlines()


@pytest.mark.nightly
def test_list_says_who_did_not_answer(home: House) -> None:
    a, b = home.box("a"), home.box("b")
    here, there = hanging(home, a, "on-a"), hanging(home, b, "on-b")
    assert {r["run"]["run"] for r in a.json("list")} == {here, there}
    wait_until(lambda: remarks(a) == [], "both answer")
    assert b.daemon is not None
    b.kill()
    gone = ["runctl: executor b is gone: its runs wait for its restart"]
    wait_until(lambda: remarks(a) == gone, "PostgreSQL has let it go")
    assert remarks(a, "on-b") == gone
    assert remarks(a, "on-a") == [], "b has nothing to do with this thread"
    with alone(home, b):
        b.start()
        wait_until(lambda: through(home, "b", messages.Show(there)).run.attempt == 2, "replayed")
    wait_until(lambda: remarks(a) == [], "both answer again")
    b.daemon.send_signal(signal.SIGSTOP)  # it may be asked itself by `list`: ask a
    for request in (messages.List(), messages.List("on-b")):
        (silent,) = through(home, "a", request).silent
        assert (silent.executor_id, silent.state) == ("b", "silent")
    assert through(home, "a", messages.List("on-a")).silent == []
    assert through(home, "a", messages.List(after=1)).silent == [], "said with the first page"
    assert describe_silence(silent).startswith("executor b holds its lease but does not answer")
    home.box("c")
    for _ in range(5):  # some are asked of b first
        assert remarks(a) == [f"runctl: {describe_silence(silent)}"]


def test_list_says_that_a_peer_takes_over(home: House) -> None:
    a, b = home.box("a", PATIENT), home.box("b", PATIENT)
    hanging(home, b, "on-b")
    b.kill()
    taken = ["runctl: executor b is gone: a peer takes its runs over in a moment"]
    wait_until(lambda: remarks(a) == taken, "PostgreSQL has let it go")


def test_list_asks_nobody_without_need(home: House) -> None:
    a, b = home.box("a"), home.box("b")
    hanging(home, a, "on-a")
    heard: list[str] = []

    async def lists() -> None:
        client = await nats.connect(home.nats)
        try:

            async def on_request(message: Any) -> None:
                heard.append(message.subject)

            await client.subscribe(subjects.control_subject("status", "b"), cb=on_request)
            await client.flush()
            for request in (messages.List(), messages.List("on-a"), messages.StatusRequest()):
                verb = str(type(request).__struct_config__.tag)
                subject = subjects.control_subject(verb, "a")
                await client.request(subject, messages.encode(request), DEADLINE)
                heard.append(verb)
        finally:
            await client.close()

    asyncio.run(lists())
    assert heard == ["list", "list", subjects.control_subject("status", "b"), "status"]
    assert b.daemon is not None
    b.kill()
    assert remarks(a) == [], "b had nothing running"


def test_every_verb_reaches_a_run_elsewhere(home: House) -> None:
    a, b = home.box("a"), home.box("b")
    run = hanging(home, a, "lane")
    queued = [a.submit("lane", "true") for _ in range(3)]
    assert through(home, "b", messages.Show(run)).run.executor == "a"
    assert through(home, "b", messages.Locate("lane")).run.run == run
    refused = through(home, "b", messages.Purge(["lane"]))
    assert (refused.code, run in refused.message) == ("refused", True)
    refused = through(home, "b", messages.Retry(run))
    assert (refused.code, "running" in refused.message) == ("refused", True)
    other = hanging(home, b, "other")
    waiter = b.popen("wait", run)
    done = through(home, "b", messages.Abort("lane", queued=True))
    assert done.runs == [*queued, run], "the queued ones first"
    assert waiter.wait(DEADLINE) == 5
    assert [r["status"] for r in a.json("list", "lane")] == ["aborted"] * 4
    again = through(home, "b", messages.Retry(queued[0])).run
    assert a.runctl("wait", again).strip() == "succeeded"
    assert through(home, "b", messages.Purge(["lane"])).runs == 5
    assert through(home, "a", messages.Abort("other")).runs == [other]


def test_an_executor_that_just_started_aborts(home: House) -> None:
    a = home.box("a")
    run = hanging(home, a, "lane")
    late = home.box("late")
    assert through(home, "late", messages.Abort("lane", run)).runs == [run]
    mine = hanging(home, late, "mine")
    late.kill()
    late.start()  # it recovers the run, and is told at once to end it
    assert through(home, "late", messages.Abort("mine", queued=True)).runs == [mine]
    assert a.show(mine)["status"] == "aborted"
    assert a.runctl("wait", mine, code=5).strip() == "aborted"


def test_what_was_aborted_before_a_refusal_is_said(home: House) -> None:
    a, b = home.box("a"), home.box("b")
    run = hanging(home, b, "lane")
    queued = a.submit("lane", "true")
    assert b.daemon is not None
    b.daemon.send_signal(signal.SIGSTOP)
    reply = through(home, "a", messages.Abort("lane", queued=True))
    assert reply.code == "refused"
    assert f"executor 'b' holds run {run} and does not answer" in reply.message
    assert f"aborted already: {queued}" in reply.message
    b.daemon.send_signal(signal.SIGCONT)
    assert through(home, "a", messages.Abort("lane")).runs == [run]


async def test_no_end_is_written_for_an_owner_that_may_live(home: House) -> None:
    config = Config(Path("/nowhere"), database=Database(home.url))
    run = Run("r1", "lane", Status.ABORTED, 1, "shell", "mute", "")
    async with trio_asyncio.open_loop():
        client = await trio_asyncio.aio_as_trio(nats.connect)(home.nats)
        members = Members(config, "peer")
        try:
            await members.announce()
            # Streams, rows and ends are not to be touched: there are none here.
            none: Any = None
            others = Others(*("peer", client, none, none, none, members), lambda: DEADLINE)
            async with hold_database_lease(config, "mute"):
                with pytest.raises(Refused, match="does not answer whether its processes are gone"):
                    await others.settle(run)
        finally:
            members.close()
            await trio_asyncio.aio_as_trio(client.close)()


def test_few_rights_in_the_database_are_enough(home: House) -> None:
    """As docs/cluster.md has it: the right to create is needed once."""
    name = home.url.rpartition("/")[2]
    role = f"few_{name}"
    home.postgres.sql(f"CREATE ROLE {role} LOGIN")
    home.postgres.sql(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
    home.postgres.sql(f"GRANT CONNECT ON DATABASE {name} TO {role}")
    home.url = home.url.replace("postgres@", f"{role}@")
    box = home.box("few", start=False)
    box.start(ready=False)
    assert box.daemon is not None
    assert box.daemon.wait(DEADLINE) == 78
    (line,) = box.log.read_text().splitlines()
    assert "GRANT CREATE ON DATABASE" in line
    home.postgres.sql(f"GRANT CREATE ON DATABASE {name} TO {role}")
    box.start()
    assert box.runctl("wait", box.submit("t", "true")).strip() == "succeeded"
    assert box.term() == 0
    home.postgres.sql(f"REVOKE CREATE ON DATABASE {name} FROM {role}")
    box.start()
    assert box.runctl("wait", box.submit("t", "true")).strip() == "succeeded"


#: A run is put back in its queue when nobody holds this lock any more.
HELD_BACK = (
    """
CREATE FUNCTION hold_back() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_advisory_xact_lock_shared(4712); RETURN NEW; END $$
""",
    """
CREATE TRIGGER hold_back BEFORE UPDATE OF status ON dbos.workflow_status FOR EACH ROW
    WHEN (OLD.status = 'PENDING' AND NEW.status = 'ENQUEUED') EXECUTE FUNCTION hold_back()
""",
)
PUTTING_BACK = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = 4712 AND NOT granted"
TAKING = "[takeover]\nenabled = true\nafter = '2s'\n[queue]\nmax_running = 1\nstop_grace = '1s'\n"


@pytest.mark.nightly
def test_an_abort_that_meets_a_takeover(home: House) -> None:
    """The owner has vanished: PostgreSQL has let it go, NATS has not yet. The peer that is
    asked has no place, so that what it takes over waits."""
    boxes = [home.box(name, TAKING) for name in "ab"]
    runs = [home.bus.submit(thread, ["sleep", "600"]) for thread in ("x", "y")]
    wait_until(lambda: {home.bus.run(run).status for run in runs} == {"running"}, "both run")
    run = runs[0]
    (owner,) = (box for box in boxes if box.name == home.bus.run(run).executor)
    (other,) = (box for box in boxes if box is not owner)
    os.kill(owner.pid, signal.SIGSTOP)

    async def meet() -> Any:
        """The answer to an abort that has asked the owner when the takeover puts its runs back."""
        asked = asyncio.Event()

        async def on_request(_: Any) -> None:
            asked.set()

        connection = await asyncpg.connect(home.url, ssl=False)
        client = await nats.connect(home.nats)
        try:
            await connection.execute("SELECT pg_advisory_lock(4712)")
            await connection.execute(HELD_BACK[0])
            await connection.execute(HELD_BACK[1])
            await client.subscribe(subjects.control_subject("status", owner.name), cb=on_request)
            await client.flush()
            await connection.fetch(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
                " WHERE application_name LIKE $1",
                f"runctld pid {owner.pid} %",
            )
            while not await connection.fetchval(PUTTING_BACK):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            asked.clear()
            abort = asyncio.create_task(
                asyncio.to_thread(through, home, other.name, messages.Abort("x", run))
            )
            await asked.wait()
            await connection.execute("SELECT pg_advisory_unlock(4712)")
            return await abort
        finally:
            await client.close()
            await connection.close()

    reply = asyncio.run(asyncio.wait_for(meet(), DEADLINE))
    assert isinstance(reply, messages.Aborted), reply
    wait_until(lambda: "1 runs taken over" in other.log.read_text(), "it says so")
    row = "SELECT status FROM dbos.workflow_status WHERE workflow_uuid = $1"
    assert home.sql(row, run)[0]["status"] == "CANCELLED"
    owner.kill()


def test_a_database_that_refuses_a_read_ends_nobody(home: House) -> None:
    name = home.url.rpartition("/")[2]
    home.sql(f"ALTER DATABASE {name} SET lock_timeout = '300ms'")
    boxes = [home.box(name, TAKING) for name in "ab"]
    run = home.bus.submit("t", ["sleep", "600"])
    wait_until(lambda: home.bus.run(run).status == "running", "it runs")
    (owner,) = (box for box in boxes if box.name == home.bus.run(run).executor)
    (other,) = (box for box in boxes if box is not owner)

    async def lock() -> None:
        """As ALTER TABLE, VACUUM FULL or REINDEX do."""
        connection = await asyncpg.connect(home.url, ssl=False)
        try:
            async with connection.transaction():
                table = "dbos.workflow_status"
                await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
                owner.kill()
                while "takeover: the database cannot be used now" not in other.log.read_text():
                    assert other.daemon is not None
                    assert other.daemon.poll() is None, other.log.read_text()
                    await asyncio.sleep(0.05)
        finally:
            await connection.close()

    asyncio.run(asyncio.wait_for(lock(), 60 * SLACK))
    wait_until(lambda: home.bus.run(run).executor == other.name, "taken over at last")
