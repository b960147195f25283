"""Several executors that share a PostgreSQL and a NATS: real servers, real SIGKILL."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
import trio
import trio_asyncio
from conftest import DEADLINE, Box, Watch, wait_until
from house import NOTE, House, assert_no_overlap, ended, journal
from pgserver import Postgres, TlsFront, free_port
from proc import alive
from runctl.config.schema import Config, ConfigError, Database
from runctl.protocol import messages
from runctl.supervisor.cluster import lease_taking, members
from runctl.supervisor.cluster.lease_taking import hold_database_lease
from runctl.supervisor.cluster.members import Members
from runctl.supervisor.host.postgres import aio, connect, connection
from runctl.supervisor.queue.retries import may_pass
from runctl.supervisor.queue.sessions import Sessions

#: The first attempt stays in the middle, whenever it is that it is cut.
TEN = """
import os, time
for i in range(1, 11):
    print(f"chunk-{i} {time.time():.3f}", flush=True)
    time.sleep(600 if os.environ["RUNCTL_ATTEMPT"] == "1" and i == 4 else 0.05)
"""


def _assert_one_clean_reply(text: str) -> None:
    assert [int(n) for n in re.findall(r"^chunk-(\d+) ", text, re.M)] == list(range(1, 11))


def _wait_said(watch: Watch) -> None:
    """TEN has said something; one chunk may hold several of its lines."""
    wait_until(lambda: "chunk-2 " in watch.text(), "two of its lines are seen")


def assert_after(first: Any, second: Any) -> None:
    """``second`` began when ``first`` had ended; its start is the time at which PostgreSQL began
    the transaction that claimed it, which may have waited for the first one's end."""
    ended, started = (
        datetime.fromisoformat(run[key])
        for run, key in ((first, "ended_at"), (second, "started_at"))
    )
    assert ended - started <= timedelta(seconds=2)


def test_the_essentials(house: House) -> None:
    box = house.box("essentials")
    ran = box.submit_py("demo", TEN)
    queued = box.submit("demo", "echo", "second")
    watch = Watch(box, "demo")
    _wait_said(watch)
    assert box.json("list")[0]["queued"] == 1
    box.kill()
    box.start()
    assert watch.wait() == 0
    _assert_one_clean_reply(watch.text())
    assert box.runctl("wait", queued).strip() == "succeeded"
    first, second = box.show(ran), box.show(queued)
    assert (first["attempt"], first["status"]) == (2, "succeeded")
    assert_after(first, second)
    assert [r["run"] for r in box.json("list", "demo")] == [queued, ran]

    hanging = box.submit_py("demo", "import time; print('up', flush=True); time.sleep(600)")
    waiting = box.submit("demo", "echo", "third")
    Watch(box, "demo", "--run", hanging).wait_chunks(1)
    box.runctl("purge", "demo", "--yes", code=6)
    assert box.term() == 0
    box.start()
    Watch(box, "demo", "--run", hanging).wait_chunks(1)
    # What is seen may be of the first attempt yet.
    wait_until(lambda: box.show(hanging)["attempt"] == 2, "it is replayed")
    assert hanging in box.runctl("abort", "demo")
    assert box.runctl("wait", waiting).strip() == "succeeded"
    again = box.runctl("retry", hanging).strip()
    box.runctl("abort", "demo", "--queued", "--run", again)
    assert box.show(again)["retry_of"] == hanging
    box.runctl("purge", "demo", "--yes")
    assert box.json("status")["database"]["kind"] == "postgresql"


def _exit(box: Box, code: int) -> str:
    """The daemon's last line, once it has ended with ``code``."""
    assert box.daemon is not None
    assert box.daemon.wait(DEADLINE) == code, box.log.read_text()
    line = box.log.read_text().splitlines()[-1]
    assert "Traceback" not in box.log.read_text()
    return line


