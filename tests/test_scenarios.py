"""The promises, with real daemons, real processes and real SIGKILL."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from natsserver import connected
from proc import alive, children
from runctl.protocol import messages
from runctl.protocol.model import Status
from test_chat import Scripted, delta, serving

#: The first attempt stays in the middle, whenever it is that it is cut.
TWENTY = """
import os, time
for i in range(1, 21):
    print(f"chunk-{i} {time.time():.3f}", flush=True)
    time.sleep(600 if os.environ["RUNCTL_ATTEMPT"] == "1" and i == 4 else 0.1)
"""


def _assert_one_clean_reply(text: str, killed_at: float) -> None:
    names = [int(n) for n in re.findall(r"^chunk-(\d+) ", text, re.M)]
    assert names == list(range(1, 21))
    stamps = [float(s) for s in re.findall(r"^chunk-\d+ ([\d.]+)$", text, re.M)]
    assert stamps[0] > killed_at, "the reply was not replayed"


@pytest.mark.parametrize("how", ["kill", "term"])
def test_death_replay_and_graceful(box: Box, how: str) -> None:
    run = box.submit_py("demo", TWENTY)
    attached = Watch(box, "demo")
    # Lines that come close together may share a chunk.
    wait_until(lambda: "chunk-2 " in attached.text(), "it is in the middle")
    killed_at = time.time()
    if how == "kill":
        box.kill()
    else:
        assert box.term() == 0
    box.start()
    assert attached.wait() == 0
    _assert_one_clean_reply(attached.text(), killed_at)
    assert [e["attempt"] for e in attached.events if e["type"] == "reset"] == [1, 2]
    late = Watch(box, "demo", "--run", run)
    assert late.wait() == 0
    _assert_one_clean_reply(late.text(), killed_at)
    assert [e["seq"] for e in late.chunks()] == list(range(1, len(late.chunks()) + 1))
    assert late.text() == attached.text()
    wait_until(lambda: box.show(run)["status"] == "succeeded", "its end is recorded")
    assert box.show(run)["attempt"] == 2


@pytest.mark.long
def test_fifo_across_a_kill_while_threads_run_in_parallel(box: Box, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    code = """
import os, sys, time
def note(what):
    fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    e = os.environ
    os.write(fd, f"{e['RUNCTL_THREAD']} {e['RUNCTL_RUN']} {what} {time.monotonic()}\\n".encode())
note("begin"); time.sleep(0.2); note("end")
"""

    def client(n: int) -> list[str]:
        return box.submit_all("lane", [sys.executable, "-c", code, str(journal)], 10)

    go = tmp_path / "go"
    side_code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)"

    def together() -> bool:
        """All side threads run at one moment: none goes on before the file is there."""
        rows = box.json("list", "--status", "running")
        return sum(row["thread"].startswith("side-") for row in rows) == 20

    with ThreadPoolExecutor(6) as pool:
        side = [sys.executable, "-c", side_code, str(go)]
        sides = [f"side-{n}" for n in range(20)]
        box.ask(*(messages.Submit(thread, argv=side) for thread in sides))
        wait_until(together, "20 threads run in parallel")
        lanes = [pool.submit(client, n) for n in range(5)]
        orders = [lane.result() for lane in lanes]
    box.kill()
    box.start()
    wait_until(together, "20 threads run in parallel again")
    go.touch()
    runs = [r for order in orders for r in order]
    for order in orders:
        assert box.runctl("wait", order[-1]).strip() == "succeeded"
    wait_until(lambda: all(row["status"] == "idle" for row in box.json("list")), "all have ended")
    rows = [row for reply in box.ask(*map(messages.List, ["lane", *sides])) for row in reply.runs]
    assert {row.status for row in rows} == {Status.SUCCEEDED}
    assert len(rows) == len(runs) + len(sides)
    lines = [line.split() for line in journal.read_text().splitlines() if line.startswith("lane")]
    open_run, finished = None, []
    for _, run, what, _ in lines:
        if what == "begin":
            assert open_run is None or open_run == run, "two runs of a thread overlapped"
            open_run = run
        else:
            assert open_run == run
            open_run = None
            finished.append(run)
    assert sorted(set(finished)) == sorted(runs)
    first = list(dict.fromkeys(finished))
    for order in orders:  # what one client submitted in order ran in order
        assert [r for r in first if r in order] == order


TREE = """
import os, signal, sys, time
def leaf(name):
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(1, b"pid %d\\n" % os.getpid())  # in one piece, as print does not
    time.sleep(600)
