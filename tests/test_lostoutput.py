"""The stream is deleted, edited, or lost by its server under live runs, on real servers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import nats
import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from natsserver import Node, connected
from pgserver import free_port
from proc import children, is_stopped
from runctl.client import consumer
from runctl.client.events import Event
from runctl.protocol import records, subjects

# Counts, one number a line, as fast as the file argv[1] grows: a byte is a line.
COUNTER = """
import os, sys, time
n, over = 0, False
while not over:
    over = os.path.exists(sys.argv[1] + ".end")
    size = os.path.getsize(sys.argv[1])
    while n < size:
        print(f"{n:06d}".ljust(99, "x"), flush=True)
        n += 1
    time.sleep(0.02)
print("over", flush=True)
"""


class Counter:
    """A run whose output the test decides."""

    def __init__(self, box: Box, thread: str) -> None:
        self.box, self.thread = box, thread
        self.file = box.path / f"count-{thread}"
        self.file.touch()
        self.said = 0
        self.run = box.submit_py(thread, COUNTER, str(self.file))

    def say(self, lines: int) -> None:
        with self.file.open("ab") as file:
            file.write(b"x" * lines)
        self.said += lines

    def end(self) -> None:
        self.file.with_name(self.file.name + ".end").touch()

    def numbers(self) -> list[int]:
        return list(range(self.said))


def numbers(watcher: Watch) -> list[int]:
    return [int(line[:6]) for line in watcher.text().splitlines() if len(line) == 99]


def api(where: str | Path, operation: str, body: dict[str, Any] | None = None, **login: str) -> Any:
    """``where``: a URL, or the state directory of a daemon with a server of its own."""

    async def main() -> Any:
        if isinstance(where, Path):
            client = await connected(where)
        else:
            client = await nats.connect(where, **login)
        try:
            data = json.dumps(body or {}).encode()
            return json.loads((await client.request(f"$JS.API.{operation}", data, 60)).data)
        finally:
            await client.close()

    return asyncio.run(main())


def made(where: str | Path) -> str | None:
    """When the stream was made that is there now."""
    try:
        return api(where, f"STREAM.INFO.{subjects.STREAM}").get("created")
    except Exception:  # the server is just coming
        return None


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    folder = tmp_path / "nats"
    folder.mkdir()
    node = Node(folder)
    node.start()
    yield node
    node.close()


@pytest.fixture
def outside(stopped_box: Box, node: Node) -> Box:
    """A daemon whose NATS is another program."""
    stopped_box.configure(f'[nats]\nurl = "{node.url}"\n')
    stopped_box.start()
    return stopped_box


def delete(node: Node) -> None:
    assert api(node.url, f"STREAM.DELETE.{subjects.STREAM}")["success"]


def wipe(node: Node) -> None:
    """The server comes back with nothing."""
    node.kill()
    shutil.rmtree(node.path / "js")
    node.start()


def replace(node: Node) -> None:
    """Somebody makes another one, whose sequences begin with 1."""
    config = api(node.url, f"STREAM.INFO.{subjects.STREAM}")["config"]
    config.pop("first_seq", None)
    delete(node)

    def there() -> bool:
        """Unless the old one's files are just being removed. 10058: the daemon was faster."""
        reply = api(node.url, f"STREAM.CREATE.{subjects.STREAM}", config)
        return "error" not in reply or reply["error"]["err_code"] == 10058

    wait_until(there, "there is another one")


