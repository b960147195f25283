"""What is kept of output, and what goes first: real daemons with a small stream."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from conftest import DEADLINE, Box, Watch, daemon_with, wait_until
from natsserver import connected
from proxy import Proxy
from runctl.cli.display.output import describe_gap
from runctl.client.events import Gap
from runctl.protocol import messages, records, subjects
from runctl.protocol.model import Run, Status
from runctl.supervisor.output.backpressure import IN_ADVANCE, Backpressure
from test_housekeeping import forget
from test_terminal import Terminal

# Writes numbered lines of 1,000 bytes: argv is how many, and a file to wait for after them.
WRITER = """
import os, sys, time
for i in range(int(sys.argv[1])):
    sys.stdout.write(f"{i:06d}".ljust(999, "x") + "\\n")
    sys.stdout.flush()
while len(sys.argv) > 2 and not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
print("over")
"""
PART = 150  # lines of a finished run: 1 MiB holds six of them


def small(box: Box, text: str = "") -> Box:
    box.configure(f'[stream]\nmax_bytes = "1MiB"\n{text}')
    box.start()
    return box


def numbers(text: str) -> list[int]:
    """Of the whole lines: behind a gap, half a line may come first."""
    return [int(line[:6]) for line in text.splitlines() if len(line) == 999]


def outputs(box: Box, thread: str) -> dict[str, str]:
    return {row["run"]: row["output"] for row in box.json("list", thread)}


def ended_at(box: Box, run: str) -> float:
    """When it ended, Unix time."""
    return datetime.fromisoformat(box.show(run)["ended_at"]).timestamp()


def finish(box: Box, thread: str, lines: int = PART, run: str | None = None) -> str:
    name = box.submit_py(thread, WRITER, str(lines), run=run)
    assert box.runctl("wait", name).strip() == "succeeded"
    return name


def start_writer(box: Box, thread: str, lines: int) -> str:
    """A run that has written its lines, and goes on until the file ``thread`` is there."""
    run = box.submit_py(thread, WRITER, str(lines), str(box.path / thread))
    last = f"{lines - 1:06d}xxx"
    tail = "attach", thread, "--no-follow", "--tail", "3"
    wait_until(lambda: last in box.runctl(*tail), "all is written")
    return run


def nats_api(box: Box, body: Callable[[Any], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        client = await connected(box.state)
        try:
            return await body(client)
        finally:
            await client.close()

    return asyncio.run(main())


def test_finished_output_goes_first_oldest_end_first(stopped_box: Box) -> None:
    box = small(stopped_box)
    start_writer(box, "long", 300)  # older than all the rest
    done = [finish(box, "short", run=f"r{9 - i}") for i in range(10)]  # ids do not rise
    wait_until(lambda: outputs(box, "short")[done[0]] == "none", "the oldest went")
    kept = outputs(box, "short")
    states = [kept[run] for run in done]
    assert states == sorted(states), "whole runs went, the oldest first"
    assert set(states) == {"none", "stored"}
    table = box.runctl("list", "short").splitlines()
    assert table[0].split()[:4] == ["RUN", "STATUS", "OUTPUT", "ATTEMPT"]
    assert box.show(done[0])["output"] == "none"
    late = Watch(box, "long")
    late.wait_chunks(1)
    (box.path / "long").touch()
    assert late.wait() == 0
    assert numbers(late.text()) == list(range(300))
    assert not [e for e in late.events if e["type"] == "gap"]
    assert list(outputs(box, "long").values()) == ["stored"]


def test_with_running_output_alone_the_head_goes_and_the_gap_is_announced(
    stopped_box: Box,
) -> None:
    box = small(stopped_box)
    run = start_writer(box, "big", 2500)
    assert outputs(box, "big") == {run: "partial"}
    late = Watch(box, "big")
    # Its last records may have to make room as well: not of what is just being read.
    wait_until(lambda: "002499xxx" in late.text(), "it has come to the last line")
    (box.path / "big").touch()
    assert late.wait() == 0
    (gap,) = [e for e in late.events if e["type"] == "gap"]
    assert late.events[0]["type"] == "reset"
    assert late.events[1] == gap
    first = late.chunks()[0]["seq"]
    assert (gap["from"], gap["to"]) == (1, first - 1)
    seen = numbers(late.text())
    assert seen == list(range(seen[0], 2500))
    assert late.text().endswith("over\n")
    assert len(seen) > 500, "much more went than had to"
    events = map(json.loads, box.runctl("attach", "big", "--json").splitlines())
    (left,) = [e["to"] for e in events if e["type"] == "gap"]
    assert left >= gap["to"]
    box.runctl("attach", "big")
    assert f"{left} chunks (1 to {left}) of run {run} are no longer stored" in box.stderr


def test_a_reset_at_a_full_stream_makes_room(stopped_box: Box) -> None:
    box = small(stopped_box)
    run = start_writer(box, "t", 700)
    box.submit_py("other", WRITER, "2", str(box.path / "other"))

    async def fill(client: Any) -> None:
        """To the last byte, with what a database that is gone has left."""
        for size in (10_000, 1000, 100, 1):
            while True:
                subject = subjects.out_subject("unknown", "u1")
                reply = await client.request(subject, b"x" * size, timeout=5)
                if "error" in json.loads(reply.data):
                    break

    watch = Watch(box, "t")
    watch.wait_chunks(1)
    box.kill()
    assert box.daemon is not None
    box.start(ready=False)
    wait_until(lambda: _try(lambda: nats_api(box, fill)), "filled")
    box.wait_ready()
    wait_until(lambda: box.show(run)["attempt"] == 2, "replayed")
    (box.path / "t").touch()
    (box.path / "other").touch()
    assert watch.wait() == 0
    assert numbers(watch.text()) == list(range(700))


def _try(what: Callable[[], Any]) -> bool:
    try:
        what()
    except Exception:
        return False
    return True


def test_two_runs_at_full_speed_in_a_full_stream_both_finish(stopped_box: Box) -> None:
    box = small(stopped_box)
    runs = [box.submit_py(thread, WRITER, "6000") for thread in ("a", "b")]
    for run in runs:
        assert box.runctl("wait", run).strip() == "succeeded"
    texts = [box.runctl("attach", thread) for thread in ("a", "b")]
    assert any(texts), "the one that ended first may be gone, but not both"
    for text in filter(None, texts):
        assert numbers(text) == list(range(numbers(text)[0], 6000))
        assert text.endswith("over\n")


async def test_a_need_that_was_met_costs_nothing_more() -> None:
    """A writer that was refused while room was being made got through with the others, and
    ended: whoever then made room for it again dropped what it had just written."""
    room = Backpressure()
    async with trio.open_nursery() as nursery:
        for size in (100, 300):
            nursery.start_soon(room.wait_for_room, size)
        assert await room.wait_until_wanted() == 300
        nursery.start_soon(room.wait_for_room, 200)
        await trio.testing.wait_all_tasks_blocked()
        room.release_writers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(room.wait_for_room, 50)
        assert await room.wait_until_wanted() == 50, "that of those who came later counts"
        room.release_writers()
    room.request_room()
    assert await room.wait_until_wanted() == IN_ADVANCE


def test_count_and_older_than(stopped_box: Box) -> None:
    box = small(stopped_box, "max_runs = 3\n")
    done = [finish(box, "t", 2) for _ in range(5)]
    expected = dict(zip(done, ["none", "none", "stored", "stored", "stored"], strict=True))
    wait_until(lambda: outputs(box, "t") == expected, "three are kept")
    finish(box, "u", 2)
    live = start_writer(box, "u", 2)
    assert box.json("purge", "t", "u", "--older-than", "1h", "--yes") == {"runs": 0}
    box.runctl("purge", "t", "nobody", "--older-than", "0s", "--yes", code=3)
    box.runctl("purge", "t", "u", "--yes", code=6)
    assert outputs(box, "t") == expected, "nothing goes when one thread is refused"
    assert box.json("purge", "t", "u", "--older-than", "0s", "--yes") == {"runs": 4}
    assert set(outputs(box, "t").values()) == {"none"}
    assert outputs(box, "u").pop(live) == "stored"
    (box.path / "u").touch()
    box.runctl("wait", live)


def test_age_counts_from_the_end(stopped_box: Box) -> None:
    box = stopped_box
    box.configure('[stream]\nmax_age = "2s"\n')
    box.start()
    long = start_writer(box, "long", 5)
    short = finish(box, "short", 5)
    wait_until(lambda: outputs(box, "short")[short] == "none", "it is gone by its age")
    assert outputs(box, "long") == {long: "stored"}, "a run that goes on keeps its head"
    (box.path / "long").touch()
    box.runctl("wait", long)
    wait_until(lambda: outputs(box, "long")[long] == "none", "and then it went too")
    assert time.time() >= ended_at(box, long) + 2, "its age was counted from its beginning"
    again = finish(box, "short", 5)
    due = ended_at(box, again) + 2
    box.kill()
    wait_until(lambda: time.time() > due, "its age is reached while there is no daemon")
    box.start()
    wait_until(lambda: outputs(box, "short")[again] == "none", "a start catches up")


def test_an_older_stream_is_taken_over(stopped_box: Box) -> None:
    """JetStream discarded by itself, and kept more: neither is so after a start."""
    from nats.js.api import DiscardPolicy

    box = stopped_box
    box.start()
    done = [finish(box, "t", 500) for _ in range(4)]

    async def config(client: Any) -> Any:
        return (await client.jetstream().stream_info(subjects.STREAM)).config

    async def age(client: Any) -> None:
        old = await config(client)
        old.discard, old.max_age = DiscardPolicy.OLD, 3600.0
        await client.jetstream().update_stream(old)

    nats_api(box, age)
    box.term()
    small(box)
    wait_until(lambda: outputs(box, "t")[done[2]] == "none", "trimmed to the new limit")
    assert outputs(box, "t")[done[3]] == "stored"
    found = nats_api(box, config)
    assert (found.discard, found.max_age, found.max_bytes) == ("new", 0, 1024**2)


@pytest.fixture
def held(stopped_box: Box, nats_server: str) -> Iterator[Callable[[str], tuple[Box, Proxy]]]:
    """A daemon whose NATS is another program, and a proxy between them."""
    made: list[Proxy] = []

    def start(text: str) -> tuple[Box, Proxy]:
        proxy = Proxy(int(nats_server.rpartition(":")[2]), messages=True)
        made.append(proxy)
        stopped_box.configure(f'{text}[nats]\nurl = "{proxy.url}"\n')
        # What is held is waited for, however long a run takes meanwhile.
        stopped_box.prefix = daemon_with("output.inventory.TIMEOUT", DEADLINE)
        stopped_box.start()
        return stopped_box, proxy

    yield start
    stopped_box.close()
    for proxy in made:
        proxy.close()


@pytest.mark.parametrize("force", [False, True])
def test_a_purge_spares_what_begins_after_its_look(
    held: Callable[[str], tuple[Box, Proxy]], force: bool
) -> None:
    """The request to JetStream is under way for so long that a whole run comes and goes."""
    box, proxy = held("")
    thread = f"purged-{force}"
    old = finish(box, thread, 3)
    proxy.hold("STREAM.PURGE")
    purge = box.popen("purge", thread, "--yes", *(["--force"] if force else []))
    wait_until(lambda: proxy.held, "the purge is on its way")
    new = finish(box, thread, 4)
    proxy.release()
    out, err = purge.communicate(timeout=DEADLINE)
    assert (purge.returncode, out) == (0, b"purged the output of 1 run\n"), err
    assert outputs(box, thread) == {old: "none", new: "stored"}
    assert numbers(box.runctl("attach", thread, "--no-follow")) == [0, 1, 2, 3]


def test_a_run_that_is_being_aborted_is_in_flight(stopped_box: Box) -> None:
    """Its row is aborted at once, and its processes still write."""
    box = stopped_box
    box.configure("[queue]\nstop_grace = '1h'\n")
    box.start()
    code = "import os, signal, time\nsignal.signal(15, signal.SIG_IGN); print(os.getpid())\n"
    run = box.submit_py("t", f"{code}time.sleep(600)")
    watch = Watch(box, "t")
    watch.wait_chunks(1)
    abort = box.popen("abort", "t")
    wait_until(lambda: box.show(run)["status"] == "aborted", "its row says so")
    assert abort.poll() is None, "its processes are there"
    box.runctl("purge", "t", "--yes", code=6)
    assert f"has run {run} in flight" in box.stderr
    os.kill(int(watch.text()), signal.SIGKILL)
    assert abort.wait(DEADLINE) == 0
    box.runctl("purge", "t", "--yes")


@pytest.mark.long
@pytest.mark.parametrize("way", ["its age", "their number"])
def test_what_may_go_is_not_the_output_of_the_next_run_with_its_id(
    held: Callable[[str], tuple[Box, Proxy]], way: str
) -> None:
    """Between a look and its purge the run is forgotten, and its id used again."""
    thread = f"again-{way.split()[-1]}"
    limits = "[stream]\nmax_runs = 1\n" if way == "their number" else ""
    box, proxy = held(f"[history]\nmax_runs = 1\n{limits}")
    run = finish(box, thread, 3, run=f"{thread}-x")
    proxy.hold("STREAM.PURGE", 1)
    if way == "their number":
        finish(box, thread, 3)
    else:
        purge = box.popen("purge", thread, "--older-than", "0s", "--yes")
    wait_until(lambda: proxy.held, "what is left of it is about to go")
    forget(box, run)
    finish(box, thread, 4, run=run)
    proxy.release()
    if way == "their number":
        wait_until(lambda: list(outputs(box, thread).values()).count("stored") == 1, "one stays")
    else:
        purge.wait(DEADLINE)  # which it may have given up meanwhile
    assert outputs(box, thread)[run] == "stored"
    assert numbers(box.runctl("attach", thread, "--run", run, "--no-follow")) == [0, 1, 2, 3]


def test_progress_of_a_purge_of_many_threads(box: Box) -> None:
    threads = [f"t{i}" for i in range(6)]
    for thread in threads:
        box.submit(thread, "true")
    wait_until(lambda: all(x["status"] == "idle" for x in box.json("list")), "all ended")
    assert box.daemon is not None
    os.kill(box.daemon.pid, signal.SIGSTOP)  # it takes its time
    try:
        terminal = Terminal(box, "purge", *threads, "--yes")
        terminal.until("runctl: purging: 0 of 6 threads")
    finally:
        os.kill(box.daemon.pid, signal.SIGCONT)
    assert terminal.wait() == 0
    assert terminal.text() == "purged the output of 6 runs"


# ---- words and wire ----------------------------------------------------------------------


@pytest.mark.short
def test_a_gap_in_words() -> None:
    assert describe_gap(Gap("r", 1, 300)) == "300 chunks (1 to 300) of run r are"
    assert describe_gap(Gap("r", 7, 7)) == "1 chunk (7) of run r is"


@pytest.mark.short
def test_rows_of_older_daemons_and_clients_are_read() -> None:
    run = Run("r", "t", Status.SUCCEEDED, 1, "shell", "e", "2026-01-01T00:00:00Z")
    row = messages.run_row(run, "partial")
    assert list(msgspec.to_builtins(row)) == [*msgspec.to_builtins(run), "output"]
    old = msgspec.json.encode({"reply": "runs", "runs": [run], "next": None})
    found = messages.decode_reply(old)
    assert isinstance(found, messages.Runs)
    assert found.runs[0].output is None
    assert msgspec.json.decode(msgspec.json.encode(row), type=Run) == run
    assert b"check" not in messages.encode(messages.Purge(["t"]))


@pytest.mark.short
def test_a_record_says_how_much_was_written() -> None:
    record = records.Chunks(1, 7, 0.0, [records.Chunk("stdout", b"abc")], 4711)
    assert records.read_summary(records.summary(record)) == records.Summary(
        "chunk", 1, 7, total=4711
    )
    assert records.read_summary("chunk 1 7") == records.Summary("chunk", 1, 7)
