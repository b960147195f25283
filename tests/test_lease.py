"""The lease of an executor ID while PostgreSQL, or the way to it, is away: what goes on, what
ends, and that nobody acts in the place of a daemon that goes on."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio_asyncio
from conftest import DEADLINE, Watch, wait_until
from house import NOTE, House, assert_no_overlap, journal, own_house
from msgspec.structs import replace
from proc import alive, find_keeper
from proxy import Proxy
from runctl.config.schema import Config, Database
from runctl.config.schema import Takeover as TakeoverSettings
from runctl.protocol import messages
from runctl.protocol.errors import LeaseLost, Unavailable
from runctl.supervisor.cluster.lease_taking import hold_database_lease
from runctl.supervisor.cluster.members import Members
from runctl.supervisor.host.postgres import connect
from runctl.supervisor.peers import takeover

#: Notes that it lives, and counts on stdout, until the file argv[2] exists.
WORK = (
    NOTE
    + """
note("begin")
n = 0
while not os.path.exists(sys.argv[2]):
    n += 1
    print(n, flush=True)
    note("alive")
    time.sleep(0.02)
note("end")
"""
)

DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
CUT_LEASES = (
    "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
    " WHERE application_name LIKE 'runctld pid %: other' AND datname = current_database()"
)


def assert_counted(watch: Watch) -> None:
    assert watch.wait() == 0
    assert sum(event["type"] == "reset" for event in watch.events) == 1
    numbers = watch.text().split()
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]


def settings(grace: str, more: str = "") -> str:
    return f"[queue]\nlease_grace = '{grace}'\nmax_attempts = 50\n{more}"


@pytest.fixture
def home(tmp_path: Path, nats_server: str) -> Iterator[House]:
    with own_house(tmp_path, nats_server) as house:
        yield house


@pytest.mark.nightly
def test_no_takeover_of_who_is_about_to_come_back(home: House, tmp_path: Path) -> None:
    """After a restart of PostgreSQL nobody has a lease; all of them were seen to be gone."""
    taking = "[takeover]\nenabled = true\nafter = '70s'\n"
    boxes = [home.box(name, settings("60s", taking)) for name in "abc"]
    noted, go = tmp_path / "journal", tmp_path / "go"
    argv = [sys.executable, "-c", WORK, str(noted), str(go)]
    runs = {f"t{n}": home.bus.submit(f"t{n}", argv) for n in range(4)}
    watches = [Watch(boxes[0], thread) for thread in runs]
    for watch in watches:
        watch.wait_chunks(1)
    for times in (1, 2):
        home.postgres.stop()
        for box in boxes:
            wait_until(lambda b=box, n=times: b.log.read_text().count("runs go on") == n, "away")
        home.postgres.start()
        for box in boxes:
            wait_until(lambda b=box, n=times: b.log.read_text().count("held again") == n, "back")
    go.touch()
    for watch in watches:
        assert_counted(watch)
    assert not any("taken over" in box.log.read_text() for box in boxes)
    assert all(box.daemon is not None and box.daemon.poll() is None for box in boxes)


async def test_a_restart_of_the_database_makes_nobody_overdue(
    home: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has been gone for long is seen to be gone anew: nobody has a lease at that moment."""
    monkeypatch.setattr(takeover, "TREES_GONE", 0.0)
    given = TakeoverSettings(enabled=True, after=0.5)
    config = Config(Path("/nowhere"), database=Database(home.url), takeover=given)
    hasty = replace(config, queue=replace(config.queue, lease_grace=0.0))

    async def tell() -> None:
        pass

    async with trio_asyncio.open_loop():
        peer, gone, away = Members(config, "peer"), Members(hasty, "gone"), Members(config, "away")
        for one in (peer, gone, away):
            await one.announce()
            if one is not peer:
                one.close()
        looks = takeover.Takeover(config, "peer", peer, cast("Any", None), tell)
        assert await looks._overdue() == []
        with trio.fail_after(DEADLINE):
            while not (overdue := await looks._overdue()):  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert overdue == ["gone"], "the other goes on without its lease for a while"
        await trio.to_thread.run_sync(home.postgres.stop)
        with pytest.raises(Unavailable):
            await looks._overdue()
        await trio.to_thread.run_sync(home.postgres.start)
        assert await looks._overdue() == []
        peer.close()