@pytest.mark.parametrize(
    "lose", [delete, *(pytest.param(x, marks=pytest.mark.nightly) for x in (wipe, replace))]
)
def test_live_runs_go_on_in_another_stream(
    outside: Box, node: Node, lose: Callable[[Node], None]
) -> None:
    box = outside
    loud, silent, short = (Counter(box, thread) for thread in ("loud", "silent", "short"))
    early = [Watch(box, counter.thread) for counter in (loud, silent, short)]
    loud.say(40)
    silent.say(3)
    short.say(2)
    for watcher, counter in zip(early, (loud, silent, short), strict=True):
        wait_until(lambda w=watcher, c=counter: numbers(w) == c.numbers(), "all is seen")
    before = wait_until(lambda: made(node.url), "the stream is there")
    lose(node)
    short.end()
    wait_until(lambda: made(node.url) not in (None, before), "there is another one")
    late = [Watch(box, counter.thread) for counter in (loud, silent)]
    for watcher, counter in zip(late, (loud, silent), strict=True):  # though nothing more is said
        wait_until(lambda w=watcher, c=counter: numbers(w) == c.numbers(), "all is there again")
    loud.say(40)
    for run in (loud, silent):
        run.say(1)
    for watcher, counter in zip([*early[:2], *late], [loud, silent] * 2, strict=True):
        wait_until(lambda w=watcher, c=counter: numbers(w) == c.numbers(), "all is seen")
    assert early[2].wait() == 0
    box.runctl("wait", short.run)
    for counter in (loud, silent):
        counter.end()
    for watcher, counter in zip([*early[:2], *late], [loud, silent] * 2, strict=True):
        assert watcher.wait() == 0
        assert numbers(watcher) == counter.numbers()
        assert [e["type"] for e in watcher.events].count("reset") == 1
        assert not [e for e in watcher.events if e["type"] == "gap"]
        assert box.show(counter.run)["attempt"] == 1
    (loss,) = [x for x in box.json("status")["nats"]["warnings"] if "was deleted" in x]
    assert loss in box.log.read_text()
    found = json.loads(box.runctl("doctor", "--json", code=None))["findings"]
    assert loss in [x["said"] for x in found if x["check"] == "stream" and x["state"] == "warn"]
    assert "Traceback" not in box.log.read_text()


def test_what_is_not_kept_is_a_gap_that_is_told(outside: Box, node: Node) -> None:
    """64 KiB of each run are kept: an early watcher has seen the rest, a late one is told."""
    box, counter = outside, Counter(outside, "t")
    early = Watch(box, "t")
    for _ in range(40):
        counter.say(100)
        wait_until(lambda: len(numbers(early)) == counter.said, "all is seen")
    before = wait_until(lambda: made(node.url), "the stream is there")
    delete(node)
    wait_until(lambda: made(node.url) not in (None, before), "it is made again")
    late = Watch(box, "t")
    counter.say(5)
    counter.end()
    assert (early.wait(), late.wait()) == (0, 0)
    assert numbers(early) == counter.numbers()
    assert not [e for e in early.events if e["type"] == "gap"]
    (gap,) = [e for e in late.events if e["type"] == "gap"]
    assert [e["type"] for e in late.events[:2]] == ["reset", "gap"]
    assert late.chunks()[0]["seq"] == gap["to"] + 1
    seen = numbers(late)
    assert seen == list(range(seen[0], counter.said))
    assert len(seen) > 200


def test_an_end_that_was_lost_before_it_was_seen_is_told(outside: Box, node: Node) -> None:
    """The watcher is stopped while the run ends and the stream is deleted."""
    box, counter = outside, Counter(outside, "t")
    watcher = Watch(box, "t")
    counter.say(3)
    watcher.wait_chunks(1)
    wait_until(lambda: numbers(watcher) == counter.numbers(), "all is seen")
    watcher.process.send_signal(signal.SIGSTOP)
    try:
        counter.end()
        box.runctl("wait", counter.run)
        before = wait_until(lambda: made(node.url), "the stream is there")
        delete(node)
        wait_until(lambda: made(node.url) not in (None, before), "it is made again")
    finally:
        watcher.process.send_signal(signal.SIGCONT)
    assert watcher.wait() == 0
    assert watcher.final()[-1]["status"] == "succeeded"


def test_an_embedded_server_whose_store_is_removed_while_it_is_down(box: Box) -> None:
    counter = Counter(box, "t")
    early = Watch(box, "t")
    counter.say(5)
    wait_until(lambda: numbers(early) == counter.numbers(), "all is seen")
    before = wait_until(lambda: made(box.state), "the stream is there")
    (server,) = children(box.pid, "nats-server")
    os.kill(server, signal.SIGSTOP)
    wait_until(lambda: is_stopped(server), "it writes no more")
    shutil.rmtree(box.state / "nats" / "store")
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: made(box.state) not in (None, before), "there is another")
    counter.say(5)
    counter.end()
    late = Watch(box, "t")
    assert (early.wait(), late.wait()) == (0, 0)
    assert numbers(early) == numbers(late) == counter.numbers()