for name in "ab":
    if os.fork() == 0:
        leaf(name)
os.write(1, b"pid %d\\n" % os.getpid())
time.sleep(600)
"""


def _pids(watch: Watch, n: int) -> list[int]:
    def found() -> list[int]:
        pids = [int(p) for p in re.findall(r"pid (\d+)\n", watch.text())]
        return pids if len(pids) >= n else []

    pids: list[int] = wait_until(found, "the tree has started")
    return pids


def test_abort(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[queue]\nstop_grace = '300ms'\n")
    box.start()
    run = box.submit_py("tree", TREE)
    waiting = box.submit_py("tree", "print('next')")
    watch = Watch(box, "tree")
    pids = _pids(watch, 3)
    box.runctl("abort", "tree", "--run", waiting)
    assert box.show(waiting)["status"] == "aborted"
    assert run in box.runctl("abort", "tree")
    assert not [pid for pid in pids if alive(pid)], "abort returned before the tree was gone"
    assert watch.wait() == 5
    assert box.show(run)["status"] == "aborted"
    box.runctl("abort", "tree", "--run", run, code=6)
    box.runctl("abort", "tree", code=6)
    box.runctl("abort", "nobody", code=3)
    box.runctl("abort", "tree", "--run", "nothing", code=3)
    box.runctl("attach", "tree", "--run", waiting, code=5)
    box.runctl("wait", run, code=5)
    box.runctl("purge", "tree", "--yes")
    wait_until(lambda: _noted(box) >= {run, waiting}, "their ends are noted after the answer")
    box.kill()
    box.start()
    assert box.show(run)["attempt"] == 1
    assert box.show(run)["status"] == "aborted"
    box.runctl("wait", box.submit("other", "true"))
    assert box.json("status")["nats"]["stream_messages"] == 2, "what was purged came back"


def test_purge_leaves_an_end_that_the_database_does_not_know(stopped_box: Box) -> None:
    """Its row was not written when the daemon died: the run waits, and must not run twice."""
    box = stopped_box
    box.configure("[queue]\nmax_running = 1\n")
    box.start()
    done = box.path / "done"
    run = box.submit("cut", "sh", "-c", f"echo once >> {done}")
    assert box.runctl("wait", run).strip() == "succeeded"
    status = f"SELECT status FROM workflow_status WHERE workflow_uuid = '{run}'"
    wait_until(lambda: _rows(box, status) == ["SUCCESS"], "its row is written")
    box.submit("busy", "sleep", "600")
    wait_until(lambda: box.json("status")["running"] == 1, "the only place is taken")
    file = box.state / "runctl.sqlite"
    with closing(sqlite3.connect(file, timeout=DEADLINE)) as database, database:
        database.execute("DELETE FROM workflow_output WHERE workflow_uuid = ?", (run,))
        database.execute(
            "UPDATE workflow_status SET status = 'ENQUEUED', completed_at = NULL"
            " WHERE workflow_uuid = ?",
            (run,),
        )
    assert box.show(run)["status"] == "queued"
    box.runctl("purge", "cut", "--yes", code=6)
    assert f"run {run} in flight" in box.stderr
    box.runctl("abort", "busy")
    assert box.runctl("wait", run).strip() == "succeeded"
    assert box.show(run)["attempt"] == 1
    assert done.read_text() == "once\n"


def test_turns_follow_their_submits(stopped_box: Box) -> None:
    """Within one second, and under ids that do not rise."""

    def answer(to: Scripted) -> None:
        to.begin()
        to.event(delta("yes"))
        to.event("[DONE]")

    with serving(answer) as server:
        box = stopped_box
        url = f"http://127.0.0.1:{server.server_port}/v1"
        box.configure(f'[runners.c]\nkind = "chat"\nbase_url = "{url}"\nmodel = "m"\n')
        box.start()
        time.sleep(1 - time.time() % 1)
        turns = [
            messages.Submit("talk", run=f"n{n}", runner="c", prompt=f"{n}") for n in range(8, 13)
        ]
        box.ask(*turns)
        for turn in turns:
            box.runctl("wait", str(turn.run))
        said = [m["content"] for m in server.requests[-1][2]["messages"] if m["role"] == "user"]
    assert said == [turn.prompt for turn in turns]
    assert [row["run"] for row in box.json("list", "talk")] == [t.run for t in turns[::-1]]
    (row,) = box.json("list")
    assert row["run"]["run"] == "n12"


def _rows(box: Box, query: str) -> list[str]:
    uri = f"file:{box.state / 'runctl.sqlite'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=DEADLINE)) as db:
        return [text for (text,) in db.execute(query)]


def _noted(box: Box) -> set[str]:
    """The runs of which the database knows that their end is stored."""
    return set(_rows(box, "SELECT workflow_uuid FROM workflow_output"))


@pytest.mark.parametrize("cut", ["unheard", "stored", "answered"])
def test_an_abort_cut_by_a_kill_is_whole_or_nothing(stopped_box: Box, cut: str) -> None:
    box = stopped_box
    grace = "1m" if cut == "stored" else "200ms"  # the tree uses all of it
    box.configure(f"[queue]\nstop_grace = '{grace}'\n")
    box.start()
    run = box.submit_py("cut", TREE)
    watch = Watch(box, "cut")
    pids = _pids(watch, 3)
    if cut == "unheard":
        os.kill(box.pid, signal.SIGSTOP)
    abort = box.popen("abort", "cut")
    if cut == "stored":
        statuses = "SELECT status FROM workflow_status"
        wait_until(lambda: _rows(box, statuses) == ["CANCELLED"], "its row is aborted")
        assert any(map(alive, pids)), "the tree is not gone yet"
    elif cut == "answered":
        abort.communicate(timeout=DEADLINE)
    box.kill()
    abort.communicate(timeout=DEADLINE)
    assert (abort.returncode == 0) == (cut == "answered")
    box.start()
    assert not [pid for pid in pids if alive(pid)]
    if cut != "unheard":
        assert box.show(run)["status"] == "aborted"
        assert watch.wait() == 5
        assert box.show(run)["attempt"] == 1
    else:
        wait_until(lambda: box.show(run)["attempt"] == 2, "it is replayed, and no more queued")
        box.runctl("abort", "cut")
        assert watch.wait() == 5


#: Kills the daemon whose pid is in the file argv[1], behind which its attempt's number stands.
POISON = """
import os, sys, time
file = sys.argv[1] + os.environ["RUNCTL_ATTEMPT"]
while not os.path.exists(file):
    time.sleep(0.02)
