"""Whoever may write rows has no code run in the daemon: pickles in every table that DBOS reads, on
SQLite and PostgreSQL."""

from __future__ import annotations

import base64
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, wait_until
from house import House
from test_foreign_rows import WHY, show, submit, wait_for

FORMAT = f"{WHY}: its input is in another format"

#: Reads whatever DBOS hands out. argv: URL of the database, the text of the pickles' folder.
READER = """
import sys, warnings
import dbos
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, SetWorkflowID

def attempt(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__)

url = sys.argv[1]
DBOS(config=DBOSConfig(
    name="runctl", system_database_url=url, application_version="runctl-1",
    executor_id="reader", serializer=DBOSPortableJSONSerializer(), log_level="CRITICAL",
))

@DBOS.step(name="step")
def step():
    return 1

@DBOS.workflow(name="receive")
def receive():
    attempt(lambda: DBOS.recv("topic", timeout_seconds=5))

@DBOS.workflow(name="again")
def again():
    attempt(step)

DBOS.listen_queues([])
DBOS.launch()
if sys.argv[2] == "spoilt":
    for run in ("output", "error"):
        attempt(lambda: DBOS.retrieve_workflow(run).get_result())
    attempt(lambda: DBOS.list_workflows())
    attempt(lambda: DBOS.list_workflow_steps("again"))
    attempt(lambda: DBOS.get_event("output", "key", timeout_seconds=1))
    attempt(lambda: DBOS.get_all_events("output"))
    attempt(lambda: list(DBOS.read_stream("output", "key")))
    with SetWorkflowID("receive"):
        receive()
    attempt(lambda: DBOS.resume_workflow("again").get_result())
else:
    for run in ("output", "error", "receive", "again"):
        with SetWorkflowID(run):
            DBOS.enqueue_workflow("nowhere", again if run == "again" else receive)
DBOS.destroy()
"""
REFUSING = "from runctl.supervisor.queue import pickle_refusal\npickle_refusal.refuse()\n"


class _Writes:
    """When it is unpickled, ``file`` is there."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


def pickled(file: Path) -> str:
    return base64.b64encode(pickle.dumps(_Writes(file))).decode()


def on_sqlite(file: Path) -> Callable[[str], None]:
    def run(text: str) -> None:
        with sqlite3.connect(file, timeout=30) as db:
            db.executescript(text.replace("dbos.", ""))
        db.close()

    return run


def everywhere(run: Callable[[str], Any], at: Path, workflow: str) -> None:
    """What DBOS could be asked for of ``workflow``."""
    for table, columns, values in [
        ("notifications", "destination_uuid, topic, message", "'topic', '{}'"),
        ("workflow_events", "workflow_uuid, key, value", "'key', '{}'"),
        ("workflow_events_history", "workflow_uuid, key, value, function_id", "'key', '{}', 1"),
        ("streams", 'workflow_uuid, key, value, "offset", function_id', "'key', '{}', 0, 1"),
    ]:
        text = values.format(pickled(at / f"{table}-{workflow}"))
        run(
            f"INSERT INTO dbos.{table} ({columns}, serialization)"
            f" VALUES ('{workflow}', {text}, 'py_pickle')"
        )


def step_of(workflow: str, name: str, column: str, at: Path, number: int = 1) -> str:
    return (
        "INSERT INTO dbos.operation_outputs (workflow_uuid, function_id, function_name,"
        f" {column}, serialization, retention_timestamp) VALUES ('{workflow}', {number},"
        f" '{name}', '{pickled(at / f'{column}-of-step-{workflow}')}', 'py_pickle', 1)"
    )


READS = {
    *("inputs", "output", "error", "output-of-step-again"),
    *("notifications-receive", "workflow_events-output", "streams-output"),
}


@pytest.mark.parametrize("refused", [False, True])
def test_dbos_reads_none(tmp_path: Path, refused: bool) -> None:
    """What DBOS by itself runs, which this sees, and what is left of that."""
    at = tmp_path / "written"
    at.mkdir()
    file = tmp_path / "db.sqlite"
    code = (REFUSING if refused else "") + READER
    argv = [sys.executable, "-c", code, f"sqlite:///{file}"]
    subprocess.run([*argv, "new"], check=True, timeout=DEADLINE, cwd=tmp_path)
    run = on_sqlite(file)
    for name in ("output", "error"):
        status = "SUCCESS" if name == "output" else "ERROR"
        run(
            f"UPDATE workflow_status SET status = '{status}', serialization = 'py_pickle'"
            f" WHERE workflow_uuid = '{name}';"
            f" INSERT INTO workflow_output (workflow_uuid, {name}, retention_timestamp)"
            f" VALUES ('{name}', '{pickled(at / name)}', 1);"
        )
    text = pickled(at / "inputs")
    run(f"UPDATE workflow_input SET inputs = '{text}' WHERE workflow_uuid = 'output'")
    everywhere(run, at, "output")
    everywhere(run, at, "receive")
    run("DELETE FROM workflow_status WHERE workflow_uuid = 'receive'")
    run(step_of("again", "step", "output", at))
    subprocess.run([*argv, "spoilt"], check=True, timeout=DEADLINE, cwd=tmp_path)
    written = {path.name for path in at.iterdir()}
    assert written == set() if refused else written >= READS


def test_another_dbos_is_not_started() -> None:
    """One that unpickles by other ways than the one that we know."""
    code = """