# ---- a stream that does not serve --------------------------------------------------------


@pytest.fixture
def strict(stopped_box: Box, tmp_path: Path) -> Iterator[tuple[Box, Node]]:
    """A daemon that may not make the stream."""
    folder = tmp_path / "nats"
    folder.mkdir()
    node = Node(folder)
    node.configure(
        """authorization { users: [
          { user: op, password: op }
          { user: d, password: d, permissions: {
              publish: { allow: ">", deny: ["$JS.API.STREAM.CREATE.>"] }
              subscribe: { allow: ">", deny: ["$JS.EVENT.>"] }
              allow_responses: true } } ] }"""
    )
    node.start()
    stopped_box.configure(
        f'[nats]\nurl = "nats://d:d@127.0.0.1:{node.port}"\n'
        f'[metrics]\nlisten = "127.0.0.1:{free_port()}"\n'
    )
    yield stopped_box, node
    stopped_box.close()
    node.close()


OP: dict[str, Any] = {"user": "op", "password": "op"}
CONFIG: dict[str, Any] = {
    "name": subjects.STREAM,
    "subjects": [f"{subjects.SUBJECT_PREFIX}.*.*"],
    "storage": "file",
    "discard": "new",
    "max_bytes": 4 * 1024**3,
    "max_consumers": 100_000,
    "allow_rollup_hdrs": True,
    "allow_direct": True,
}