def test_what_is_wrong_with_the_database_is_one_line(house: House, postgres: Postgres) -> None:
    port = free_port()
    for url, more, code, said in [
        (f"postgresql://u:hush@127.0.0.1:{port}/x", "start_timeout = '500ms'", 69, "reached"),
        ("postgresql://u:hush@127.0.0.1:1/x?sslmod=require", "", 78, "sslmod"),
        ("postgresql://u:hush@127.0.0.1:1", "", 78, "names no database"),
        ("postgresql://u:hush@127.0.0.1:1/x?channel_binding=require", "", 78, "channel_binding"),
        (postgres.url("nothing-there"), "", 78, "does not exist"),
        (postgres.url("postgres", sslmode="require"), "", 78, "SSL"),
    ]:
        box = house.box("bad", url=url, start=False)
        box.config.write_text(f"{more}\n{box.config.read_text()}")
        box.start(ready=False)
        line = _exit(box, code)
        assert said in line, line
        assert "hush" not in box.log.read_text()


def test_a_second_daemon_of_an_id_names_the_holder(house: House) -> None:
    first = house.box("same")
    second = house.box("same", start=False)
    second.start(ready=False)
    line = _exit(second, 75)
    assert first.daemon is not None
    assert f"pid {first.daemon.pid} on " in line
    first.kill()
    second.start()


NO_GRACE = "[queue]\nlease_grace = '0s'\n"
LEASE_SESSION = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE application_name LIKE 'runctld pid %' AND datname = current_database()"
)
#: Prints numbers, without a hole, until the file argv[1] exists.
COUNTING = """
import os, sys, time
n = 0
while not os.path.exists(sys.argv[1]):
    n += 1
    print(n, flush=True)
    time.sleep(0.02)
"""


def _assert_counted(text: str) -> None:
    numbers = text.split()
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("how", ["cut", "silent"])
def test_a_lease_whose_session_is_gone_is_taken_again(
    house: House, tmp_path: Path, how: str
) -> None:
    box = house.box("kept")
    run = box.submit_py("demo", COUNTING, str(tmp_path / "go"))
    ending = box.submit_py("other", COUNTING, str(tmp_path / "end"))
    watch = Watch(box, "demo")
    watch.wait_chunks(3)
    (row,) = house.sql(LEASE_SESSION)
    if how == "cut":
        house.sql("SELECT pg_terminate_backend($1, 60000)", row["pid"])
    else:  # the connection stays, and nothing comes over it; its lock stays, too
        os.kill(row["pid"], signal.SIGSTOP)
        try:
            wait_until(lambda: "runs go on" in box.log.read_text(), "it is noticed")
            seen = len(watch.chunks())
            watch.wait_chunks(seen + 3)
            (tmp_path / "end").touch()
            queued = box.popen("submit", "third", "--", "true")
        finally:
            os.kill(row["pid"], signal.SIGCONT)
        assert queued.wait(DEADLINE) == 0, queued.communicate()
    wait_until(lambda: "is held again" in box.log.read_text(), "it is held again")

    def another() -> bool:
        """A session that ends gives its locks back before it is out of the list."""
        found = [x["pid"] for x in house.sql(LEASE_SESSION)]
        return len(found) == 1 and found != [row["pid"]]

    wait_until(another, "by another session")
    for name in ("go", "end"):
        (tmp_path / name).touch()
    assert watch.wait() == 0
    _assert_counted(watch.text())
    for done in (run, ending):
        assert box.runctl("wait", done).strip() == "succeeded"
        assert box.show(done)["attempt"] == 1
    assert box.runctl("wait", box.submit("demo", "true")).strip() == "succeeded"
    assert box.term() == 0