os.kill(int(open(file).read()), 9)
"""


def test_poison_ends_dead_and_the_thread_goes_on(stopped_box: Box) -> None:
    box = stopped_box
    box.configure("[queue]\nmax_attempts = 2\n")
    box.start()
    run = box.submit_py("poison", POISON, str(box.path / "pid"))
    for attempt in (1, 2):
        if attempt > 1:
            box.start(ready=False)
        assert box.daemon is not None
        (box.path / "new").write_text(str(box.daemon.pid))
        (box.path / "new").rename(box.path / f"pid{attempt}")
        assert box.daemon.wait(DEADLINE) == -signal.SIGKILL
        (box.path / f"pid{attempt}").unlink()  # it may be somebody else's soon
    box.start()
    following = box.submit_py("poison", "print('alive')")
    box.runctl("wait", following)
    wait_until(lambda: box.show(run)["status"] == "dead", "it is recorded")
    box.runctl("wait", run, code=1)
    box.runctl("attach", "poison", "--run", run, code=1)
    again = box.runctl("retry", run).strip()
    assert box.show(again)["retry_of"] == run
    box.runctl("abort", "poison", "--queued", code=None)


def test_purge(box: Box) -> None:
    run = box.submit_py("p", "print('stored')")
    box.runctl("wait", run)
    assert "stored" in box.runctl("attach", "p")
    box.runctl("purge", "p", code=2)
    box.runctl("purge", "p", "--yes")
    assert "stored" not in box.runctl("attach", "p")
    box.runctl("purge", "nobody", "--yes", code=3)
    go = box.path / "go"
    live = box.submit_py(
        "p",
        "import os, sys, time; print('before', flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\nprint('after')",
        str(go),
    )
    Watch(box, "p").wait_chunks(1)
    box.runctl("purge", "p", "--yes", code=6)
    box.runctl("purge", "p", "--yes", "--force")
    go.touch()
    assert box.runctl("wait", live).strip() == "succeeded"
    late = Watch(box, "p")
    assert late.wait() == 0
    assert "before" not in late.text()
    assert "after" in late.text()


def test_binary_and_big(box: Box) -> None:
    code = """
