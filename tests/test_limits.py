"""Limits of sizes and numbers: whoever goes beyond one is told which, and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEADLINE, Box, running_box, wait_until
from natsserver import Node
from runctl.client.link import dial
from runctl.config.load import load
from runctl.config.schema import Queue
from runctl.protocol import messages, subjects
from runctl.protocol.errors import QueueFull, RunFailed
from runctl.supervisor.api.server import fit_answer
from runctl.supervisor.queue import sqlite
from runctl.supervisor.queue.admission import Backlog

MIB = 1024 * 1024
SLEEP = "import time; time.sleep(600)"


@pytest.fixture(scope="module")
def full_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with running_box(
        tmp_path_factory.mktemp("limits"),
        "[queue]\nmax_queued = 5\nmax_queued_per_thread = 3\nmax_running = 10\n"
        '[runners.echo]\nkind = "command"\nargv = ["echo", "{prompt}"]\n'
        '[runners.much]\nkind = "command"\n'
        f'argv = ["true"]\n[runners.much.env]\nMUCH = "{"x" * 200_000}"\n',
    ) as box:
        yield box


def ask(box: Box, request: messages.Request, verb: str = "") -> messages.Reply:
    """The answer to a request that our own command line would not send."""

    async def main() -> messages.Reply:
        link = await dial(load(box.config, client=True))
        try:
            subject = subjects.control_subject(verb or messages.verb_of(request))
            answer = await link.request(subject, messages.encode(request), DEADLINE)
            return messages.decode_reply(answer)
        finally:
            await link.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (messages.Submit("x" * 257, argv=["true"]), "thread name has 257 bytes; use at most 256"),
        (messages.Submit("a\tb", argv=["true"]), "control character"),
        (messages.Submit(" ", argv=["true"]), "thread name is empty"),
        (messages.Submit("t", run="r" * 65, argv=["true"]), "use 1 to 64 letters"),
        (messages.Submit("t", run="a.b", argv=["true"]), "use 1 to 64 letters"),
        (messages.Submit("t", argv=["true", "x" * 2 * MIB]), "command line is larger than 1 MiB"),
        (messages.Submit("t", argv=["true", *[""] * MIB]), "command line is larger than 1 MiB"),
        (messages.Submit("t", "echo", prompt="x" * 2 * MIB), "prompt is larger than 1 MiB"),
        (
            messages.Submit("t", argv=["true"], cwd="/" + "x" * 4096),
            "cwd is longer than 4096 bytes",
        ),
        (messages.Submit("t", "r" * 3 * MIB, argv=["true"]), "no runner named"),
        (messages.Show("r" * 3 * MIB), "no run"),
        (messages.List(status="s" * 3 * MIB), "no status"),
    ],
    ids=lambda value: None if isinstance(value, str) else messages.verb_of(value),
)
def test_each_limit_is_named(full_box: Box, request_: messages.Request, words: str) -> None:
    reply = ask(full_box, request_)
    assert isinstance(reply, messages.Problem)
    assert reply.code in ("bad-request", "not-found")
    assert words in reply.message
    assert len(reply.message) <= 2000


def test_the_command_line_says_so(full_box: Box) -> None:
    box = full_box
    many = ["x" * 100_000] * 11
    box.runctl("submit", "t", "--", "true", *many, code=2)
    assert box.stderr == (
        "runctl: the command line is larger than 1 MiB; pass data on stdin or in a file\n"
    )
    box.runctl("submit", "x" * 300, "--", "true", code=2)
    assert "use at most 256 bytes" in box.stderr
    with open("/dev/zero", "rb") as endless:
        client = box.popen("submit", "t", "--runner", "echo", "-", stdin=endless)
        _, err = client.communicate(timeout=DEADLINE)
    assert client.returncode == 2
    assert err == (
        b"runctl: the prompt is larger than 1 MiB; put it in a file and submit the file's path\n"
    )
    assert box.json("list") == []


def test_what_the_system_does_not_take_fails_the_run(full_box: Box) -> None:
    box = full_box
    run = box.runctl("submit", "big", "--runner", "echo", "-", input=b"x" * 200_000).strip()
    much = box.runctl("submit", "much", "--runner", "much", "go").strip()
    long = box.submit("long", "/" + "y" * 100_000)
    for each, words in ((run, "too long for this system"), (much, "too long for this system")):
        box.runctl("wait", each, code=1)
        shown = box.show(each)
        assert (shown["status"], shown["exit_code"]) == ("failed", 126)
        assert words in shown["error"]
        assert "pass the prompt on stdin" in shown["error"]
    box.runctl("wait", long, code=1)
    assert len(box.show(long)["error"]) < 2000
    assert "Traceback" not in box.log.read_text()


def submit(box: Box, thread: str, run: str, *argv: str) -> None:
    reply = ask(box, messages.Submit(thread, run=run, argv=list(argv or ["true"])))
    assert isinstance(reply, messages.Submitted), reply


def test_a_full_queue_is_refused_by_name(full_box: Box) -> None:
    box = full_box

    def running() -> bool:
        reply = ask(box, messages.StatusRequest())
        assert isinstance(reply, messages.DaemonStatus)
        return reply.running == 2

    for thread in ("q", "r"):
        submit(box, thread, f"blocks-{thread}", sys.executable, "-c", SLEEP)
    wait_until(running, "they run")
    for n in range(3):
        submit(box, "q", f"q{n}")
    box.runctl("submit", "q", "--", "true", code=6)
    assert box.stderr == (
        "runctl: 3 runs are queued on thread 'q' and queue.max_queued_per_thread is 3;"
        " submit again when some have run, or raise it\n"
    )
    for n in range(2):
        submit(box, "r", f"r{n}")
    submit(box, "q", "q1")  # what was accepted is answered again
    box.runctl("submit", "s", "--json", "--", "true", code=6)
    assert box.stderr == (
        "runctl: 5 runs are queued and queue.max_queued is 5;"
        " submit again when some have run, or raise it\n"
    )
    reply = ask(box, messages.Submit("s", argv=["true"]))
    assert isinstance(reply, messages.Problem)
    assert reply.code == "queue-full"
    for thread in ("q", "r"):
        assert isinstance(ask(box, messages.Abort(thread, queued=True)), messages.Aborted)
    submit(box, "s", "s")


@pytest.mark.short
async def test_the_backlog_counts_anew_before_it_refuses() -> None:
    waiting, asked = 0, 0

    async def count() -> int:
        nonlocal asked
        asked += 1
        return waiting

    backlog = Backlog(lambda: Queue(max_queued=3), count, count)
    for _ in range(3):
        await backlog.admit(1)
    assert asked == 2  # runs and bytes
    await backlog.admit(1)  # they have all run meanwhile
    assert asked == 3
    waiting = 2
    await backlog.admit(1)
    await backlog.admit(1)
    waiting = 3
    with pytest.raises(QueueFull, match=r"queue\.max_queued is 3"):
        await backlog.admit(1)


@pytest.mark.short
def test_an_error_has_a_length() -> None:
    assert len(str(RunFailed("x" * 10_000))) == 2000


def test_what_nats_does_not_carry_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    node = Node(tmp_path / "nats")
    box = Box(tmp_path)
    box.configure(f'[nats]\nurl = "{node.url}"\n')
    try:
        node.configure("max_payload: 65536")
        node.start()
        assert box.start(ready=False).wait(DEADLINE) == 78
        assert "takes messages of 65536 bytes at most" in box.log.read_text()
        box.runctl("doctor", code=1)
        least = subjects.LEAST_PAYLOAD
        node.kill()
        node.configure(f"max_payload: {least - 1}")
        node.start()
        assert box.start(ready=False).wait(DEADLINE) == 78
        assert f"set max_payload to {least} or more" in box.runctl("doctor", code=1)
        node.kill()
        node.configure(f"max_payload: {least}")
        node.start()
        box.start()
        assert "max_payload 528.0 KiB" in box.runctl("doctor"), "doctor asks for no more"
        assert box.term() == 0
        node.kill()
        node.configure("max_payload: 600000")
        node.start()
        box.start()
        box.runctl("submit", "t", "--", "true", *["x" * 99_000] * 7, code=2)
        assert "NATS takes 600000; put the data in a file" in box.stderr
        box.runctl("submit", "t", "--", "true", *["x" * 98_000] * 6, code=2)
        assert "NATS takes 600000; put the data in a file" in box.stderr
        run = box.submit("t", "true", *["x" * 96_000] * 6)
        assert len(box.show(run)["argv"]) == 7
        # A page of answers that each are small enough.
        failing = [f"/{n}" + "\x01" * 2000 for n in range(90)]
        for n, name in enumerate(failing):
            ask(box, messages.Submit("u", run=f"u{n}", argv=[name]))
        box.runctl("wait", f"u{len(failing) - 1}", code=1)
        assert len(box.json("list", "u")) == len(failing)
    finally:
        box.close()
        node.close()


def test_an_answer_too_large_is_an_error_with_a_name() -> None:
    assert fit_answer(b"x" * 1000, 1000) == b"x" * 1000
    problem = messages.decode_reply(fit_answer(b"x" * 1001, 1000))
    assert isinstance(problem, messages.Problem)
    assert "the answer has 1001 bytes, NATS takes 1000" in problem.message


@pytest.mark.nightly
def test_bytes_that_wait_are_bounded_and_given_back(stopped_box: Box) -> None:
    """Prompts that wait behind a run; and the database when they are forgotten."""
    box = stopped_box
    box.configure('[queue]\nmax_queued_bytes = "4MiB"\n[history]\nmax_runs = 1\n')
    box.start()
    submit(box, "t", "holds", sys.executable, "-c", SLEEP)
    prompt = "x" * (MIB - 64)
    replies = [ask(box, messages.Submit("t", None, f"r{n}", prompt, ["true"])) for n in range(4)]
    assert [isinstance(reply, messages.Submitted) for reply in replies] == [True, True, True, False]
    refused = replies[3]
    assert isinstance(refused, messages.Problem)
    assert refused.code == "queue-full"
    assert refused.message.startswith("runs of 3.0 MiB are queued, and one of 1.0 MiB is more than")
    big = ("submit", "u", "-", "--", "cat")
    box.runctl(*big, code=6, input=prompt.encode())
    assert "queue.max_queued_bytes, 4.0 MiB, has room for" in box.stderr
    box.runctl("submit", "u", "--attach", "--", "true")
    assert isinstance(
        ask(box, messages.Submit("t", None, "r0", prompt, ["true"])), messages.Submitted
    )

    database = box.state / "runctl.sqlite"
    box.runctl("abort", "t")
    box.runctl("wait", "r2")

    def small() -> bool:
        with contextlib.closing(sqlite3.connect(database, timeout=30)) as db:
            (free,), (pages,) = (db.execute(f"PRAGMA {x}").fetchone() for x in (
                "freelist_count", "page_count"))  # fmt: skip
        return free < 256 and pages * 4096 < 3 * MIB

    wait_until(small, "the space of what was forgotten is given back")


@pytest.mark.short
def test_a_database_that_could_give_nothing_back_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "runctl.sqlite"
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.executescript("PRAGMA journal_mode=WAL; CREATE TABLE t (x); INSERT INTO t VALUES (1)")
    sqlite.prepare(file)
    with contextlib.closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA auto_vacuum").fetchone() == (2,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("SELECT x FROM t").fetchall() == [(1,)]