@pytest.mark.parametrize("how", ["cut", "silent"])
def test_a_lost_lease_stops_all_runs(house: House, how: str) -> None:
    box = house.box("lost", NO_GRACE)
    run = box.submit_py(
        "demo",
        "import os, signal, time; signal.signal(15, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True); time.sleep(600)",
    )
    watch = Watch(box, "demo")
    watch.wait_chunks(1)
    pid = int(watch.text())
    (row,) = house.sql(
        "SELECT pid FROM pg_stat_activity"
        " WHERE application_name LIKE 'runctld pid %' AND datname = current_database()"
    )
    if how == "cut":
        house.sql("SELECT pg_terminate_backend($1, 60000)", row["pid"])
    else:  # the connection stays, and nothing comes over it
        os.kill(row["pid"], signal.SIGSTOP)
    try:
        assert "lost" in _exit(box, 75)
    finally:
        if how == "silent":
            os.kill(row["pid"], signal.SIGCONT)
    wait_until(lambda: not alive(pid), "the run has ended")
    box.start()
    wait_until(lambda: box.show(run)["attempt"] == 2, "replayed")


def test_postgres_away_for_a_while(house: House, tmp_path: Path) -> None:
    server = Postgres()
    try:
        server.start()
        house.url = server.database()
        house.postgres = server
        box = house.box("away", NO_GRACE, start=False)
        box.config.write_text(f"start_timeout = '10m'\n{box.config.read_text()}")
        box.start()
        box.submit_py("demo", TEN)
        watch = Watch(box, "demo")
        _wait_said(watch)
        server.stop()
        assert "lost" in _exit(box, 75)
        box.start(ready=False)
        time.sleep(1)
        server.start()
        assert watch.wait() == 0
        _assert_one_clean_reply(watch.text())
    finally:
        server.close()


def test_one_order_over_executors(house: House, tmp_path: Path) -> None:
    boxes = [house.box(name, "[queue]\nmax_running = 1\n") for name in ("a", "b", "c")]
    noted = tmp_path / "journal"
    code = NOTE + 'note("begin"); time.sleep(0.05); note("end")'

    def ask(box: Box, thread: str, n: int) -> str:
        request = messages.Submit(
            thread, None, None, None, [sys.executable, "-c", code, str(noted)]
        )
        reply = house.ask(f"runctl.ctl.id-{box.name}.submit", request)
        assert isinstance(reply, messages.Submitted)
        return reply.run

    def client(thread: str) -> list[str]:
        return [ask(boxes[n % 3], thread, n) for n in range(12)]

    with ThreadPoolExecutor(6) as pool:
        # Work beside it, so that a lane's next run is not always its last one's executor's.
        list(pool.map(lambda n: ask(boxes[n % 3], f"side-{n}", n), range(40)))
        one = [pool.submit(client, "lane") for _ in range(2)]
        other = pool.submit(client, "other")
        orders, rest = [job.result() for job in one], other.result()
    runs = [run for order in orders for run in order]
    for run in [runs[-1], runs[11], rest[-1]]:
        boxes[0].runctl("wait", run)
    lines = journal(noted)
    ran = assert_no_overlap([line for line in lines if line[0] == "lane"])
    assert sorted(ran) == sorted(runs)
    for order in orders:  # what a client submitted, each through another executor
        assert [run for run in ran if run in order] == order
    assert assert_no_overlap([line for line in lines if line[0] == "other"]) == rest
    rows = boxes[0].json("list", "lane") + boxes[0].json("list", "other")
    used = {row["executor"] for row in rows}
    assert len(used) > 1, "one executor ran them all: nothing was tested"


STUBBORN = (
    NOTE
    + """
import signal
def stop(*_):
    while not os.path.exists(sys.argv[2]): time.sleep(0.02)
    note("end")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
note("begin"); print("up", flush=True)
while True: time.sleep(1)
"""
)


def _owned_by(box: Box, thread: str, *args: str) -> tuple[str, Watch]:
    """A run that ``box`` executes, as the only executor so far."""
    run = box.submit_py(thread, *args)
    watch = Watch(box, thread, "--run", run)
    watch.wait_chunks(1)
    return run, watch


