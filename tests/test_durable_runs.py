"""A run's output as a Durable Stream, read in each way, from anywhere, through deaths."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from conftest import Box, wait_until
from durable import RunReader, follow_events, read
from gateways import Gateway, Place

STEPS = "import time\nfor n in range({count}):\n    print(n, flush=True); time.sleep({pause})"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with closing(Place(tmp_path_factory.mktemp("durable"))) as made:
        yield made


@pytest.fixture
def gateway(place: Place) -> Gateway:
    return place.gateway


def test_what_is_stored_is_read_from_anywhere(gateway: Gateway) -> None:
    run = gateway.submit("stored", "sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.02; done")
    gateway.read(run)
    path = f"/v1/runs/{run}/stream"
    whole = read(gateway, path)
    assert (whole.closed, whole.up_to_date) == (True, True)
    assert whole.headers["content-type"] == "application/json"
    reader = RunReader()
    for message in whole.messages:
        reader.hear(message)
    assert "".join(reader.chunks) == "1\n2\n3\n4\n5\n"
    assert reader.told[0] == "reset"
    assert reader.told[-1] == "end"
    again = read(gateway, path, whole.offset)
    assert (again.messages, again.closed, again.offset) == ([], True, whole.offset)
    # The places between: as a client has them that was there live.
    for chunk in range(len(reader.chunks) + 1):
        offset = f"{1:016d}_{chunk:016d}_{0:016d}"
        assert read(gateway, path, offset).messages == whole.messages[1 + chunk :]
        assert offset < whole.offset
        assert read(gateway, path, offset, "long-poll").messages == whole.messages[1 + chunk :]
        events = follow_events(gateway, path, offset)
        assert (events.messages, events.closed) == (whole.messages[1 + chunk :], True)
    head = gateway.client.head(path)
    assert head.headers["stream-next-offset"] == whole.offset
    assert head.headers["stream-closed"] == "true"
    assert head.headers["cache-control"] == "no-store"
    now = read(gateway, path, "now")
    assert (now.messages, now.offset, now.closed) == ([], whole.offset, True)
    assert read(gateway, path, "now", "long-poll").status == 204
    tag = whole.headers["etag"]
    same = gateway.get(path, headers={"if-none-match": tag})
    assert (same.status_code, same.content) == (304, b"")
    assert gateway.get(path, headers={"if-none-match": '"x"'}).status_code == 200


def test_a_long_output_is_read_page_by_page(gateway: Gateway) -> None:
    code = "import sys\nfor n in range(4000): sys.stdout.write(f'{n:0>999}\\n')"
    run = gateway.submit("pages", "python3", "-c", code)
    gateway.read(run)
    path, reader, offset, pages = f"/v1/runs/{run}/stream", RunReader(), "-1", 0
    while True:
        page = read(gateway, path, offset)
        for message in page.messages:
            reader.hear(message)
        assert page.offset > offset
        offset, pages = page.offset, pages + 1
        if page.closed:
            break
        assert not page.up_to_date
    assert pages > 2
    assert "".join(reader.chunks) == "".join(f"{n:0>999}\n" for n in range(4000))


def test_who_has_all_waits_for_more(place: Place, gateway: Gateway) -> None:
    enough = place.box.path / "enough"
    code = "echo one; while ! [ -e enough ]; do sleep 0.05; done; echo two"
    run = gateway.post(
        "/v1/threads/more/runs", {"argv": ["sh", "-c", code], "cwd": str(place.box.path)}
    ).json()["run"]
    path = f"/v1/runs/{run}/stream"
    wait_until(lambda: len(read(gateway, path).messages) == 2, "it has written one line")
    there = read(gateway, path)
    assert (there.up_to_date, there.closed) == (True, False)
    first = follow_events(gateway, path, "now", most=1)
    assert (first.messages, first.up_to_date, first.offset) == ([], True, there.offset)
    told: list[list[str]] = []
    waiting = [
        threading.Thread(target=lambda: told.append(poll_on(gateway, path, there.offset))),
        threading.Thread(target=lambda: told.append(poll_on(gateway, path, "now"))),
        threading.Thread(
            target=lambda: told.append(
                [m.get("data", "end") for m in follow_events(gateway, path, "now").messages]
            )
        ),
    ]
    for thread in waiting:
        thread.start()
    enough.touch()
    for thread in waiting:
        thread.join()
    # Who said "now" may have come after the line.
    assert told.count(["two\n", "end"]) >= 1
    assert all(each in (["two\n", "end"], ["end"], []) for each in told)


def poll_on(gateway: Gateway, path: str, offset: str) -> list[str]:
    found: list[str] = []
    while True:
        page = read(gateway, path, offset, "long-poll")
        assert page.headers["stream-cursor"] if not page.closed else True
        found += [message.get("data", "end") for message in page.messages]
        offset = page.offset
        if page.closed:
            return found


def test_output_that_is_gone(place: Place, gateway: Gateway) -> None:
    run = gateway.submit("gone", "echo", "x")
    gateway.read(run)
    path = f"/v1/runs/{run}/stream"
    behind = read(gateway, path).offset
    place.box.runctl("purge", "gone", "--yes")
    found = read(gateway, path)
    assert ([m["type"] for m in found.messages], found.closed) == (["end"], True)
    assert read(gateway, path, found.offset).messages == []
    assert follow_events(gateway, path, "-1").closed
    assert read(gateway, path, behind).closed


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("offset=1", 400),
        ("offset=0000000000000001_0000000000000001", 400),
        ("offset=-1&offset=-1", 400),
        ("live=sse", 400),
        ("live=odd&offset=-1", 400),
    ],
)
def test_what_cannot_be_read(gateway: Gateway, query: str, status: int) -> None:
    run = gateway.submit("odd", "true")
    assert gateway.get(f"/v1/runs/{run}/stream?{query}").status_code == status
    assert gateway.get("/v1/runs/none/stream").status_code == 404
    assert gateway.client.put(f"/v1/runs/{run}/stream").status_code == 405


@pytest.mark.long
def test_readers_through_the_deaths_of_everything(tmp_path: Path) -> None:
    """An interrupted attempt and a whole one, read in three ways, each with cuts of its own."""
    box = Box(tmp_path)
    box.configure("[queue]\noutlive = '0s'\n")
    gateway = None
    try:
        box.start()
        gateway = Gateway(box.config)
        run = gateway.submit("t", "python3", "-u", "-c", STEPS.format(count=60, pause=0.05))
        path = f"/v1/runs/{run}/stream"
        readers = [RunReader() for _ in range(9)]
        problems: list[BaseException] = []

        def follow(number: int, reader: RunReader) -> None:
            cuts = random.Random(number)
            offset = "-1"
            try:
                while reader.told[-1:] != ["end"]:
                    try:
                        if number % 3 == 0:
                            page = read(gateway, path, offset)
                        elif number % 3 == 1:
                            page = read(gateway, path, offset, "long-poll")
                        else:
                            page = follow_events(gateway, path, offset, cuts.randint(1, 20))
                    except (httpx.HTTPError, AssertionError) as error:
                        if isinstance(error, AssertionError) and "unavailable" not in str(error):
                            raise
                        stopped.wait(0.05)
                        continue
                    for message in page.messages:
                        reader.hear(message)
                    assert page.offset >= offset or offset == "-1"
                    offset = page.offset
                    if number % 3 == 0:
                        stopped.wait(0.05)
            except BaseException as error:
                problems.append(error)

        stopped = threading.Event()
        threads = [
            threading.Thread(target=follow, args=each, daemon=True) for each in enumerate(readers)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(len(r.chunks) > 5 for r in readers) or problems, "they read")
        box.kill()
        gateway.kill()
        gateway.start()
        box.start()
        wait_until(lambda: all(r.attempt == 2 for r in readers) or problems, "it starts over")
        gateway.kill(signal.SIGTERM)
        gateway.start()
        for thread in threads:
            thread.join(60)
        assert not problems
        for reader in readers:
            assert "".join(reader.chunks) == "".join(f"{n}\n" for n in range(60))
            assert reader.told.count("reset") == 2
    finally:
        if gateway is not None:
            gateway.close()
        box.close()
