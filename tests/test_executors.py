"""Three executors, a PostgreSQL, and NATS as one server or a cluster of three, while parts
of it die: nothing is lost, nothing is doubled, and threads go on by themselves.

RUNCTL_LONG=1 runs the long versions: 50 races between an owner and a takeover rather
than 5, PostgreSQL away for 20 s rather than 8, more threads in the scale test.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nats
import pytest
import trio_asyncio
from conftest import NIGHT, SLACK, Box, Watch, wait_until
from house import (
    ALIVE,
    HELD,
    House,
    Unit,
    assert_no_overlap,
    ended,
    journal,
    own_house,
    stored_reply,
)
from natsserver import Cluster, Node
from netns import HERE, NETWORK, Namespaces, why_not
from pgserver import Postgres
from proxy import Proxy
from runctl.config.schema import Config, Nats
from runctl.protocol import records, subjects
from runctl.supervisor.output.backpressure import Backpressure
from runctl.supervisor.output.publisher import Streams

pytestmark = pytest.mark.long
NIGHTLY = pytest.mark.nightly
LONG = NIGHT
RACES = 50 if LONG else 3
#: Longer than the silence after which a lease counts as lost (``lease.PROBE_LIMIT``).
POSTGRES_AWAY = 20.0 if LONG else 8.0
SCALE = 1000 if LONG else 200

QUEUE = "[queue]\nmax_attempts = 100\nstop_grace = '1s'\n"
TAKEOVER = f"[takeover]\nenabled = true\nafter = '2s'\n{QUEUE}"

#: argv: how many chunks, the pause between them, where the first attempt stays (or nothing).
COUNT = """
import os, sys, time
stays = sys.argv[3:] if os.environ["RUNCTL_ATTEMPT"] == "1" else []
for i in range(1, int(sys.argv[1]) + 1):
    print(f"chunk-{i} ", flush=True)
    time.sleep(600 if stays == [str(i)] else float(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def wide(tmp_path: Path, postgres: Postgres, cluster: Cluster) -> Iterator[House]:
    """Executors whose NATS is the cluster."""
    made = House(tmp_path, postgres, cluster.url)
    try:
        yield made
    finally:
        made.close()


def _three(house: House, more: str = QUEUE) -> list[Box]:
    with ThreadPoolExecutor(3) as pool:
        boxes = [house.box(name, more, start=False) for name in ("a", "b", "c")]
        list(pool.map(Box.start, boxes))
    return boxes


def _counted(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^chunk-(\d+) $", text, re.M)]


def _python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-u", "-c", code, *map(str, args)]


def _owner(house: House, boxes: list[Box], run: str) -> Box:
    """Who executes it, once somebody does."""
    name = wait_until(lambda: house.bus.run(run).executor, "the run was claimed")
    return next(box for box in boxes if box.name == name)


def _assert_whole(watch: Watch, upto: int, code: int = 0) -> None:
    """The watcher ends with ``code``, and saw one reply from its first chunk to its end."""
    assert watch.wait() == code
    assert _counted(watch.text()) == list(range(1, upto + 1))
    assert sum(event["type"] == "end" for event in watch.events) == 1
    assert not [event for event in watch.events if event["type"] == "gap"]
    seqs = [event["seq"] for event in watch.final() if event["type"] == "chunk"]
    assert seqs == list(range(1, len(seqs) + 1))


def _wait_counted(watch: Watch, count: int) -> None:
    """Until it has shown so many lines, which may have come in fewer chunks."""
    wait_until(lambda: len(_counted(watch.text())) >= count, f"{count} lines seen")


def _leader(cluster: Cluster, house: House) -> Node:
    def found() -> Node | None:
        try:
            return cluster.leader(house.bus)
        except Exception:  # none for the moment, or it does not answer in time
            return None

    node = wait_until(found, "the stream has a leader")
    assert isinstance(node, Node)
    return node


class Load:
    """Threads with work that notes down when it lives, ``each`` runs on every thread. ``life``:
    seconds, or until that file is there."""

    def __init__(self, house: House, threads: int, each: int, life: float | Path) -> None:
        self._house = house
        self.path = house.path / f"journal-{time.monotonic_ns()}"
        argv = _python(HELD if isinstance(life, Path) else ALIVE, self.path, life)
        self.runs = {
            f"{self.path.name}-{n}": [
                house.bus.submit(f"{self.path.name}-{n}", argv) for _ in range(each)
            ]
            for n in range(threads)
        }

    def begun(self) -> list[str]:
        """The attempts that have begun, by their runs."""
        return [run for _, run, what, *_ in journal(self.path) if what == "begin"]

    def wait_begun(self, count: int) -> None:
        wait_until(lambda: len(self.begun()) >= count, f"{count} have begun")

    def assert_once(self, deadline: float = 60) -> int:
        """Every run has ended well, in its order, alone on its thread, with one reply
        stored. How many attempts there were."""
        bus = self._house.bus
        for thread, runs in self.runs.items():
            for run in runs:
                end = bus.wait_end(thread, run, deadline)
                assert end.outcome.status == "succeeded", end
                text = stored_reply(bus.records(thread, run))
                assert _counted(text) == list(range(1, 11)), text
        wait_until(
            lambda: all(
                bus.run(run).status == "succeeded" for runs in self.runs.values() for run in runs
            ),
            "the database knows it",
        )
        lines = journal(self.path)
        for thread, runs in self.runs.items():
            own = [line for line in lines if line[0] == thread]
            assert list(dict.fromkeys(assert_no_overlap(own))) == runs, "the order submitted"
        return sum(line[2] == "begin" for line in lines)


# ---- watching, and the owner's death ---------------------------------------------------


def test_attach_from_every_machine(wide: House) -> None:
    boxes = _three(wide, f"replicas = 3\n{QUEUE}")
    a, b, c = boxes
    run = wide.bus.submit("demo", _python(COUNT, 40, 0.05), "a")
    watches = [Watch(box, "demo", "--run", run) for box in boxes]
    for watch in watches:
        _assert_whole(watch, 40)
    late = [Watch(box, "demo", "--run", run) for box in (b, c, b)]
    for watch in late:
        _assert_whole(watch, 40)
    one = [event for event in watches[0].events if event["type"] in ("reset", "chunk", "end")]
    for watch in [*watches, *late]:
        same = [event for event in watch.events if event["type"] in ("reset", "chunk", "end")]
        assert same == one, "the same, on every machine and after the end"
    assert a.show(run)["executor"] in ("a", "b", "c")


@pytest.mark.parametrize("how", ["kill", "term"])
def test_the_owner_is_restarted(house: House, how: str) -> None:
    boxes = _three(house)
    run = house.bus.submit("demo", _python(COUNT, 30, 0.02, 10))
    owner = _owner(house, boxes, run)
    watches = [Watch(box, "demo", "--run", run) for box in boxes if box is not owner]
    for watch in watches:
        _wait_counted(watch, 3)
    if how == "kill":
        owner.kill()
    else:
        assert owner.term() == 0
    at = time.monotonic()
    owner.start()
    _print_first_chunk(watches[0], at, f"{how}, restarted")
    for watch in [*watches, Watch(owner, "demo", "--run", run)]:
        _assert_whole(watch, 30)
    assert house.bus.run(run).attempt == 2


@pytest.mark.nightly
def test_the_owner_never_comes_back(house: House) -> None:
    boxes = _three(house, TAKEOVER)
    run = house.bus.submit("demo", _python(COUNT, 30, 0.02, 10))
    following = house.bus.submit("demo", _python(COUNT, 1, 0))
    owner = _owner(house, boxes, run)
    watches = [Watch(box, "demo", "--run", run) for box in boxes if box is not owner]
    for watch in watches:
        _wait_counted(watch, 3)
    owner.kill()
    _print_first_chunk(watches[0], time.monotonic(), "kill, taken over after 2 s")
    for watch in watches:
        _assert_whole(watch, 30)
    assert house.bus.run(run).executor != owner.name
    house.bus.wait_end("demo", following)


def _print_first_chunk(watch: Watch, since: float, what: str) -> None:
    def replayed() -> bool:
        events = list(watch.events)
        resets = [i for i, event in enumerate(events) if event["type"] == "reset"]
        return len(resets) > 1 and any(e["type"] == "chunk" for e in events[resets[-1] :])

    wait_until(replayed, "the first replayed chunk")
    print(f"{what}: first replayed chunk after {time.monotonic() - since:.2f} s")


@pytest.mark.parametrize(
    "settings",
    [pytest.param(QUEUE, id="alone", marks=NIGHTLY), pytest.param(TAKEOVER, id="takeover")],
)
@pytest.mark.nightly
def test_rollout_churn(wide: House, settings: str) -> None:
    boxes = _three(wide, f"replicas = 3\n{settings}")
    run = wide.bus.submit("demo", _python(COUNT, 180, 0.03))
    wait_until(lambda: wide.bus.tail("demo", run), "it has begun")
    watches = [Watch(box, "demo", "--run", run) for box in boxes]
    watches[0].wait_chunks(1)
    cut, first = 0, boxes.index(_owner(wide, boxes, run))
    for box in (boxes[first:] + boxes[:first]) * 2:  # the owner before the run can end
        cut += wide.bus.run(run).executor == box.name
        box.kill()
        box.start()
        watches.append(Watch(box, "demo", "--run", run))
    wide.bus.wait_end("demo", run)
    watches.append(Watch(boxes[1], "demo", "--run", run))
    for watch in watches:
        _assert_whole(watch, 180)
    assert cut, "no kill met the owner: nothing was tested"
    assert wide.bus.run(run).status == "succeeded"


# ---- owner and takeover race ------------------------------------------------------------


@pytest.mark.nightly
def test_owner_and_takeover_race(house: House) -> None:
    """The delay of the restart feels its way to where both take the lease at once."""
    boxes = _three(house, TAKEOVER)
    delay, won = 2.7, Counter[str]()
    for race in range(RACES):
        go = house.path / f"go-{race}"
        load = Load(house, 4, 1, go)
        load.wait_begun(4)
        owner = _owner(house, boxes, next(iter(load.runs.values()))[0])
        before = _takeovers(boxes)
        owner.kill()
        time.sleep(delay)
        owner.start()
        wait_until(lambda load=load: len(load.begun()) > 4, "one was begun again")
        go.touch()
        assert load.assert_once() > 4
        assert len(ended(journal(load.path))) == 4, "each was finished once"
        taken = _takeovers(boxes) > before
        won["takeover" if taken else "owner"] += 1
        delay += -0.05 if taken else 0.05
    print(f"{RACES} races, won by {dict(won)}; the last delay {delay:.2f} s")


@NIGHTLY
def test_adoption_and_takeover_race(house: House) -> None:
    """As above, of what outlives its daemon: the delay feels its way to where the keeper has just
    ended it. Each run has one outcome: it goes on as it was, or is begun again by one executor."""
    boxes = _three(house, TAKEOVER.replace("[queue]\n", "[queue]\noutlive = '3s'\n"))
    delay, won = 2.8, Counter[str]()
    for race in range(RACES):
        go = house.path / f"go-{race}"
        load = Load(house, 4, 1, go)
        load.wait_begun(4)
        runs = [runs[0] for runs in load.runs.values()]
        owner = _owner(house, boxes, runs[0])
        own = [run for run in runs if house.bus.run(run).executor == owner.name]
        owner.kill()
        time.sleep(delay)
        owner.start()

        def are_settled(own: list[str] = own, name: str = owner.name) -> bool:
            shown = [house.bus.run(run, name) for run in own]
            return all(
                run.status == "running" and (run.attempt > 1 or run.adopted_at) for run in shown
            )

        wait_until(are_settled, "each goes on, or was begun again")
        adopted = [house.bus.run(run).attempt == 1 for run in own]
        assert len(set(adopted)) == 1, "they went on, or ended, together"
        go.touch()
        assert load.assert_once() == 4 + (0 if adopted[0] else len(own))
        assert len(ended(journal(load.path))) == 4, "each was finished once"
        won["adopted" if adopted[0] else "begun again"] += 1
        delay += 0.05 if adopted[0] else -0.05
    print(f"{RACES} races: {dict(won)}; the last delay {delay:.2f} s")
    assert len(won) == 2, "the race was met"


def _takeovers(boxes: list[Box]) -> int:
    return sum(len(re.findall(r": [1-9]\d* runs taken over", b.log.read_text())) for b in boxes)


# ---- parts of the ground are lost -------------------------------------------------------


@pytest.mark.parametrize("which", [pytest.param("a follower", marks=NIGHTLY), "the leader"])
@pytest.mark.nightly
def test_a_nats_node_is_lost(wide: House, cluster: Cluster, which: str) -> None:
    boxes = _three(wide, f"replicas = 3\n{QUEUE}")
    cluster.wait_whole(wide.bus)
    load = Load(wide, 6, 2, 3.0)
    load.wait_begun(6)
    watches = [
        Watch(box, thread, "--run", runs[0])
        for box, (thread, runs) in zip(boxes * 2, load.runs.items(), strict=True)
    ]
    for watch in watches:
        watch.wait_chunks(1)
    leader = _leader(cluster, wide)
    others = [node for node in cluster.nodes if node is not leader]
    node = leader if which == "the leader" else others[0]
    node.kill()
    try:
        assert load.assert_once() == 12, "no run was begun twice"
        for watch in watches:
            _assert_whole(watch, 10)
    finally:
        node.start()
    cluster.wait_whole(wide.bus)
    wide.bus.wait_end("after", wide.bus.submit("after", ["true"]))


def test_postgres_is_away(tmp_path: Path, nats_server: str) -> None:
    with own_house(tmp_path, nats_server) as house:
        boxes = _three(house, TAKEOVER)
        units = [house.unit(box) for box in boxes]
        goes_on = tmp_path / "goes-on"
        load = Load(house, 6, 2, goes_on)
        load.wait_begun(6)
        house.postgres.stop()
        stopped = time.monotonic()
        time.sleep(POSTGRES_AWAY)
        back = time.monotonic()  # from here on it may answer
        house.postgres.start()
        goes_on.touch()
        given_up = stopped + min(3 * SLACK, POSTGRES_AWAY - 2)
        begun = load.assert_once(90)
        assert begun > 12, "no run was cut: nothing was tested"
        for line in journal(load.path):
            assert not given_up < float(line[4]) < back, "nothing runs without a lease"
        assert all(75 in unit.exits for unit in units)


@pytest.mark.parametrize(("threads", "away"), [(4, 0.0), pytest.param(25, 20.0, marks=NIGHTLY)])
@pytest.mark.nightly
def test_a_restart_of_postgres_interrupts_no_run(
    tmp_path: Path, nats_server: str, threads: int, away: float
) -> None:
    """Twice as many runs as threads: half of them end while it is away, and for ``away`` seconds
    more. Nothing is begun meanwhile."""
    ends, goes_on = tmp_path / "ends", tmp_path / "goes-on"
    with own_house(tmp_path, nats_server) as house:
        boxes = _three(house, f"{QUEUE}lease_grace = '5m'\n")
        units = [house.unit(box) for box in boxes]
        short, long = Load(house, threads, 2, ends), Load(house, threads, 2, goes_on)
        for load in (long, short):
            load.wait_begun(threads)
        watches = [
            Watch(box, next(iter(load.runs)), "--run", next(iter(load.runs.values()))[0])
            for box, load in zip(boxes, (long, short, long), strict=True)
        ]
        for watch in watches:
            watch.wait_chunks(1)
        house.postgres.stop()
        for box in boxes:
            wait_until(lambda b=box: "runs go on" in b.log.read_text(), "it knows")
        ends.touch()
        for thread, (run, _) in short.runs.items():
            end = house.bus.wait_end(thread, run)
            assert end.outcome.status == "succeeded"
        _assert_whole(watches[1], 10)
        time.sleep(away)
        assert len(short.begun()) == len(long.begun()) == threads, "nothing is begun"
        assert len(ended(journal(short.path))) == threads
        house.postgres.start()
        goes_on.touch()
        for load in (long, short):
            assert load.assert_once(120) == 2 * threads, "a run was replayed"
        for watch in watches:
            _assert_whole(watch, 10)
            assert sum(event["type"] == "reset" for event in watch.events) == 1
        assert not any(unit.exits for unit in units)
        assert all("no run was touched" in box.log.read_text() for box in boxes)


def _hasten(box: Box) -> None:
    """Its next starts give up soon; the first one makes the tables, and may take long."""
    box.config.write_text(f'start_timeout = "3s"\n{box.config.read_text()}')


def _behind_proxies(house: House, settings: str) -> tuple[list[Box], Unit, Proxy, Proxy]:
    """Three executors; a's ways to NATS and to PostgreSQL are proxies."""
    to_nats = Proxy(int(house.nats.rpartition(":")[2]))
    to_postgres = Proxy(house.postgres.port)
    url = house.url.replace(f":{house.postgres.port}/", f":{to_postgres.port}/")
    a = house.box("a", settings, url=url, nats=to_nats.url, start=False)
    boxes = [a, house.box("b", settings, start=False), house.box("c", settings, start=False)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Box.start, boxes))
    _hasten(a)
    return boxes, house.unit(a), to_nats, to_postgres


@pytest.mark.nightly
def test_an_executor_is_cut_from_nats(house: House) -> None:
    boxes, unit, to_nats, to_postgres = _behind_proxies(house, TAKEOVER)
    try:
        load = Load(house, 9, 2, 2.0)
        load.wait_begun(9)
        threads = list(load.runs)
        watches = [Watch(boxes[1], t, "--run", load.runs[t][0]) for t in threads]
        for bad in (to_nats.partition, to_nats.cut, to_nats.half_close):
            bad()
            time.sleep(2.5)
            to_nats.heal()
        assert load.assert_once(90) == 18, "no run was begun twice"
        for watch in watches:
            _assert_whole(watch, 10)
        assert not unit.exits, "it held its lease all the while"
    finally:
        house.close()
        to_nats.close()
        to_postgres.close()


@NIGHTLY  # from NATS alone, and a pulled cable, are tested each time
def test_an_executor_is_cut_from_everything(house: House) -> None:
    boxes, unit, to_nats, to_postgres = _behind_proxies(house, TAKEOVER)
    try:
        goes_on = house.path / "goes-on"
        load = Load(house, 15, 2, goes_on)
        load.wait_begun(15)
        ours = [t for t, runs in load.runs.items() if house.bus.run(runs[0]).executor == "a"]
        watches = [Watch(boxes[1], thread, "--run", load.runs[thread][0]) for thread in ours]
        to_nats.partition()
        to_postgres.partition()
        wait_until(lambda: 75 in unit.exits, "it gave its lease up", 15)
        goes_on.touch()
        time.sleep(3)
        to_postgres.forget()  # what PostgreSQL's keepalives do after about 10 s
        to_nats.forget()
        assert load.assert_once(90) > 30 or not ours
        for watch in watches:
            _assert_whole(watch, 10)
        to_nats.heal()
        to_postgres.heal()
        wait_until(
            lambda: (
                {x["executor_id"]: x["state"] for x in boxes[1].json("status")["executors"]}
                == {"a": "up", "b": "up", "c": "up"}
            ),
            "it is back",
        )
        assert ours, "it had no run: nothing was tested"
    finally:
        house.close()
        to_nats.close()
        to_postgres.close()


@pytest.mark.nightly
def test_a_cable_is_pulled(tmp_path: Path) -> None:
    """As above with a network namespace for each executor: PostgreSQL's own keepalives
    find that one is gone, and later than the executor itself."""
    if reason := why_not():
        pytest.skip(reason)
    spaces = Namespaces(["a", "b", "c"])
    (tmp_path / "nats").mkdir()
    server, node = Postgres(HERE, NETWORK), Node(tmp_path / "nats", listen=HERE)
    # Until NATS finds that a client is gone, it sends it its share of all requests.
    node.configure('ping_interval: "1s"\nping_max: 2')
    house = None
    try:
        server.start()
        node.start()
        house = House(tmp_path, server, node.url)
        url = house.url.replace("127.0.0.1", HERE)
        boxes = [house.box(name, TAKEOVER, url=url, start=False) for name in ("a", "b", "c")]
        for box in boxes:
            box.prefix = spaces.prefix(box.name)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(Box.start, boxes))
        for box in boxes:
            _hasten(box)
        goes_on = tmp_path / "goes-on"
        load = Load(house, 9, 2, goes_on)
        load.wait_begun(9)
        owner = _owner(house, boxes, next(iter(load.runs.values()))[0])
        unit = house.unit(owner)
        other = next(box for box in boxes if box is not owner)
        watch = Watch(other, next(iter(load.runs)), "--run", next(iter(load.runs.values()))[0])
        spaces.pull(owner.name)
        began = time.monotonic()
        wait_until(lambda: 75 in unit.exits, "it gave its lease up", 15)
        print(f"pulled: the lease was given up after {time.monotonic() - began:.1f} s")
        wait_until(lambda: _takeovers(boxes), "its runs were taken over")
        print(f"pulled: taken over after {time.monotonic() - began:.1f} s")
        goes_on.touch()
        # By now NATS has noticed, too: every request has an answer.
        assert load.assert_once(90) > 18
        _assert_whole(watch, 10)
        spaces.plug(owner.name)
        wait_until(
            lambda: all(x["state"] == "up" for x in other.json("status")["executors"]), "it is back"
        )
    finally:
        if house is not None:
            house.close()
        node.close()
        server.close()
        spaces.close()


async def test_a_publish_that_nobody_takes(tmp_path: Path) -> None:
    """While a stream has no leader the server answers without a word."""
    node = Node(tmp_path)
    node.start()
    try:
        async with trio_asyncio.open_loop():
            client = await trio_asyncio.aio_as_trio(nats.connect)(node.url)
            streams = Streams(client, Backpressure())
            await streams.open(Config(tmp_path, nats=Nats(node.url)))
            delete = client.jetstream().delete_stream
            await trio_asyncio.aio_as_trio(delete)(subjects.STREAM)
            assert await streams.publish("runctl.out.t.r", records.Reset("r", 1, 0.0), 0) is None
            await trio_asyncio.aio_as_trio(client.close)()
    finally:
        node.close()


# ---- many -------------------------------------------------------------------------------


@pytest.mark.nightly
def test_many_threads(house: House) -> None:
    boxes = _three(house, f"{QUEUE}max_running = 20\n")
    path = house.path / "journal"
    code = 'printf \'%s %s begin 0 0\\n\' "$RUNCTL_THREAD" "$RUNCTL_RUN" >> "$0"; sleep 0.05'
    with ThreadPoolExecutor(12) as pool:
        runs = list(
            pool.map(
                lambda n: house.bus.submit(f"t{n}", ["/bin/sh", "-c", code, str(path)]),
                range(SCALE),
            )
        )
    wait_until(lambda: len(journal(path)) >= SCALE, "all were begun", 120)
    for n, run in enumerate(runs):
        house.bus.wait_end(f"t{n}", run)
    assert sorted(line[1] for line in journal(path)) == sorted(runs), "each was begun once"
    rows = house.sql("SELECT executor_id, count(*) AS n FROM dbos.workflow_status GROUP BY 1")
    shares = {row["executor_id"]: row["n"] for row in rows}
    assert set(shares) == {box.name for box in boxes}, "one executor had nothing to do"
    print(f"{SCALE} threads: {shares}")