import pickle, base64, dbos._serialization as formats
from runctl.supervisor.queue import pickle_refusal
from runctl.protocol.errors import Unavailable
CHANGE
try:
    pickle_refusal.refuse()
except Unavailable as error:
    print(error)
"""
    for change in (
        "formats.deserialize_args = lambda text, *_: pickle.loads(base64.b64decode(text))",
        "formats.deserialize_value = lambda *_: None",
        "del formats.deserialize_exception",
        "import dbos._core; dbos._core.pickle = pickle",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("CHANGE", change)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "would run code that stands in its database" in done.stdout, change


def hooked(path: Path) -> str:
    return (
        f'[hooks]\non_end = ["sh", "-c", "echo $RUNCTL_RUN >> {path}/told"]\n'
        'tries = 2\nbackoff = "50ms"\n'
    )


@pytest.mark.long
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_daemon_reads_none(database: str, request: pytest.FixtureRequest) -> None:
    """A kill, pickles in whatever the next daemon takes up, and nobody is kept waiting."""
    run: Callable[[str], Any]
    if database == "sqlite":
        box: Box = request.getfixturevalue("stopped_box")
        box.configure(hooked(box.path))
        run = on_sqlite(box.state / "runctl.sqlite")
    else:
        house: House = request.getfixturevalue("house")
        box = house.box("a", start=False)
        box.config.write_text(box.config.read_text() + hooked(box.path))
        run = house.sql
    box.start()
    at, told = box.path / "written", box.path / "told"
    at.mkdir()
    told.touch()
    ended = submit(box, [f"e{n}" for n in range(5)], "true")
    wait_for(box, ended, "succeeded")
    wait_until(lambda: set(ended) <= set(told.read_text().split()), "all are told of")
    wait_until(lambda: box.json("status")["hooks"]["waiting"] == 0, "their rows say so")
    running = submit(box, ["t0", "t1"], "sleep", "600")
    wait_for(box, running, "running")
    queued, older, good = submit(box, ["t0", "t1", "t1"], "true")
    box.kill()
    told.write_text("")

    def spoil(table: str, change: str, *workflows: str) -> None:
        for workflow in workflows:
            text = change.replace("PICKLE", f"'{pickled(at / workflow)}'")
            run(f"{text.replace('TABLE', f'dbos.{table}')} WHERE workflow_uuid = '{workflow}'")

    # To be told of once more: with an input, steps that are done, and by another workflow.
    hooks = [f"{run}.hook" for run in ended]
    spoil("workflow_input", "UPDATE TABLE SET inputs = PICKLE", running[0], queued, hooks[1])
    spoil("workflow_input", "DELETE FROM TABLE", running[1], older)
    spoil("workflow_status", "UPDATE TABLE SET inputs = PICKLE", running[1], older)
    spoil("workflow_output", "UPDATE TABLE SET output = PICKLE", ended[0])
    spoil("workflow_output", "UPDATE TABLE SET error = PICKLE", ended[1])
    spoil("operation_outputs", "DELETE FROM TABLE", *hooks[1:])
    spoil("workflow_status", "UPDATE TABLE SET status = 'ENQUEUED'", *hooks[1:])
    run(step_of(hooks[2], "tell", "output", at))
    run(step_of(hooks[3], "tell", "error", at))
    spoil("workflow_status", "UPDATE TABLE SET name = '_dbos_debouncer_workflow'", hooks[4])
    spoilt = [*running, queued, older, ended[0], ended[1], hooks[1]]
    spoil("workflow_status", "UPDATE TABLE SET serialization = 'py_pickle'", *spoilt)
    for workflow in (*running, queued, *ended):
        everywhere(run, at, workflow)
    run(
        "INSERT INTO dbos.workflow_schedules (schedule_id, schedule_name, workflow_name, schedule,"
        f" context) VALUES ('x', 'x', 'run_thread', '* * * * * *', '{pickled(at / 'schedule')}')"
    )

    box.start()
    shown = wait_for(box, [*running, queued, older, ended[0], ended[1]], "failed")
    assert {row.error for row in shown} == {FORMAT}
    wait_for(box, [good], "succeeded")
    box.runctl("retry", queued, code=6)
    assert len(box.json("list")) == 7
    later = submit(box, ["later"], "true")[0]
    wait_until(lambda: {good, later} <= set(told.read_text().split()), "hooks are told")
    said = {
        f"cannot be told: {FORMAT}": 1,
        "cannot be told: it is a pickle": 2,
        "it is a workflow '_dbos_debouncer_workflow' of another program": 1,
    }

    def counted() -> dict[str, int]:
        log = box.log.read_text()
        return {text: log.count(text) for text in said}

    wait_until(lambda: all(counted().values()), "each kind of hook has had its turn")
    wait_until(lambda: counted()["cannot be told: it is a pickle"] > 1, "both of them")
    assert counted() == said
    assert {reply.run.status for reply in show(box, ended[2:])} == {"succeeded"}
    assert [path.name for path in at.iterdir()] == []
    assert "Traceback" not in box.log.read_text()
