"""The oracle sees what it is for, and rounds of faults leave nothing for it to see.

RUNCTL_FAULTS=100 runs so many rounds rather than six; the seeds go on from the first."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import DEADLINE, NIGHT, Box, Watch, wait_until
from proc import alive
from runctl.cli.display.json_output import JsonOutput
from runctl.cli.following.follow import Options, follow
from runctl.client.cancellation import give_up
from runctl.client.link import Link, LinkLost, dial
from runctl.client.locate import Target
from runctl.config.load import load
from runctl.protocol import messages, records, subjects
from runctl.protocol.model import Outcome, Run, Status

from faults.__main__ import Theatre
from faults.client import Client
from faults.history import Absence, History, Silence
from faults.journal import Line
from faults.load import Seen, Told
from faults.oracle import Facts, Judge
from faults.parts import SmallDisk
from faults.plan import KINDS, PROFILES, Act, Work, make, profile_of
from faults.report import BEGIN, END, Report, one_line
from faults.round import Result
from faults.work import stream_of, text

ROUNDS = int(os.environ.get("RUNCTL_FAULTS", "6" if NIGHT else "3"))
FIRST = 100


# ---- the oracle: a round that is right, and everything that can be wrong with one ------


def _work(run: str, parts: int = 6) -> Work:
    return Work(run, "t", "shell", "lines", parts, 0.0, 3, 0, 0.0, 0)


def _lines(run: str, label: str, start: float, parts: int = 6, ends: bool = True) -> list[Line]:
    at, writer = start, f"a/{run}-{label}"
    found = [Line(run, label, writer, "begin", 0, 0, at)]
    for part in range(1, parts + 1):
        at += 0.1
        found.append(Line(run, label, writer, "part", part, 3, at))
    if ends:
        found.append(Line(run, label, writer, "end", 0, 0, at + 0.05))
    return found


def _records(run: str, attempt: int, parts: int = 6) -> list[records.Record]:
    chunks = [
        records.Chunk(stream_of(part), text(run, str(attempt), part, 3).encode())
        for part in range(1, parts + 1)
    ]
    return [
        records.Reset(run, attempt, 0.0),
        records.Chunks(attempt, 1, 0.0, chunks[:2]),
        records.Chunks(attempt, 3, 0.0, chunks[2:]),
        records.End(run, attempt, parts, 0.0, Outcome(Status.SUCCEEDED, 0)),
    ]


def _events(run: str, attempt: int, parts: int = 6, ends: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"type": "reset", "run": run, "attempt": attempt}]
    for part in range(1, parts + 1):
        found.append(
            {
                **{"type": "chunk", "run": run, "attempt": attempt, "seq": part},
                **{"stream": stream_of(part), "data": text(run, str(attempt), part, 3)},
            }
        )
    if ends:
        end = {"status": "succeeded", "exit_code": 0, "error": None}
        found.append({"type": "end", "run": run, "attempt": attempt, **end})
    return found


def _row(run: str, attempt: int, status: Status = Status.SUCCEEDED) -> Run:
    return Run(run, "t", status, attempt, "shell", "a", "2026-01-01T00:00:00Z")


def _good() -> Facts:
    """Run one in two attempts, the first cut after three parts, and then run two. Twice there
    was no daemon: first it was stopped in order, then it was killed, and run two went on."""
    seen = Seen(Act(0.0, "attach", "t", "one"))
    seen.events = _events("one", 1, 3, ends=False) + _events("one", 2)
    seen.times, seen.code = [0.0] * len(seen.events), 0
    early = Seen(Act(0.0, "attach", "t", "two", 1.0), left=True, code=130)
    early.events = _events("two", 1, 2, ends=False)
    return Facts(
        works={"one": _work("one"), "two": _work("two")},
        accepted={"t": ["one", "two"]},
        rows=[_row("two", 1), _row("one", 2)],
        lines=_lines("one", "1", 0.0, 3, ends=False)
        + _lines("one", "2", 2.0)
        + _lines("two", "1", 4),
        stored={"one": _records("one", 2), "two": _records("two", 1)},
        watchers=[seen, early],
        brokers=1,
        logs={"a": "INFO runctld: ready\n"},
        outlive=30.0,
        absences=[
            Absence("a", 0.0, 0.0, replay=["the first start"]),
            Absence("a", 0.5, 1.5, 1, ["told to stop"]),
            Absence("a", 4.1, 4.3, 1),
        ],
        silences=[Silence("a", 0.5, 0.5, "it was stopped in order")],
    )


def _kinds(facts: Facts) -> set[str]:
    facts.__post_init__()  # what it derives, from what was changed
    return {violation.kind for violation in Judge(facts).verdict().violations}


def test_a_right_round_is_right() -> None:
    assert not Judge(_good()).verdict().violations
    assert Judge(_good()).verdict().checks > 50


Break = Callable[[Facts], Any]


def _status(status: Status) -> Break:
    def change(facts: Facts) -> None:
        facts.rows[0] = _row("two", 1, status)

    return change


def _stored(change: Callable[[list[records.Record]], Any]) -> Break:
    return lambda facts: change(facts.stored["one"])


def _seen(change: Callable[[list[dict[str, Any]]], Any]) -> Break:
    return lambda facts: change(facts.watchers[0].events)


def _drop_a_chunk(stored: list[records.Record]) -> None:
    last = stored[2]
    assert isinstance(last, records.Chunks)
    stored[2] = msgspec.structs.replace(last, chunks=last.chunks[:-1])


def _other_text(events: list[dict[str, Any]]) -> None:
    events[-2]["data"] = "something else\n"


def _again(attempt: int, start: float, *absences: Absence) -> Break:
    """Another attempt of run two, and all that comes of it, after these ``absences`` besides."""

    def change(facts: Facts) -> None:
        facts.absences.extend(absences)
        facts.rows[0] = _row("two", attempt)
        facts.lines.extend(_lines("two", str(attempt), start))
        facts.stored["two"] = _records("two", attempt)

    return change


def _fed(size: int, good: int) -> Break:
    return lambda f: f.lines.append(Line("two", "1", "a/two-1", "fed", size, good, 4.5))


def _abort(answered: float, facts: Facts) -> None:
    told = Told(Act(0.0, "abort", "t", "two"), 0.0, answered, messages.Aborted(["two"]))
    facts.aborts.append(told)
    facts.rows[0] = _row("two", 1, Status.ABORTED)
    facts.stored["two"][-1] = records.End("two", 1, 6, 0.0, Outcome(Status.ABORTED))


BREAKS: dict[str, tuple[str, Break]] = {
    "an accepted run is gone": ("lost", lambda f: f.rows.pop()),
    "a run is listed twice": ("repeated", lambda f: f.rows.append(f.rows[0])),
    "a run nobody submitted": ("wrong", lambda f: f.rows.append(_row("three", 1))),
    "a run that never ends": ("lost", _status(Status.RUNNING)),
    "a run that failed though its work did not": ("wrong", _status(Status.FAILED)),
    "an abort nobody asked for": ("wrong", _status(Status.ABORTED)),
    "a success without the work": ("lost", lambda f: f.lines.pop(-2)),
    "an attempt that ran twice": (
        "repeated",
        lambda f: f.lines.append(Line("two", "1", "other", "begin", 0, 0, 4.0)),
    ),
    "a part that was done twice": (
        "repeated",
        lambda f: f.lines.insert(-1, Line("two", "1", "a/two-1", "part", 3, 3, 4.4)),
    ),
    "an attempt of two processes": (
        "repeated",
        lambda f: f.lines.append(Line("two", "1", "a/other", "alive", 0, 0, 4.5)),
    ),
    "an attempt that could have gone on": ("repeated", _again(2, 5.0)),
    "an attempt after its daemon was late, and its time was not over": (
        "repeated",
        _again(2, 40.0, Absence("a", 4.1, 33.0, 1)),
    ),
    "an attempt after another executor's stop": (
        "repeated",
        _again(2, 5.0, Absence("b", 4.0, 4.9, 1, ["told to stop"])),
    ),
    "more attempts than daemons ended": ("repeated", _again(4, 5.0)),
    "what lived on after an orderly stop": (
        "orphan",
        lambda f: f.lines.append(Line("one", "1", "a/one-1", "alive", 0, 0, 0.9)),
    ),
    "what lived on though no daemon came": (
        "orphan",
        lambda f: f.silences.append(Silence("a", 4.2, 4.4, "no daemon came in time")),
    ),
    "what lived on though nothing outlives its daemon": (
        "orphan",
        lambda f: setattr(f, "outlive", 0.0),
    ),
    "a prompt of which some is missing": ("lost", _fed(-1, 0)),
    "a prompt of which some came twice": ("repeated", _fed(1, 0)),
    "a prompt of other bytes": ("repeated", _fed(0, 0)),
    "another exit code": (
        "wrong",
        lambda f: f.stored["two"].append(
            records.End("two", 1, 6, 0.0, Outcome(Status.SUCCEEDED, 7))
        ),
    ),
    "an attempt that the database does not know": (
        "repeated",
        lambda f: f.lines.extend(_lines("two", "2", 9.0)),
    ),
    "runs out of order": ("wrong", lambda f: f.accepted["t"].reverse()),
    "two attempts at once": (
        "overlap",
        lambda f: f.lines.append(Line("one", "1", "left", "alive", 0, 0, 2.1)),
    ),
    "two runs at once": (
        "overlap",
        lambda f: f.lines.append(Line("one", "2", "left", "alive", 0, 0, 4.5)),
    ),
    "work after its abort was answered": ("orphan", lambda f: _abort(4.3, f)),
    "no end is stored": ("lost", _stored(lambda r: r.pop())),
    "nothing is stored": ("lost", lambda f: f.stored.clear()),
    "a chunk is not stored": ("lost", _stored(_drop_a_chunk)),
    "a record is not stored": ("lost", _stored(lambda r: r.pop(1))),
    "a record is stored twice": ("repeated", _stored(lambda r: r.insert(2, r[1]))),
    "the cut attempt is stored as well": (
        "repeated",
        _stored(lambda r: r.insert(0, records.Reset("one", 1, 0.0))),
    ),
    "a watcher missed a chunk": ("lost", _seen(lambda e: e.pop(6))),
    "a watcher saw a chunk twice": ("repeated", _seen(lambda e: e.insert(6, e[6]))),
    "a watcher saw the reply twice": ("repeated", _seen(lambda e: e.extend(e[4:]))),
    "a watcher was told of a gap": (
        "lost",
        _seen(lambda e: e.insert(5, {"type": "gap", "from": 1, "to": 0})),
    ),
    "a watcher did not see the reset": ("repeated", _seen(lambda e: e.pop(4))),
    "a watcher saw other text": ("repeated", _seen(_other_text)),
    "a watcher saw another end": ("wrong", _seen(lambda e: e[-1].update(status="failed"))),
    "a watcher's exit code": ("wrong", lambda f: setattr(f.watchers[0], "code", 1)),
    "a process is left": ("orphan", lambda f: f.processes.update({7: "one"})),
    "a second nats-server": ("orphan", lambda f: setattr(f, "brokers", 2)),
    "a traceback in a log": (
        "log",
        lambda f: f.logs.update(a="ERROR x\nTraceback (most recent call last):\n"),
    ),
    "a warning of asyncio in a log": (
        "log",
        lambda f: f.logs.update(a="Task exception was never retrieved\n"),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_oracle_sees(name: str) -> None:
    kind, change = BREAKS[name]
    facts = _good()
    change(facts)
    assert kind in _kinds(facts), name


def _chat_history(said: str) -> Facts:
    facts = _good()
    facts.works["one"] = replace(_work("one"), kind="chat")
    facts.lines = [
        replace(line, label="c1", writer="c1") if line.run == "one" else line
        for line in facts.lines
    ]
    facts.lines = [line for line in facts.lines if line.run != "one" or line.at >= 2.0]
    facts.watchers, facts.stored, facts.rows, facts.accepted = [], {}, [], {}
    facts.histories = {"c2": [said]}
    facts.__post_init__()
    return facts


def test_the_oracle_reads_what_chats_were_told() -> None:
    whole = "".join(text("one", "c1", part, 3) for part in range(1, 7))
    said = Judge(_chat_history(whole)).verdict().violations
    assert not [v for v in said if "history" in v.text]
    cut = Judge(_chat_history(whole[:-5])).verdict().violations
    assert [v for v in cut if "history" in v.text]


def test_what_is_permitted_is_not_reported() -> None:
    facts = _good()
    facts.lines.append(Line("one", "1", "a/one-1", "alive", 0, 0, 2.1))
    facts.silences.clear()
    facts.pauses = [(1.5, 2.2)]  # the executor of attempt 1 was stopped meanwhile
    facts.__post_init__()
    verdict = Judge(facts).verdict()
    assert not verdict.violations
    assert verdict.excused == 1
    aborted = _good()
    _abort(9.0, aborted)
    assert not _kinds(aborted)
    late = _good()
    _again(2, 50.0)(late)
    late.absences[2].ended = 45.0
    assert not _kinds(late), "its time was over"
    harmful = _good()
    _again(2, 5.0)(harmful)
    harmful.absences[2].ends = 3
    harmful.logs["a"] += "ERROR run two seems to take its daemon down: it is ended\n"
    assert not _kinds(harmful), "three daemons had ended meanwhile"
    harmful.absences[2].ends = 2
    assert _kinds(harmful) == {"repeated"}


def test_a_history_says_what_was_to_go_on() -> None:
    history = History("a")
    history.note_ready(1.0)
    history.note_end(2.0, -9)
    history.note_end(2.5, -9)
    history.note_ready(3.0)
    killed = history.absences[-1]
    assert (killed.began, killed.ended, killed.ends) == (2.0, 3.0, 2)
    assert not killed.permits_replay(30.0)
    assert killed.permits_replay(1.0), "it was away for longer"
    history.note_again(4.0)
    history.note_ready(5.0)
    assert not history.absences[-1].permits_replay(30.0)
    history.note_end(6.0, 69)
    history.note_ready(7.0)
    assert not history.absences[-1].permits_replay(30.0)
    for code, why in ((0, "told to stop"), (69, "its keeper was killed"), (75, "")):
        if why:
            history.end_runs(7.5, why)
        history.note_end(8.0, code)
        history.note_ready(9.0)
        assert history.absences[-1].permits_replay(30.0), code
    history.note_end(20.0, -9)
    history.note_ready(21.0)
    history.doubt(20.5, 20.6, "PostgreSQL killed")
    assert history.absences[-1].permits_replay(30.0)
    history.note_end(40.0, -9)
    history.note_ready(41.0)
    assert not history.absences[-1].permits_replay(30.0), "long after that"


# ---- plans and figures ----------------------------------------------------------------


def test_a_seed_is_a_plan() -> None:
    for profile in PROFILES:
        kinds = set(KINDS[profile])
        assert make(7, profile, kinds).text() == make(7, profile, kinds).text()
        assert make(7, profile, kinds).text() != make(8, profile, kinds).text()
        few = make(7, profile, kinds - {"daemon killed"})
        assert few.lanes == make(7, profile, kinds).lanes
    assert {profile_of(seed, "mixed") for seed in range(FIRST, FIRST + 10)} == set(PROFILES)


def test_a_report_replaces_the_figures_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nformer\n{END}\nafter\n")
    result = Result(make(7, "embedded", set()), tmp_path)
    result.counts["runs"] = 1234
    result.faults["daemon killed"] = 3
    report = Report("make faults SEED=7")
    report.add(result, {"disk full": "no mount"})
    report.write(page)
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "former" not in written
    assert "| runs | 1,234 | 0 |" in written
    assert "| daemon killed | 3 | 0 |" in written
    assert "no mount" in written
    assert "ok" in one_line(result)


# ---- what rounds have found -----------------------------------------------------------


#: Says something, waits for a file, and says so much that no block has room for it.
TALKS = """
import os, sys, time
print("before", os.getpid(), flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
print("after" + "x" * 100000)
"""


@pytest.fixture
def disk(stopped_box: Box) -> Iterator[SmallDisk]:
    """The small file system on which ``stopped_box`` has its state."""
    box = stopped_box
    try:
        made = SmallDisk(box.path / "disk")
    except OSError as error:
        pytest.skip(f"no small file system can be mounted: {error}")
    box.state = made.path / "state"
    box.configure("[stream]\nmax_bytes = '32MiB'\n")
    try:
        yield made
    finally:
        box.close()
        made.close()


@pytest.mark.parametrize("full", ["all", "the database's alone"])
def test_a_full_disk_loses_nothing(stopped_box: Box, disk: SmallDisk, full: str) -> None:
    """Runs that end while nothing can be stored, and what is asked for meanwhile."""
    box = stopped_box
    if full != "all":
        (box.path / "store").mkdir()
        box.start()
        box.term()
        shutil.rmtree(box.state / "nats" / "store")
        (box.state / "nats" / "store").symlink_to(box.path / "store")
    box.start()
    go = box.path / "go"
    runs = {f"full-{n}": box.submit_py(f"full-{n}", TALKS, str(go)) for n in range(3)}
    watches = [Watch(box, thread) for thread in runs]
    for watch in watches:
        wait_until(lambda watch=watch: "\n" in watch.text(), "its first line, whole")
    disk.fill()
    box.runctl("submit", "full-0", "--", "echo", "x" * 90000, code=1)
    assert "disk is full" in box.stderr
    assert box.stderr.count("\n") == 1, box.stderr
    go.touch()
    pids = [int(watch.text().split()[1]) for watch in watches]
    wait_until(lambda: not any(map(alive, pids)), "the runs end meanwhile")
    disk.empty()
    for watch in watches:
        assert watch.wait() == 0
        first, _, rest = watch.text().partition("\n")
        assert first.startswith("before ")
        assert rest == "after" + "x" * 100000 + "\n"
    for run in runs.values():
        wait_until(lambda run=run: box.show(run)["ended_at"], "it is recorded")
        assert box.show(run)["status"] == "succeeded"
    box.runctl("wait", box.submit("full-0", "echo", "more"))
    assert "Traceback" not in box.log.read_text()


def test_a_start_without_room_is_one_line(stopped_box: Box, disk: SmallDisk) -> None:
    box = stopped_box
    box.start()
    box.term()
    disk.fill()
    assert box.start(ready=False).wait(DEADLINE) == 69
    assert "make room" in box.log.read_text().splitlines()[-1]
    disk.empty()
    box.start()
    assert "Traceback" not in box.log.read_text()


def test_an_abort_does_not_undo_an_end_that_is_not_recorded_yet(box: Box) -> None:
    go = box.path / "go"
    code = "import os, sys, time\nprint('up', flush=True)\n"
    code += "while not os.path.exists(sys.argv[1]): time.sleep(0.02)"
    run = box.submit_py("late", code, str(go))
    watch = Watch(box, "late")
    watch.wait_chunks(1)
    with sqlite3.connect(box.state / "runctl.sqlite", isolation_level=None) as database:
        database.execute("BEGIN IMMEDIATE")  # the daemon cannot write
        go.touch()
        assert watch.wait() == 0
        assert box.runctl("abort", "late", "--run", run, code=6) == ""
        assert "ended by itself before it could be aborted" in box.stderr
        database.execute("ROLLBACK")
    database.close()
    wait_until(lambda: box.show(run)["ended_at"], "it is recorded")
    assert box.show(run)["status"] == "succeeded"


def test_following_a_thread_does_not_begin_amid_another_run(
    box: Box, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run before ended while the one to follow was looked for."""
    code = "import time\nfor i in range(5): print(i, flush=True); time.sleep(0.05)"
    before = box.submit_py("t", code)
    box.runctl("wait", before)
    ours = box.submit("t", "echo", "ours")
    box.runctl("wait", ours)
    config = load(box.config)

    async def watch() -> None:
        link = await dial(config)
        query = {"last_by_subj": subjects.out_subject("t", before)}
        reply = await link.api(f"STREAM.MSG.GET.{subjects.STREAM}", query)
        await link.close()
        target = Target("t", ours, None, int(reply["message"]["seq"]) - 1)
        deadline = asyncio.get_running_loop().time() + DEADLINE
        options, output = Options(follow_thread=True), JsonOutput()
        following = asyncio.create_task(
            follow(config, lambda: dial(config), target, options, output, deadline=deadline)
        )
        while '"end"' not in seen[-1] and not following.done():
            await asyncio.sleep(0.05)
            seen[-1] += capfd.readouterr().out
        assert not following.done(), "it waits for what comes next on the thread"
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following

    capfd.readouterr()
    seen = [""]
    asyncio.run(watch())
    events = [json.loads(line) for line in (seen[0] + capfd.readouterr().out).splitlines()]
    assert [event["type"] for event in events] == ["reset", "chunk", "end"], events
    assert {event["run"] for event in events} == {ours}


def test_requests_do_not_close_the_connection_that_others_have_dialled(box: Box) -> None:
    """Twelve that share one failed together, and closed each other's next one for minutes."""

    async def main() -> None:
        client = Client(box.config)
        late = asyncio.Event()

        async def fail(link: Link) -> None:
            await link.close()
            await late.wait()
            raise LinkLost("as when its server ended")

        async def hold(link: Link) -> Link:
            return link

        failing = asyncio.create_task(client.use(fail))
        first = await client.use(hold)
        await first.closed.wait()
        second = await client.use(hold)
        assert second is not first
        late.set()
        with pytest.raises(LinkLost):
            await failing
        assert await client.use(hold) is second
        assert not second.closed.is_set()
        await client.sure(messages.List(), messages.Threads)
        await client.close()

    asyncio.run(main())


def test_a_request_that_is_given_up_as_it_fails_says_nothing() -> None:
    """What asyncio prints of an error that nobody asked for came between a user's lines."""
    said: list[dict[str, Any]] = []

    async def fail() -> None:
        raise LinkLost("as it is given up")

    async def fail_late() -> None:
        try:
            await asyncio.sleep(DEADLINE)
        finally:
            await fail()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        tasks = [asyncio.create_task(fail()), asyncio.create_task(fail_late())]
        await asyncio.wait(tasks[:1])
        give_up(tasks)
        await asyncio.wait(tasks)

    asyncio.run(main())
    gc.collect()
    assert not said


# ---- rounds ---------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "share"), [("embedded", 0.6), ("shared", 0.4)])
def test_rounds(tmp_path: Path, profile: str, share: float) -> None:
    """What ``make faults`` does."""

    async def play() -> None:
        theatre = Theatre(tmp_path)
        try:
            for seed in range(FIRST, FIRST + round(ROUNDS * share)):
                result, _ = await theatre.round(seed, profile)
                print(one_line(result))
                found = "\n".join(map(str, result.violations))
                assert not found, "\n".join(
                    [found, result.plan.replay, str(result.folder), *result.plan.schedule()]
                )
        finally:
            await theatre.close()

    asyncio.run(play())