def test_an_abort_reaches_the_owner_and_its_thread_waits(house: House, tmp_path: Path) -> None:
    # Full until the aborted run's processes are gone: the next run is for b.
    a = house.box("a", "[queue]\nmax_running = 1\nstop_grace = '50s'\n")
    noted, gate = tmp_path / "journal", tmp_path / "gate"
    run, watch = _owned_by(a, "demo", STUBBORN, str(noted), str(gate))
    b = house.box("b")
    following = b.submit_py("demo", NOTE + 'note("begin"); note("end")', str(noted))
    claimed = "SELECT 1 FROM dbos.workflow_status WHERE workflow_uuid = $1 AND status = 'PENDING'"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(house.ask, "runctl.ctl.id-b.abort", messages.Abort("demo", run))
        try:
            wait_until(lambda: house.sql(claimed, following), "the next run is claimed")
        finally:
            gate.touch()
        reply = answer.result()
    assert isinstance(reply, messages.Aborted), reply
    assert reply.runs == [run]
    assert watch.wait() == 5
    assert b.runctl("wait", following).strip() == "succeeded"
    assert assert_no_overlap(journal(noted)) == [run, following]
    assert journal(noted)[1][2] == "end", "the aborted run had its grace"
    assert (b.show(run)["status"], b.show(run)["executor"]) == ("aborted", "a")
    assert b.show(following)["executor"] == "b"


def test_the_abort_of_a_dead_owners_run_is_durable(house: House) -> None:
    a = house.box("a")
    run, watch = _owned_by(a, "demo", "import time; print('up', flush=True); time.sleep(99)")
    b = house.box("b")
    a.kill()

    def states() -> dict[str, str]:
        return {x["executor_id"]: x["state"] for x in b.json("status")["executors"]}

    # PostgreSQL is told, and lets go of its lease.
    wait_until(lambda: states() == {"a": "gone", "b": "up"}, "it is seen that a is gone")
    assert run in b.runctl("abort", "demo")
    assert watch.wait() == 5
    a.start()
    assert states() == {"a": "up", "b": "up"}
    assert (b.show(run)["status"], b.show(run)["attempt"]) == ("aborted", 1)
    assert b.runctl("wait", b.submit("demo", "true")).strip() == "succeeded"


CUT_LEASES = (
    "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
    " WHERE application_name LIKE 'runctld pid %: other' AND datname = current_database()"
)


CUTS = 60
#: A session that wants the lease of "other" asks who has it, once it was refused.
REFUSED = (
    "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'runctld pid %: other'"
    " AND datname = current_database() AND query LIKE '%pg_locks%' AND query_start > $1"
)


async def _refused(house: House) -> None:
    """Returns when whoever wants the lease of "other" has been refused it from now on."""
    (now,) = await trio.to_thread.run_sync(house.sql, "SELECT now() AS at")
    with trio.fail_after(DEADLINE):
        while not await trio.to_thread.run_sync(house.sql, REFUSED, now["at"]):  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_acting_for_an_executor_excludes_its_life(house: House) -> None:
    config = Config(Path("/nowhere"), database=Database(house.url))
    async with trio_asyncio.open_loop():
        peer = Members(config, "peer")
        await peer.announce()
        async with hold_database_lease(config, "other"):
            assert await peer.alive("other")
            async with peer.in_place_of("other") as dead:
                assert not dead
        with trio.fail_after(DEADLINE):  # the server is told, and gives it back in its time
            while await peer.alive("other"):  # noqa: ASYNC110
                await trio.sleep(0.02)
        started = trio.Event()

        async def restart() -> None:
            async with hold_database_lease(config, "other"):
                started.set()

        async with trio.open_nursery() as nursery:
            async with peer.in_place_of("other") as dead:
                assert dead
                nursery.start_soon(restart)
                await _refused(house)
                assert not started.is_set()
                for _ in range(CUTS):  # it takes another, whatever it was about to ask
                    await trio.to_thread.run_sync(house.sql, CUT_LEASES)
                await _refused(house)
                assert not started.is_set()
            with trio.fail_after(DEADLINE):
                await started.wait()
        peer.close()