import hashlib, os, random, sys
r = random.Random(7); h = hashlib.sha256()
block = r.randbytes(1 << 20)
for i in range(200):
    data = block[i:] + block[:i]
    h.update(data); sys.stdout.buffer.write(data)
sys.stdout.buffer.flush()
sys.stderr.write(h.hexdigest())
"""
    run = box.submit_py("big", code)
    client = box.popen("attach", "big", "--json")
    assert client.stdout is not None
    digest, seq, stderr, size = hashlib.sha256(), 0, "", 0
    for line in client.stdout:
        event = json.loads(line)
        assert event["type"] != "gap"
        if event["type"] != "chunk":
            continue
        seq += 1
        assert event["seq"] == seq
        data = event["data"]
        raw = base64.b64decode(data) if event.get("encoding") == "base64" else data.encode()
        if event["stream"] == "stdout":
            digest.update(raw)
            size += len(raw)
        else:
            stderr += raw.decode()
    assert client.wait(DEADLINE) == 0
    assert size == 200 << 20
    assert digest.hexdigest() == stderr
    assert box.show(run)["status"] == "succeeded"
    assert box.daemon is not None
    status = Path(f"/proc/{box.daemon.pid}/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0])
    assert peak < 300 * 1024, f"the daemon's memory peaked at {peak} KiB"


NAMES = ["a b", "dots.in.it", "*", ">", "x_YQ", "日本語 🎉", "-dash", "a" * 256, "%2e", "'\"`$(x)"]


def test_thread_names_of_every_kind(box: Box) -> None:
    for name in ["", " ", "a" * 257, "x" * 10_000, "new\nline", "tab\t"]:
        box.runctl("submit", name, "--", "true", code=2)
        assert box.stderr.count("\n") == 1, box.stderr
    said = 'printf "%s" "$RUNCTL_THREAD"'
    runs = {
        name: box.runctl("submit", "--", name, "--", "sh", "-c", said).strip() for name in NAMES
    }
    for name, run in runs.items():
        box.runctl("wait", run)
        assert box.runctl("attach", "--", name) == name
    assert {row["thread"] for row in box.json("list")} == set(NAMES)
    box.runctl("purge", "*", "--yes")
    assert box.runctl("attach", ">") == ">", "a thread named * touched others"


def test_bad_requests_get_one_clear_line(box: Box) -> None:
    for args, code in [
        (("submit", "t", "--runner", "nope", "--", "true"), 2),
        (("submit", "t"), 2),
        (("submit", "t", "--id", "a.b", "--", "true"), 2),
        (("list", "nobody"), 3),
        (("show", "nothing"), 3),
        (("wait", "nothing"), 3),
        (("retry", "nothing"), 3),
        (("attach", "nobody"), 3),
    ]:
        box.runctl(*args, code=code)
        assert "Traceback" not in box.stderr, box.stderr
    box.runctl("submit", "t", "-", code=2, input=b"x" * (1024 * 1024 + 1))
    box.submit("t", "true", run="same")
    assert box.submit("t", "true", run="same") == "same"
    box.runctl("submit", "t", "--id", "same", "--", "false", code=6)
    box.runctl("wait", box.submit("t", "no-such-command"), code=1)
    assert box.json("list")[0]["thread"] == "t"
    assert box.json("status")["pid"] == box.daemon.pid if box.daemon else False


def test_a_second_daemon_names_the_holder(box: Box) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "runctl.supervisor.main", "-c", str(box.config)],
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert second.returncode == 75
    assert f"pid {box.daemon.pid if box.daemon else 0}" in second.stderr.decode()


def test_nothing_outlives_a_killed_daemon(box: Box) -> None:
    box.submit_py("tree", TREE)
    pids = _pids(Watch(box, "tree"), 3)
    box.kill()
    wait_until(lambda: not [p for p in pids if alive(p)], "the tree is gone")


def test_no_daemon_is_exit_4(stopped_box: Box) -> None:
    stopped_box.runctl("list", code=4)
    assert stopped_box.stderr.count("\n") == 1


def test_unusable_state_dir_is_a_config_error(stopped_box: Box) -> None:
    box = stopped_box
    (box.path / "file").write_text("")
    box.config.write_text(f'state_dir = "{box.path}/file"\n')
    daemon = box.start(ready=False)
    assert daemon.wait(DEADLINE) == 78
    assert "state_dir" in box.log.read_text()
    if os.getuid() == 0:
        other = box.path / "other"
        other.mkdir()
        os.chown(other, 12345, 12345)
        box.config.write_text(f'state_dir = "{other}"\n')
        assert box.start(ready=False).wait(DEADLINE) == 78
        assert "belongs to" in box.log.read_text()


GARBAGE = [
    b"",
    b"\xff\xfe\x00",
    b"[]",
    b'{"verb":"nothing"}',
    b'{"verb":"submit"}',
    b'{"verb":"submit","thread":7}',
    b'{"verb":"submit","thread":"t","argv":["true"],"surprise":1}',
    b'{"verb":"list","limit":-1}',
    b'{"verb":"purge","threads":[]}',
    b"x" * 2_000_000,
]


def test_malformed_control_requests_are_named_and_survived(box: Box) -> None:
    async def ask() -> list[messages.Reply]:
        client = await connected(box.state)
        try:
            return [
                messages.decode_reply(
                    (await client.request("runctl.ctl.any.submit", data, DEADLINE)).data
                )
                for data in GARBAGE
            ]
        finally:
            await client.close()

    for data, reply in zip(GARBAGE, asyncio.run(ask()), strict=True):
        assert isinstance(reply, messages.Problem), data[:60]
        assert reply.code == "bad-request", (data[:60], reply)
    box.runctl("wait", box.submit("t", "true"))


def test_a_killed_broker_is_replaced_and_nothing_is_lost(box: Box) -> None:
    assert box.daemon is not None
    # In its middle whenever the server is killed, and goes on meanwhile.
    code = """