def health(box: Box) -> int:
    listen = box.config.read_text().rpartition('listen = "')[2].partition('"')[0]
    try:
        return int(urllib.request.urlopen(f"http://{listen}/healthz", timeout=DEADLINE).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.nightly
def test_without_the_right_to_make_it_nothing_hangs(strict: tuple[Box, Node]) -> None:
    box, node = strict
    assert "error" not in api(node.url, f"STREAM.CREATE.{subjects.STREAM}", CONFIG, **OP)
    box.start()
    ends, aborted, on = (Counter(box, thread) for thread in ("ends", "aborted", "on"))
    queued = box.submit("aborted", "true")
    early = [Watch(box, counter.thread) for counter in (ends, on)]
    for counter in (ends, on):
        counter.say(3)
    for watcher, counter in zip(early, (ends, on), strict=True):
        wait_until(lambda w=watcher, c=counter: numbers(w) == c.numbers(), "all is seen")
    assert health(box) == 200
    assert api(node.url, f"STREAM.DELETE.{subjects.STREAM}", **OP)["success"]
    wait_until(
        lambda: "nats stream add RUNCTL" in str(box.json("status")["nats"]["warnings"]), "told"
    )
    assert "nats stream add RUNCTL" in box.log.read_text()
    box.runctl("status", "--probe", "ready", code=4)
    assert "the stream RUNCTL is gone" in box.stderr
    box.runctl("status", "--probe", "live")
    assert health(box) == 503
    out = box.runctl("doctor", "--json", code=1)
    (said,) = [x for x in json.loads(out)["findings"] if x["check"] == "stream"]
    assert (said["state"], "is gone under a running daemon" in said["said"]) == ("fail", True)
    assert "nats stream add RUNCTL" in said["fix"]
    assert queued in box.runctl("abort", "aborted", "--run", queued)
    assert box.runctl("abort", "aborted").split()[1] == aborted.run
    ends.say(2)
    ends.end()
    wait_until(lambda: box.show(ends.run)["status"] == "succeeded", "its work has ended")
    on.say(2)
    assert "error" not in api(node.url, f"STREAM.CREATE.{subjects.STREAM}", CONFIG, **OP)
    on.end()
    for watcher, counter in zip(early, (ends, on), strict=True):
        assert watcher.wait() == 0
        assert numbers(watcher) == counter.numbers()

    def stored(run: str) -> bool:
        """Its end is in the stream, and its row knows it."""
        box.runctl("attach", "aborted", "--run", run, "--no-follow", code=5)
        ends = f"SELECT 1 FROM workflow_output WHERE workflow_uuid = '{run}'"
        with closing(sqlite3.connect(box.state / "runctl.sqlite")) as db:
            return "no longer stored" not in box.stderr and bool(db.execute(ends).fetchall())

    for run in (aborted.run, queued):
        wait_until(lambda r=run: stored(r), "its end is made up for")
    late = Watch(box, "ends")
    assert late.wait() == 0
    assert numbers(late) == ends.numbers()
    box.runctl("status", "--probe", "ready")
    assert "Traceback" not in box.log.read_text()


@pytest.mark.nightly
def test_live_edits_are_named(outside: Box, node: Node) -> None:
    """One that does not matter, and one that does; each kind of them: ``test_life.py``."""
    box = outside
    config = api(node.url, f"STREAM.INFO.{subjects.STREAM}")["config"]
    for edit, words in (
        ({"max_msgs": 1000}, "max_msgs = 1000"),
        ({"subjects": ["runctl.out.*.*", "others.>"]}, "subjects = others.>,runctl.out.*.*"),
    ):
        assert "error" not in api(node.url, f"STREAM.UPDATE.{subjects.STREAM}", config | edit)

        def named(words: str = words) -> bool:
            return words in str(box.json("status")["nats"]["warnings"])

        wait_until(named, "it is in the status")
        assert words in box.log.read_text()
        found = json.loads(box.runctl("doctor", "--json", code=None))["findings"]
        said = str([x for x in found if x["check"] == "stream" and x["state"] != "ok"])
        assert words in said
        assert "error" not in api(node.url, f"STREAM.UPDATE.{subjects.STREAM}", config)
        wait_until(lambda: not named(), "it is right again")


def test_an_abort_is_answered_in_a_sealed_stream(outside: Box, node: Node) -> None:
    box, counter = outside, Counter(outside, "t")
    counter.say(3)
    Watch(box, "t").wait_chunks(1)
    config = api(node.url, f"STREAM.INFO.{subjects.STREAM}")["config"]
    sealed = config | {"sealed": True, "discard": "new"}
    assert "error" not in api(node.url, f"STREAM.UPDATE.{subjects.STREAM}", sealed)
    counter.say(3)
    box.runctl("abort", "t")
    assert box.show(counter.run)["status"] == "aborted"

    def probed() -> bool:
        box.runctl("status", "--probe", "ready", code=None)
        return "sealed = true" in box.stderr

    wait_until(probed, "it is known")
    box.runctl("status", "--probe", "ready", code=4)
    out = box.runctl("doctor", code=1)
    assert "all stored output with it" in out


# ---- words ------------------------------------------------------------------------------


@pytest.mark.short
def test_a_reset_that_is_written_again_repeats_nothing() -> None:
    """For a watcher that came when it was not stored."""
    state, events = consumer.RunState("r"), list[Event]()
    chunks = records.Chunks(1, 5, 0.0, [records.Chunk("stdout", b"x")])
    state.apply(chunks, events)
    before = list(events)
    state.apply(records.Reset("r", 1, time.time(), "e"), events)
    state.apply(chunks, events)
    assert events == before


@pytest.mark.nightly
def test_a_server_that_pauses_under_several_runs_is_not_replaced(box: Box) -> None:
    """What was under way for all of them is not answered in time: that is one silence."""
    code = "import time\nfor n in range(100): print(n, flush=True); time.sleep(0.1)"
    names = [f"t{n}" for n in range(4)]
    for name in names:
        box.submit_py(name, code)
    watches = [Watch(box, name) for name in names]
    for watch in watches:
        watch.wait_chunks(1)
    (server,) = children(box.pid, "nats-server")
    os.kill(server, signal.SIGSTOP)
    time.sleep(2.5)  # more than a publish is waited for, less than what counts as dead
    os.kill(server, signal.SIGCONT)
    for watch in watches:
        assert watch.wait() == 0
        assert watch.text() == "".join(f"{n}\n" for n in range(100))
    assert children(box.pid, "nats-server") == [server]
    assert "stores nothing" not in box.log.read_text()