@pytest.mark.parametrize(
    "there", [pytest.param(True, marks=pytest.mark.nightly), False], ids=["back", "away"]
)
def test_a_paused_daemon_misses_a_restart_of_the_database(
    home: House, tmp_path: Path, there: bool
) -> None:
    """Continued, it has no lease, and more than its grace has gone by: it asks once."""
    box = home.box("paused", settings("2s"))
    go = tmp_path / "go"
    run = box.submit_py("t", WORK, str(tmp_path / "journal"), str(go))
    watch = Watch(box, "t")
    watch.wait_chunks(3)
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGSTOP)
    home.postgres.stop()
    if there:
        home.postgres.start()
    time.sleep(3)
    box.daemon.send_signal(signal.SIGCONT)
    if there:
        seen = len(watch.chunks())
        watch.wait_chunks(seen + 10)
        go.touch()
        assert_counted(watch)
        assert box.show(run)["attempt"] == 1
    else:
        assert box.daemon.wait(DEADLINE) == 75
        assert "the connection to PostgreSQL broke" in box.log.read_text().splitlines()[-1]
        home.postgres.start()


@pytest.mark.parametrize("takeover", [False, True])
def test_it_can_be_stopped_in_order_meanwhile(home: House, tmp_path: Path, takeover: bool) -> None:
    taking = "[takeover]\nenabled = true\nafter = '70s'\n" if takeover else ""
    box = home.box("stopped", settings("60s", "outlive = '30s'\n" + taking))
    keeper = find_keeper(box.pid)
    running = box.submit("t", "sleep", "600")
    ending = box.submit_py("u", WORK, str(tmp_path / "journal"), str(tmp_path / "go"))
    Watch(box, "u").wait_chunks(1)
    wait_until(lambda: box.show(running)["status"] == "running", "it runs")
    home.postgres.stop()
    (tmp_path / "go").touch()
    wait_until(lambda: "run succeeded" in box.log.read_text(), "its outcome waits")
    assert box.daemon is not None
    box.daemon.send_signal(signal.SIGTERM)
    assert box.daemon.wait(DEADLINE) == 0  # 75, if it had waited for its grace to be over
    assert not alive(keeper), "as if another daemon were to come"
    assert "Traceback" not in box.log.read_text()
    home.postgres.start()
    box.start()
    wait_until(lambda: box.show(running)["attempt"] == 2, "replayed")
    assert box.runctl("wait", ending).strip() == "succeeded"


@pytest.mark.long
@pytest.mark.nightly
def test_what_is_asked_meanwhile_is_answered(home: House) -> None:
    """In words, within seconds; what reads or writes is served once it is back."""
    box = home.box("asked", settings("60s"))
    run = box.submit("t", "sleep", "600")
    wait_until(lambda: box.show(run)["status"] == "running", "it runs")
    home.postgres.stop()
    for request in (messages.Submit("t", argv=["true"]), messages.Abort("t", run)):
        (reply,) = box.ask(request)
        assert isinstance(reply, messages.Problem), reply
        assert "database" in reply.message or "PostgreSQL" in reply.message
    home.postgres.start()
    assert run in box.runctl("abort", "t")
    assert box.runctl("wait", box.submit("t", "true")).strip() == "succeeded"


@pytest.mark.long
@pytest.mark.parametrize("heals", [pytest.param(True, marks=pytest.mark.nightly), False])
@pytest.mark.nightly
def test_a_second_daemon_of_an_id_waits_for_the_first(
    home: House, tmp_path: Path, heals: bool
) -> None:
    """The first has lost its way to PostgreSQL, and goes on; the second has another state
    directory, as a pod that is replaced, and takes the lease at once. The first ends at once
    when it finds that, though a run has a long stop grace, and an outcome waits to be stored."""
    noted, go = tmp_path / "journal", tmp_path / "go"
    way = Proxy(home.postgres.port)
    url = home.url.replace(f":{home.postgres.port}/", f":{way.port}/")
    try:
        first = home.box(
            "same", settings("60s" if heals else "4s", "stop_grace = '50s'\n"), url=url
        )
        run = first.submit_py("t", DEAF + WORK, str(noted), str(go))
        watch = Watch(first, "t")
        watch.wait_chunks(3)
        other = first.submit_py("u", WORK, str(tmp_path / "other"), str(tmp_path / "over"))
        wait_until(lambda: journal(tmp_path / "other"), "another runs")
        way.cut()
        way.partition()
        wait_until(lambda: "runs go on" in first.log.read_text(), "the first goes on")
        (tmp_path / "over").touch()
        if heals:
            wait_until(lambda: "run succeeded" in first.log.read_text(), "an outcome waits")
        second = home.box("same", settings("4s"), start=False)
        second.start(ready=False)
        wait_until(
            lambda: "waiting until the daemon there" in second.log.read_text(), "the second waits"
        )
        if heals:
            seen = len(watch.chunks())
            watch.wait_chunks(seen + 3)
            way.heal()
        assert first.daemon is not None
        assert first.daemon.wait(DEADLINE) == 75
        said = first.log.read_text().splitlines()[-1]
        assert ("another has taken it" if heals else "broke") in said
        wait_until(lambda: b"ready: " in second.log.read_bytes(), "the second begins")
        wait_until(lambda: second.show(run)["attempt"] == 2, "replayed")
        go.touch()
        for each in (run, other):
            assert second.runctl("wait", each).strip() == "succeeded"
        assert assert_no_overlap(journal(noted)) == [run, run]
        assert second.term() == 0
        third = home.box("same", settings("4s"))  # the second ended in order: nobody is waited for
        assert "waiting until" not in third.log.read_text()
    finally:
        home.close()
        way.close()