@pytest.mark.parametrize("what", ["lease", "members"])
async def test_a_connection_whose_end_confuses_asyncpg_has_broken(
    house: House, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """ "cannot switch to state 12; another operation (2) is in progress": it came once, of a
    session that was ended amid a statement, and ended the daemon with a traceback."""
    config = Config(Path("/nowhere"), database=Database(house.url))
    module = {"lease": lease_taking, "members": members}[what]
    prepare, times = module.prepare_tables, []

    async def confused(conn: Any, key: str) -> None:
        times.append(key)
        if len(times) == 1:
            raise asyncpg.InternalClientError("cannot switch to state 12")
        await prepare(conn, key)

    monkeypatch.setattr(module, "prepare_tables", confused)
    async with trio_asyncio.open_loop():
        if what == "lease":
            async with hold_database_lease(config, "confused"):
                assert len(times) == 2
            return
        peer = Members(config, "confused")
        try:
            await peer.announce()
            assert len(times) == 2
        finally:
            peer.close()


async def test_sessions_of_our_own_choose_their_isolation(house: House) -> None:
    """With that of a database one would not see what was stored while it waited for a lock."""
    name = house.url.rpartition("/")[2].partition("?")[0]
    for setting in ("isolation = 'serializable'", "deferrable = on"):
        text = f"ALTER DATABASE {name} SET default_transaction_{setting}"
        await trio.to_thread.run_sync(house.sql, text)
    config = Config(Path("/nowhere"), database=Database(house.url))
    async with trio_asyncio.open_loop(), connection(config, "ours") as ours:
        for setting, value in (("isolation", "read committed"), ("deferrable", "off")):
            shown = await aio(ours.fetchval)(f"SHOW transaction_{setting}")
            assert shown == value


def test_a_session_that_finds_no_descriptor_may_be_opened_later(house: House) -> None:
    """psycopg raises the machine's refusal as it is."""
    sessions = Sessions(Config(Path("/nowhere"), database=Database(house.url)), lambda: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 256), hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        os.close(taken.pop())  # for the socket; there is none for the selector
        with pytest.raises(sa.exc.OperationalError) as caught:
            sessions.engine.connect()
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert may_pass(caught.value)
    with sessions.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    sessions.close()


async def test_a_key_log_that_cannot_be_written_is_named(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", "/no/such/keys")
    words = (
        r"^SSLKEYLOGFILE: /no/such/keys cannot be written \(No such file or directory\): unset it$"
    )
    for query in ("sslmode=require", "sslmode=verify-full&sslrootcert=system"):
        config = Config(Path("/nowhere"), database=Database(f"{house.url}?{query}"))
        async with trio_asyncio.open_loop():
            with pytest.raises(ConfigError, match=words):
                await connect(config, "ours")


SETUP_LOCK = "hashtextextended('runctl executors', 0)"
CUT_PEERS = (
    "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE wait_event = 'advisory'"
    " AND application_name LIKE 'runctl-peer pid %' AND datname = current_database()"
)


async def test_an_announcement_that_breaks_off_is_made_again(house: House) -> None:
    config = Config(Path("/nowhere"), database=Database(house.url))
    async with trio_asyncio.open_loop(), connection(config, "holder") as holder:
        await aio(holder.execute)(f"SELECT pg_advisory_lock({SETUP_LOCK})")
        peer = Members(config, "peer")
        with trio.fail_after(DEADLINE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.announce)
                for _ in range(2):
                    while not await aio(holder.fetch)(CUT_PEERS):  # noqa: ASYNC110
                        await trio.sleep(0.02)
                await aio(holder.execute)(f"SELECT pg_advisory_unlock({SETUP_LOCK})")
        assert [member.id for member in await peer.all()] == ["peer"]
        peer.close()


TAKEOVER = "[takeover]\nenabled = true\nafter = '2s'\n[queue]\nmax_attempts = 50\n"


def test_takeover_of_an_executor_that_is_gone_for_good(house: House) -> None:
    a = house.box("a", TAKEOVER)
    run, _ = _owned_by(a, "demo", TEN)
    b = house.box("b", TAKEOVER)
    c = house.box("c", TAKEOVER.replace("after", "group = 'of its own'\nafter"))
    following = b.submit("demo", "echo", "next")
    watch = Watch(b, "demo", "--run", run)
    _wait_said(watch)
    a.kill()
    killed_at = time.monotonic()
    wait_until(lambda: sum(e["type"] == "reset" for e in list(watch.events)) == 2, "taken over")
    took = time.monotonic() - killed_at
    assert watch.wait() == 0
    _assert_one_clean_reply(watch.text())
    shown = b.ended(run)
    assert shown["attempt"] == 2
    assert shown["executor"] in ("b", "c")
    assert b.runctl("wait", following).strip() == "succeeded"
    assert_after(shown, b.show(following))
    assert "taken over" in b.log.read_text()
    assert "taken over" not in c.log.read_text(), "c is of another group"
    print(f"taken over after {took:.2f} s")


def test_sigterm_hands_over_at_once(house: House) -> None:
    a = house.box("a", TAKEOVER)
    run, _ = _owned_by(a, "demo", TEN)
    b = house.box("b", TAKEOVER)
    watch = Watch(b, "demo")
    _wait_said(watch)
    assert a.term() == 0
    assert watch.wait() == 0
    _assert_one_clean_reply(watch.text())
    assert (b.show(run)["executor"], b.show(run)["attempt"]) == ("b", 2)
    assert [x["executor_id"] for x in b.json("status")["executors"]] == ["b"]


@pytest.mark.nightly
def test_the_owner_returns_while_it_is_taken_over(house: House, tmp_path: Path) -> None:
    a, b = house.box("a", TAKEOVER), house.box("b", TAKEOVER)
    noted = tmp_path / "journal"
    # It ends after its executor's death alone: else it may have ended by then and be unrecorded,
    # and would end twice.
    code = NOTE + 'note("begin")\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.02)\n'
    code += 'time.sleep(0.5); note("end")'
    owned = 0
    # The restart takes its lease after about 0.6 s, the peer looks from 2 s on.
    for delay in (1.25, 1.4, 1.55, 1.7, 2.0):
        begun = len(journal(noted))
        gate = tmp_path / f"gate-{delay}"
        command = [sys.executable, "-c", code, str(noted), str(gate)]
        runs = []
        for n in range(3):
            reply = house.ask("runctl.ctl.id-a.submit", messages.Submit(f"t{n}", argv=command))
            assert isinstance(reply, messages.Submitted)
            runs.append(reply.run)
        wait_until(lambda begun=begun: len(journal(noted)) >= begun + 3, "all have begun")
        owned += sum(house.bus.run(run).executor == "a" for run in runs)
        a.kill()
        time.sleep(delay)
        a.start()
        gate.touch()
        for n, run in enumerate(runs):
            assert house.bus.wait_end(f"t{n}", run).outcome.status == "succeeded"
    lines = journal(noted)
    for n in range(3):
        assert_no_overlap([line for line in lines if line[0] == f"t{n}"])
    ends = ended(lines)
    assert len(ends) == len(set(ends)) == 15, "each run ended once"
    assert owned > 5, "hardly a run was cut: nothing was tested"
    taken = b.log.read_text().count("taken over")
    print(f"{owned} of 15 were cut, {taken} of 5 deaths were taken over")


def _certificate(path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    cert, key = path / "server.crt", path / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_settings_hold_on_every_connection(house: House, tmp_path: Path) -> None:
    cert, key = _certificate(tmp_path)
    front = TlsFront(house.postgres, cert, key)
    try:
        base = house.url.replace(f":{house.postgres.port}/", f":{front.port}/")
        box = house.box("tls", url=f"{base}?sslmode=verify-full&sslrootcert={cert}")
        box.runctl("wait", box.submit("t", "true"))
        assert front.sessions >= 2, "DBOS's and the lease's"
        assert front.dropped == 0, "a connection did without TLS"
        for query in ("sslmode=verify-full", "sslmode=verify-full&sslrootcert=system"):
            other = house.box("other", url=f"{base}?{query}", start=False)
            other.start(ready=False)
            line = _exit(other, 78)
            assert "certificate" in line, line
    finally:
        house.close()
        front.close()
