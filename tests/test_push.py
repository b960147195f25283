"""Push runs: their work is done elsewhere, and appended over HTTP, through deaths of everything."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Box, Watch, wait_until
from gateways import Gateway, Place, Stream
from test_gateway import problem

CONFIG = '[runners.ci]\nkind = "push"\n[runners.brief]\nkind = "push"\nidle_timeout = "1s"\n'
TEXT = {"content-type": "text/plain"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with closing(Place(tmp_path_factory.mktemp("push"), CONFIG)) as made:
        yield made


@pytest.fixture
def box(place: Place) -> Box:
    return place.box


@pytest.fixture
def gateway(place: Place) -> Gateway:
    return place.gateway


def begin(gateway: Gateway, thread: str, runner: str = "ci", **more: Any) -> str:
    answer = gateway.post(f"/v1/threads/{thread}/runs", {"runner": runner, **more})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["run"])


def append(gateway: Gateway, run: str, data: bytes, **headers: str) -> httpx.Response:
    path = f"/v1/runs/{run}/stream"
    return gateway.client.post(path, content=data, headers={**TEXT, **headers})


def close(gateway: Gateway, run: str, **headers: str) -> httpx.Response:
    path = f"/v1/runs/{run}/stream"
    return gateway.client.post(path, headers={"stream-closed": "true", **headers})


def test_a_run_is_pushed_from_its_submit_to_its_end(box: Box, gateway: Gateway) -> None:
    run = box.runctl("submit", "build", "--runner", "ci", "build 7 of main").strip()
    watch = Watch(box, "build")
    events = Stream(gateway, run).begin()
    for line in (b"one\n", b"two\n"):
        assert append(gateway, run, line).status_code == 204
    wait_until(lambda: len(watch.chunks()) == 2, "who attaches sees it")
    shown = box.show(run)
    assert (shown["status"], shown["runner"], shown["attempt"]) == ("running", "ci", 1)
    assert shown["prompt"] == "build 7 of main"
    last = append(gateway, run, b"three\n", **{"stream-closed": "true"})
    assert (last.status_code, last.headers["stream-closed"]) == (204, "true")
    assert watch.wait() == 0
    assert watch.text() == "one\ntwo\nthree\n"
    assert events.join().chunks == ["one\n", "two\n", "three\n"]
    shown = box.ended(run)
    assert (shown["status"], shown["output"]) == ("succeeded", "stored")
    late = append(gateway, run, b"late")
    assert problem(late, 409, "closed")
    assert late.headers["stream-closed"] == "true"
    answer = gateway.get(f"/v1/runs/{run}/stream")
    assert (answer.text, answer.headers["content-type"]) == ("one\ntwo\nthree\n", "text/plain")
    assert answer.headers["stream-next-offset"] == last.headers["stream-next-offset"]


def test_how_it_ended_is_said_where_it_was_done(box: Box, gateway: Gateway) -> None:
    run = begin(gateway, "fails")
    append(gateway, run, b"no such file\n")
    assert close(gateway, run, **{"runctl-exit-code": "3"}).status_code == 204
    shown = box.ended(run)
    assert (shown["status"], shown["exit_code"], shown["error"]) == ("failed", 3, "exit code 3")
    run = begin(gateway, "fails")
    assert problem(close(gateway, run, **{"runctl-exit-code": "x"}), 400, "bad-request")
    close(gateway, run, **{"runctl-exit-code": "0"})
    assert box.ended(run)["exit_code"] == 0
    box.runctl("wait", run)
    run = begin(gateway, "fails")
    close(gateway, run, **{"runctl-error": "the sandbox is gone"})
    assert box.ended(run)["error"] == "the sandbox is gone"
    again = box.json("retry", run)["run"]
    assert append(gateway, again, b"x").status_code == 204
    close(gateway, again)
    assert box.ended(again)["status"] == "succeeded"


def test_an_end_that_is_found_is_of_the_attempt_that_stored_it(
    box: Box, gateway: Gateway
) -> None:
    run = begin(gateway, "found")
    wait_until(lambda: append(gateway, run, b"once\n").status_code == 204, "it has begun")
    assert close(gateway, run).status_code == 204
    assert box.ended(run)["status"] == "succeeded"
    box.kill()
    box.unwrite_end(run)
    box.start()
    shown = box.ended(run)
    assert (shown["status"], shown["attempt"]) == ("succeeded", 1)


def test_it_takes_its_turn_on_its_thread(box: Box, gateway: Gateway) -> None:
    first = begin(gateway, "turns")
    append(gateway, first, b"x")
    queued = begin(gateway, "turns")
    answer = append(gateway, queued, b"too early")
    said = problem(answer, 503, "waiting")
    assert f"run {first} of its thread is before it" in said
    assert answer.headers["retry-after"] == "1"
    waiting = gateway.get(f"/v1/runs/{queued}/stream")
    assert (waiting.status_code, waiting.content) == (200, b"")
    behind = box.submit("turns", "echo", "behind")
    close(gateway, first)
    assert append(gateway, queued, b"now").status_code == 204
    assert box.show(behind)["status"] == "queued"
    close(gateway, queued)
    assert box.ended(behind)["status"] == "succeeded"
    assert gateway.get(f"/v1/runs/{queued}/stream").text == "now"


def test_an_abort_fences_its_writer(box: Box, gateway: Gateway) -> None:
    run = begin(gateway, "abort")
    append(gateway, run, b"some")
    assert box.json("abort", "abort") == {"runs": [run]}
    assert box.show(run)["status"] == "aborted"
    assert problem(append(gateway, run, b"more"), 409, "closed")
    assert gateway.get(f"/v1/runs/{run}/stream").text == "some"
    assert gateway.read(run).told == ["reset", "chunk", "end"]
    # One that ended before the abort has ended as it said.
    run = begin(gateway, "abort")
    append(gateway, run, b"all", **{"stream-closed": "true"})
    box.ended(run)
    box.runctl("abort", "abort", code=6)


def test_a_numbered_append_counts_once(gateway: Gateway) -> None:
    run = begin(gateway, "numbered")

    def send(epoch: int, number: int, data: bytes) -> httpx.Response:
        mark = {"producer-id": "p", "producer-epoch": str(epoch), "producer-seq": str(number)}
        return append(gateway, run, data, **mark)

    assert [send(0, 0, b"a").status_code, send(0, 0, b"a").status_code] == [200, 204]
    assert send(0, 1, b"b").status_code == 200
    assert send(0, 3, b"d").headers["producer-expected-seq"] == "2"
    assert send(1, 0, b"c").status_code == 200
    assert problem(send(0, 2, b"of a dead one"), 403, "denied")
    assert gateway.get(f"/v1/runs/{run}/stream").text == "abc"
    close(gateway, run)


def test_nobody_appends_for_long(box: Box, gateway: Gateway) -> None:
    run = begin(gateway, "idle", "brief")
    append(gateway, run, b"x")
    shown = box.ended(run)
    assert (shown["status"], shown["error"]) == (
        "failed",
        "nothing was appended for 1s (idle_timeout)",
    )
    assert problem(append(gateway, run, b"late"), 409, "closed")


def test_what_is_refused(box: Box, gateway: Gateway) -> None:
    box.runctl("submit", "odd", "--runner", "ci", "--", "true", code=2)
    assert "submit no command" in box.stderr
    box.runctl("submit", "odd", "--runner", "ci", "--on-interrupt", "fail", "x", code=2)
    plain = gateway.submit("odd", "echo", "x")
    assert problem(append(gateway, plain, b"x"), 405, "bad-request")
    run = begin(gateway, "odd")
    assert problem(append(gateway, run, b""), 400, "bad-request")
    assert problem(append(gateway, run, b"x" * 600_000), 413, "limit")
    wrong = append(gateway, run, b"{}", **{"content-type": "application/json"})
    assert problem(wrong, 409, "refused")
    assert problem(append(gateway, "none", b"x"), 404, "not-found")
    assert gateway.client.delete(f"/v1/runs/{run}/stream").status_code == 204
    assert box.ended(run)["error"] == "its stream was deleted"
    assert gateway.get(f"/v1/runs/{run}/stream").status_code == 404


def test_a_stream_has_a_name(box: Box, gateway: Gateway) -> None:
    path = "/v1/stream/sandbox/7"
    headers = {"content-type": "application/json", "runctl-runner": "ci"}
    made = gateway.client.put(path, content=b'[{"n": 1}, 2]', headers=headers)
    assert made.status_code == 201
    assert made.headers["location"] == f"{gateway.url}{path}"
    rows = box.json("list", "sandbox/7")
    assert [(row["status"], row["runner"]) for row in rows] == [("running", "ci")]
    assert gateway.client.put(path, headers=headers).status_code == 200
    plain = gateway.client.put(path, headers={**headers, **TEXT})
    assert problem(plain, 409, "refused")
    gateway.client.post(path, content=b'{"a": [1]}', headers=headers)
    assert gateway.get("/v1/stream/sandbox%2F7").json() == [{"n": 1}, 2, {"a": [1]}]
    old = gateway.get(path).headers["stream-next-offset"]
    viewer = Stream(gateway, rows[0]["run"]).begin()
    wait_until(lambda: len(viewer.viewer.chunks) == 3, "who watches sees lines")
    assert viewer.viewer.chunks == ['{"n": 1}\n', "2\n", '{"a": [1]}\n']
    assert gateway.client.delete(path).status_code == 204
    assert gateway.get(path).status_code == 404
    assert box.ended(rows[0]["run"])["status"] == "aborted"
    assert viewer.join().ended
    again = gateway.client.put(path, content=b"3", headers=headers)
    assert again.status_code == 201
    assert gateway.get(path).json() == [3]
    assert gateway.get(path, params={"offset": old}).status_code == 410
    assert len(box.json("list", "sandbox/7")) == 2
    box.runctl("abort", "sandbox/7")
    assert gateway.get(path).headers["stream-closed"] == "true"
    box.runctl("purge", "sandbox/7", "--yes")
    assert gateway.get(path).status_code == 404


def test_its_output_is_purged_under_it(box: Box, gateway: Gateway) -> None:
    run = begin(gateway, "purged")
    before = append(gateway, run, b"old").headers["stream-next-offset"]
    box.runctl("purge", "purged", "--force", "--yes")
    wait_until(lambda: append(gateway, run, b"new").status_code == 204, "it takes more")
    path = f"/v1/runs/{run}/stream"
    assert gateway.get(path).text == "new"
    assert problem(gateway.get(path, params={"offset": before}), 410, "gone")
    close(gateway, run)
    assert box.ended(run)["status"] == "succeeded"


@pytest.mark.long
def test_writers_and_readers_through_the_deaths_of_everything(tmp_path: Path) -> None:
    """Three producers with numbers, two gateways; daemon, gateways and nats-server are killed.
    Each message is there once, in its producer's order, and the run goes on as the same attempt."""
    from test_gateway import _kill_server

    box = Box(tmp_path)
    box.configure("[queue]\noutlive = '30s'\n" + CONFIG)
    gateways: list[Gateway] = []
    try:
        box.start()
        gateways = [Gateway(box.config) for _ in range(2)]
        made = gateways[0].client.put(
            "/v1/stream/t", headers={"content-type": "application/json", "runctl-runner": "ci"}
        )
        assert made.status_code == 201
        (row,) = box.json("list", "t")
        watch = Watch(box, "t")
        problems: list[BaseException] = []
        sent = [0, 0, 0]
        most, hold = 80, threading.Event()

        def produce(number: int) -> None:
            headers = {"content-type": "application/json", "producer-id": f"p{number}"}
            tries = 0
            try:
                while sent[number] < most:
                    gateway = gateways[(number + tries) % 2]
                    mark = {"producer-epoch": "0", "producer-seq": str(sent[number])}
                    body = json.dumps([number, sent[number]]).encode()
                    try:
                        with httpx.Client(base_url=gateway.url, trust_env=False) as client:
                            answer = client.post(
                                "/v1/stream/t", content=b"[%s]" % body, headers={**headers, **mark}
                            )
                    except httpx.HTTPError:
                        tries += 1
                        hold.wait(0.02)
                        continue
                    if answer.status_code >= 500:
                        tries += 1
                        hold.wait(0.02)
                        continue
                    assert answer.status_code in (200, 204), answer.text
                    sent[number] += 1
                    hold.wait(0.01)
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=produce, args=(n,), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()

        def came_to(count: int) -> None:
            wait_until(lambda: sum(sent) >= count or problems, f"{count} are sent")

        came_to(30)
        box.kill()
        at = sum(sent)
        came_to(at + 30)  # without a daemon
        gateways[0].kill()
        gateways[0].start()
        box.start()
        came_to(sum(sent) + 30)
        _kill_server(box)
        gateways[1].kill()
        gateways[1].start()
        came_to(3 * most)
        for thread in threads:
            thread.join(60)
        assert not problems
        end = gateways[0].client.post("/v1/stream/t", headers={"stream-closed": "true"})
        assert end.status_code == 204
        assert watch.wait() == 0
        found = gateways[1].get("/v1/stream/t").json()
        for number in range(3):
            theirs = [n for who, n in found if who == number]
            assert theirs == list(range(most))
        assert watch.text() == "".join(f"[{who}, {n}]\n" for who, n in found)
        shown = box.ended(row["run"])
        assert (shown["status"], shown["attempt"], len(shown["attempts"])) == ("succeeded", 1, 1)
        assert sum(event["type"] == "reset" for event in watch.events) == 1
        assert "attempt=2" not in box.log.read_text()
    finally:
        for gateway in gateways:
            gateway.close()
        box.close()