@pytest.mark.long
@pytest.mark.nightly
def test_an_abort_waits_for_an_owner_that_may_go_on(home: House, tmp_path: Path) -> None:
    """Its lease is free, it has lost its way to PostgreSQL and to NATS: it ends soon, and only
    then the abort is answered."""
    noted, go = tmp_path / "journal", tmp_path / "go"
    to_postgres, to_nats = Proxy(home.postgres.port), Proxy(int(home.nats.rpartition(":")[2]))
    url = home.url.replace(f":{home.postgres.port}/", f":{to_postgres.port}/")
    try:
        a = home.box("a", settings("60s"), url=url, nats=to_nats.url)
        run = a.submit_py("t", WORK, str(noted), str(go))
        wait_until(lambda: journal(noted), "it runs")
        b = home.box("b", settings("60s"))
        for way in (to_postgres, to_nats):
            way.partition()
            way.forget()
        assert run in b.runctl("abort", "t")
        answered = time.monotonic()
        assert a.daemon is not None
        assert a.daemon.wait(DEADLINE) == 75
        assert "NATS does not answer either" in a.log.read_text().splitlines()[-1]
        assert all(float(line[4]) < answered for line in journal(noted)), "it ran on"
        assert b.show(run)["status"] == "aborted"
    finally:
        home.close()
        to_postgres.close()
        to_nats.close()


@pytest.mark.parametrize("over", [False, True])
async def test_who_was_replaced_is_told_so_in_no_group(house: House, over: bool) -> None:
    """What ends the process at once looks for that error. ``over``: the other has let go."""
    config = Config(Path("/nowhere"), database=Database(house.url))
    async with trio_asyncio.open_loop():
        peer = Members(config, "peer")
        await peer.announce()
        async with hold_database_lease(config, "other") as lease:
            cut = await trio.to_thread.run_sync(house.sql, CUT_LEASES)
            assert len(cut) == 1
            async with AsyncExitStack() as stack:
                assert await stack.enter_async_context(peer.in_place_of("other"))
                if over:
                    await stack.aclose()
                with trio.fail_after(DEADLINE), pytest.raises(LeaseLost, match="another has taken"):
                    await lease.watch()
        peer.close()


async def test_a_socket_that_is_not_there_is_a_server_that_is_away(home: House) -> None:
    """Neither a start nor what asks for the other executors takes it for a wrong URL."""
    server = home.postgres
    name = home.url.rpartition("/")[2]
    url = f"postgresql://postgres@/{name}?host={server.data}&port={server.port}"
    config = Config(Path("/nowhere"), database=Database(url))

    async def start() -> None:
        await trio.to_thread.run_sync(server.start)

    async with trio_asyncio.open_loop():
        server.stop()
        with pytest.raises(Unavailable):
            await connect(config, "x", patience=0.5)
        await start()
        peer = Members(config, "peer")
        await peer.announce()
        server.stop()
        with pytest.raises(Unavailable):
            await peer.all()
        hba = server.data / "pg_hba.conf"
        rules = hba.read_text()
        hba.write_text("local all all reject\nhost all all all trust\n")
        await start()
        with pytest.raises(Unavailable, match="refuses"):
            await peer.all()
        server.stop()
        hba.write_text(rules)
        await start()
        assert [member.id for member in await peer.all()] == ["peer"]
        peer.close()
