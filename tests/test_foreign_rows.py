"""Rows that cannot be read: another program's, copies that DBOS's tools made, spoilt ones. Each
is shown as such, ends with the reason, and is in nobody's way. The real dbos command."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, wait_until
from house import House
from runctl.protocol import messages

pytestmark = pytest.mark.long

WHY = "its record cannot be read"
INPUT = "UPDATE workflow_input SET inputs = '{}' WHERE workflow_uuid = :run"
ROW = "UPDATE workflow_status SET {} WHERE workflow_uuid = :run"
#: What a hand, or another program, may make of a row, and what the reason names then.
SPOILT = [
    ("DELETE FROM workflow_input WHERE workflow_uuid = :run", "its input is gone"),
    (INPUT.format("[1, 2"), "its input is none of runctl's"),
    (INPUT.format("[" * 100_000), "its input is none of runctl's"),
    (INPUT.format('{"positionalArgs": [{"run": 7}]}'), "its input is none of runctl's"),
    (INPUT.format('{"positionalArgs": []}'), "its input is none of runctl's"),
    (ROW.format("serialization = 'py_pickle'"), "its input is in another format"),
    (ROW.format("name = 'theirs'"), "it is a workflow 'theirs' of another program"),
    (ROW.format("class_name = 'x', config_name = 'y'"), "it is of another program"),
]


def change(box: Box, *texts: str, run: str) -> None:
    with sqlite3.connect(box.state / "runctl.sqlite", timeout=DEADLINE) as db:
        for text in texts:
            db.execute(text, {"run": run})
    db.close()


def submit(box: Box, threads: Collection[str], *argv: str) -> list[str]:
    return [x.run for x in box.ask(*(messages.Submit(t, argv=list(argv)) for t in threads))]


def show(box: Box, runs: Collection[str]) -> list[Any]:
    return box.ask(*(messages.Show(run) for run in runs))


def wait_for(box: Box, runs: Collection[str], status: str) -> list[Any]:
    """The runs, as they are shown once all of them are ``status``."""
    shown: list[Any] = []

    def are() -> bool:
        shown[:] = [reply.run for reply in show(box, runs)]
        return all(run.status == status for run in shown)

    wait_until(are, f"{status}: {shown}")
    return shown


def dbos(box: Box, url: str, *args: str) -> str:
    program = str(Path(sys.executable).parent / "dbos")
    argv = [program, "workflow", *args, "--sys-db-url", url]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=box.path, timeout=DEADLINE)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def test_rows_that_cannot_be_read(box: Box) -> None:
    """Running and queued ones, of which each kind ends with its reason when its turn comes."""
    threads = [f"t{n}" for n in range(len(SPOILT))]
    running = submit(box, threads, "sleep", "600")
    behind = submit(box, threads, "true")
    holding, queued, aborted, last = submit(box, ["q"] * 4, "sleep", "600")
    wait_for(box, [*running, holding], "running")
    box.kill()
    gone = SPOILT[0][0]
    for run, (text, _) in zip(running, SPOILT, strict=True):
        change(box, text, run=run)
    moved = ROW.format("queue_partition_key = 'moved'")
    change(box, moved, run=queued)
    change(box, gone, run=aborted)
    change(box, INPUT.format("null"), run=last)
    box.start()

    ended = wait_for(box, running, "failed")
    assert [run.error for run in ended] == [f"{WHY}: {why}" for _, why in SPOILT]
    wait_for(box, behind, "succeeded")
    wait_for(box, [queued], "failed")
    assert [x["run"]["error"] for x in box.json("list") if x["thread"] == "moved"] == [
        f"{WHY}: it was submitted to thread 'q'"
    ]
    assert box.show(aborted)["error"] == f"{WHY}: its input is gone"
    assert box.show(aborted)["status"] == "queued"
    box.runctl("abort", "q", "--run", aborted)
    box.runctl("abort", "q", "--run", holding)
    wait_for(box, [aborted], "aborted")
    wait_for(box, [last], "failed")
    box.runctl("retry", last, code=6)
    assert "submit it anew" in box.stderr
    box.runctl("purge", "q", *threads, "--yes")
    assert box.json("list")
    assert "Traceback" not in box.log.read_text()


def test_an_outcome_that_cannot_be_read(box: Box) -> None:
    run, later = submit(box, ["t", "u"], "true")
    wait_for(box, [run, later], "succeeded")
    change(box, "UPDATE workflow_output SET output = 'x' WHERE workflow_uuid = :run", run=run)
    shown = box.show(run)
    assert shown["error"] == f"{WHY}: its outcome is none of runctl's"
    assert shown["status"] == "failed"
    assert {row["run"]["run"] for row in box.json("list")} == {run, later}


def test_rows_of_another_program_on_postgresql(house: House) -> None:
    """Inserted as its client enqueues: without a version, on a thread or on none."""
    box = house.box("a")
    holding, spoilt, last = submit(box, ["q"] * 3, "sleep", "600")
    wait_for(box, [holding], "running")
    house.sql(f"UPDATE dbos.workflow_input SET inputs = '[1, 2' WHERE workflow_uuid = '{spoilt}'")
    for run, name, queue, thread in [
        ("none", "theirs", "'threads'", "NULL"),
        ("behind", "theirs", "'threads'", "'q'"),
        (f"{last}.hook", "tell_hook", "'_dbos_internal_queue'", "NULL"),
    ]:
        house.sql(
            "INSERT INTO dbos.workflow_status (workflow_uuid, name, status, queue_name,"
            f" queue_partition_key) VALUES ('{run}', '{name}', 'ENQUEUED', {queue}, {thread})"
        )
    assert {row["thread"] for row in box.json("list")} == {"q", "(none)"}
    assert WHY in box.show("behind")["error"]
    box.runctl("abort", "q", "--run", "behind")
    wait_for(box, ["behind"], "aborted")
    box.runctl("abort", "q", "--run", holding)
    (ended,) = wait_for(box, [spoilt], "failed")
    assert ended.error == f"{WHY}: its input is none of runctl's"
    wait_for(box, [last], "running")
    (ended,) = wait_for(box, ["none"], "failed")
    assert ended.error == f"{WHY}: it is a workflow 'theirs' of another program"
    # A hook that was resumed goes on where hooks are told.
    text = f"SELECT queue_name FROM dbos.workflow_status WHERE workflow_uuid = '{last}.hook'"
    wait_until(lambda: house.sql(text)[0]["queue_name"] == "hooks", "the hook is queued")
    assert "Traceback" not in box.log.read_text()


@pytest.mark.nightly
def test_what_the_dbos_command_does(box: Box) -> None:
    works_beside_dbos(box, f"sqlite:///{box.state / 'runctl.sqlite'}")


@pytest.mark.nightly
def test_what_the_dbos_command_does_on_postgresql(house: House) -> None:
    works_beside_dbos(house.box("a"), house.url)


def works_beside_dbos(box: Box, url: str) -> None:
    """As docs/troubleshooting.md has it. ``url``: of its database."""
    (done,) = submit(box, ["t"], "true")
    wait_for(box, [done], "succeeded")
    (hanging,) = submit(box, ["t"], "sleep", "600")
    queued, last = submit(box, ["t"] * 2, "true")
    wait_for(box, [hanging], "running")
    assert done in dbos(box, url, "list")
    # A copy is none of ours: it ends with the reason, on a thread of its own.
    copy = str(uuid.uuid4())
    dbos(box, url, "fork", done, "--forked-workflow-id", copy)
    assert box.json("list")
    (ended,) = wait_for(box, [copy], "failed")
    assert ended.error == f"{WHY}: it is a copy of run {done}; use runctl retry"
    assert [row["run"] for row in box.json("list", "(none)")] == [copy]
    # A queued run may be cancelled with it, and that taken back.
    dbos(box, url, "cancel", queued)
    wait_for(box, [queued], "aborted")
    box.runctl("abort", "t", "--run", hanging)
    wait_for(box, [last], "succeeded")
    dbos(box, url, "resume", queued)
    wait_for(box, [queued], "succeeded")
    # What has ended has ended.
    dbos(box, url, "resume", hanging)
    wait_until(lambda: '"SUCCESS"' in dbos(box, url, "get", hanging), "its end is adopted")
    wait_for(box, [hanging], "aborted")
    box.runctl("purge", "t", "(none)", "--yes")
    assert "Traceback" not in box.log.read_text()