import os, sys, time
for i in range(40):
    while i == 10 and not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    print(f"line-{i}", flush=True)
    time.sleep(0.05)
"""
    go = box.path / "go"
    run = box.submit_py("broker", code, str(go))
    watch = Watch(box, "broker")
    wait_until(lambda: "line-9\n" in watch.text(), "it is in its middle")
    (server,) = children(box.daemon.pid, "nats-server")
    os.kill(server, 9)
    go.touch()
    assert watch.wait() == 0
    assert watch.text().split() == [f"line-{i}" for i in range(40)]
    assert box.show(run)["attempt"] == 1


def test_a_server_that_cannot_start_is_named_with_its_reason(box: Box) -> None:
    run = box.submit("t", "echo", "kept")
    box.runctl("wait", run)
    assert box.term() == 0
    store, aside = box.state / "nats/store", box.state / "aside"
    store.rename(aside)
    store.touch()  # a directory is expected
    before = len(box.log.read_text())
    assert box.start(ready=False).wait(DEADLINE) == 69
    (line,) = box.log.read_text()[before:].splitlines()
    assert "nats-server did not start: Can't start JetStream:" in line, line
    assert line.endswith(f"see {box.state}/nats/server.log")
    store.unlink()
    aside.rename(store)
    box.start()
    assert box.runctl("attach", "t", "--run", run) == "kept\n"
