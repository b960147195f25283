"""What we write into DBOS's rows ourselves is what DBOS would write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import DEADLINE

SETUP = """
import json, os, sys
import sqlalchemy as sa
from dbos import DBOS, DBOSConfig, SetEnqueueOptions, SetWorkflowID
from runctl.supervisor.queue.dbos_internals import System
from runctl.supervisor.queue.recovery import put_back, read_tokens, reenqueue

found = {}
config = DBOSConfig(
    name="heads", system_database_url="sqlite:///" + sys.argv[1], log_level="WARNING",
    application_version="v", executor_id="e",
)
dbos = DBOS(config=config)

@DBOS.workflow()
def work() -> None: ...

DBOS.listen_queues([])
DBOS.launch()
queue = DBOS.register_queue("q", partition_concurrency=1, worker_concurrency=10)
system = System(dbos)

def enqueue(key, run, priority):
    with SetEnqueueOptions(queue_partition_key=key, priority=priority), SetWorkflowID(run):
        DBOS.enqueue_workflow("q", work)

def row(run):
    table = system.tables.workflow_status
    with system.engine.connect() as c:
        return dict(c.execute(sa.select(table).where(table.c.workflow_uuid == run)).one()._mapping)

def theirs():
    return system.claim_heads(queue, "e", "v", 10, "token")

"""

RECOVERY = """
enqueue("a", "a1", 1)
enqueue("b", "b1", 1)
enqueue("c", "c1", 1)
enqueue("d", "d1", 1)
enqueue("b", "b2", 2)
theirs()
def change(run, **values):
    table = system.tables.workflow_status
    with system.engine.begin() as c:
        c.execute(table.update().where(table.c.workflow_uuid == run).values(**values))
change("c1", executor_id="another")
change("d1", application_version="another")
found = {"theirs": dbos._sys_db.reenqueue_for_recovery("a1", ["e"], "_internal")}
found["ours"] = list(reenqueue(system, "e", "v"))
found["again"] = list(reenqueue(system, "e", "v"))
found["rows"] = [row("a1"), row("b1")]
found["others"] = [row(run)["status"] for run in ("b2", "c1", "d1")]
change("b1", status="PENDING", queue_name=None)
change("a1", status="PENDING", queue_name=None)
reenqueue(system, "e", "v")
change("a1", status="PENDING", owner_xid="one")
change("b1", status="PENDING")
tokens = read_tokens(system, "e", "v")
found["tokens"] = sorted(map(str, tokens))
found["put back"] = sorted(put_back(system, "e", "v", tokens))
change("a1", status="PENDING", owner_xid="two")
change("b1", status="PENDING", owner_xid="three")
found["late"] = list(put_back(system, "e", "v", tokens))
found["without queue"] = [row(run)["queue_name"] for run in ("a1", "b1")]
"""

RELAUNCH = """
from runctl.supervisor.queue import dbos_internals

def relaunch():
    "The status of what was running before, when DBOS's start-up is over."
    global system
    DBOS.destroy()
    dbos = DBOS(config=config)
    DBOS.listen_queues([])
    DBOS.launch()
    dbos._executor_field.shutdown(wait=True)
    system = System(dbos)
    return row("a1")["status"]

enqueue("a", "a1", 1)
theirs()
dbos._executor_field.shutdown(wait=True)
own = dbos_internals._launch.startup_recovery_thread
dbos_internals.stop_recovery()
found["stopped"] = relaunch()
dbos_internals._launch.startup_recovery_thread = own
found["own"] = relaunch()
"""

START = """
import time
from concurrent.futures import ThreadPoolExecutor
from runctl.supervisor.queue.claim_worker import ClaimedQueue, Worker

worker = Worker(system, ClaimedQueue("q", queue, 10, True), "e", "v")
system.report_executed({"q": worker})
full = dbos._executor_field
full.shutdown()
enqueue("a", "a1", 1)
worker.start()
deadline = time.monotonic() + 55
while not worker._reported and time.monotonic() < deadline:
    time.sleep(0.01)
# Between two of its tries.
while (refused := row("a1"))["status"] != "ENQUEUED" and time.monotonic() < deadline:
    time.sleep(0.01)
dbos._executor_field = ThreadPoolExecutor(2)
while (done := row("a1"))["status"] != "SUCCESS" and time.monotonic() < deadline:
    time.sleep(0.01)
# DBOS says that it is over behind that.
while (worker._started or worker.claimed) and time.monotonic() < deadline:
    time.sleep(0.01)
found = {"refused": refused, "done": done}
found |= {"coming": list(worker._started), "claimed": worker.claimed}
"""

END = """
import threading
import time
from runctl.supervisor.queue.claim_worker import ClaimedQueue, Worker

waiting = []
def execute(row, token):
    waiting.append(row["workflow_uuid"])
    threading.Event().wait()  # as for a turn of a loop that is no more
system.execute = execute
for name in "abc":
    enqueue(name, name + "1", 1)
Worker(system, ClaimedQueue("q", queue, 10, True), "e", "v").start()
deadline = time.monotonic() + 30
while len(waiting) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
with open(sys.argv[2], "w") as file:
    json.dump(sorted(waiting), file)
DBOS.destroy(workflow_completion_timeout_sec=0)
sys.exit()
"""

CANCEL = """
import threading
import trio
from runctl.supervisor.queue.attempt_rows import AttemptRows
from runctl.supervisor.queue.row_access import RowAccess

rows = AttemptRows(RowAccess(system, "e", threading.Event(),
                             threads=trio.CapacityLimiter(1), alone=True))
for key in ("a", "b", "c"):
    enqueue(key, key + "1", 1)
theirs()
dbos._sys_db.cancel_workflows(["a1"])
trio.run(rows.cancel, "b1")
found["rows"] = [row("a1"), row("b1")]
trio.run(rows.cancel, "b1")
found["again"] = row("b1")
with system.engine.begin() as c:
    table = system.tables.workflow_status
    c.execute(table.update().where(table.c.workflow_uuid == "c1").values(status="SUCCESS"))
trio.run(rows.cancel, "c1")
found["over"] = row("c1")["status"]
"""

STOPPING = """
import threading
from types import SimpleNamespace
import sqlalchemy
import trio
from runctl.protocol.model import RunSpec
from runctl.supervisor.queue.attempt_rows import AttemptRows
from runctl.supervisor.queue.conversation_rows import ConversationRows
from runctl.supervisor.queue.row_access import RowAccess

stopping = threading.Event()
stopping.set()
away = sqlalchemy.create_engine("sqlite:////nowhere/at/all")
away = SimpleNamespace(engine=away, tables=system.tables, now=system.now)
access = RowAccess(away, "e", stopping, threads=trio.CapacityLimiter(1), alone=True)
rows, conversations = AttemptRows(access), ConversationRows(access)

async def ask(what, *args):
    with trio.move_on_after(1) as limit:
        await what(*args)
    return limit.cancelled_caught

found["renumber"] = trio.run(ask, rows.renumber, "a1", 1, 2)
found["aborts"] = trio.run(ask, rows.find_aborts, RunSpec("a1", "a", "chat"))
found["turns"] = trio.run(ask, conversations.read_turns, "a", "a1", 10, 1000)
# And while it is merely away nobody keeps a thread.
stopping.clear()
found["turns, away"] = trio.run(ask, conversations.read_turns, "a", "a1", 10, 1000)
"""

SAVE = """
with open(sys.argv[2], "w") as file:
    json.dump(found, file, default=str)
os._exit(0)
"""

TIMES = {"created_at", "updated_at", "started_at_epoch_ms"}


def run(tmp_path: Path, program: str) -> Any:
    file = tmp_path / "found.json"
    argv = [sys.executable, "-c", SETUP + program + SAVE]
    argv += [str(tmp_path / "dbos.sqlite"), str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_dbos_recovers_nothing_by_itself(tmp_path: Path) -> None:
    """It would put back what was recovered, and claimed again, before it came to it."""
    found = run(tmp_path, RELAUNCH)
    assert found["stopped"] == "PENDING"
    assert found["own"] == "ENQUEUED", "that is what DBOS does, and when"


def test_a_recovery_writes_what_dbos_writes(tmp_path: Path) -> None:
    found = run(tmp_path, RECOVERY)
    assert found["theirs"] is True
    assert found["ours"] == ["b1"], "all that is left of this executor and version"
    assert found["again"] == []
    theirs, ours = found["rows"]
    assert ours["status"] == "ENQUEUED"
    differ = {name for name in theirs if theirs[name] != ours[name]}
    assert differ <= {"workflow_uuid", "queue_partition_key", "creator_xid", *TIMES}
    assert set(theirs) == set(ours)
    assert all((theirs[name] is None) == (ours[name] is None) for name in TIMES)
    assert found["others"] == ["ENQUEUED", "PENDING", "PENDING"]
    assert found["without queue"] == ["_dbos_internal_queue"] * 2
    assert (found["tokens"], found["put back"]) == (["None", "one"], ["a1", "b1"])
    assert found["late"] == [], "what was claimed anew stays where it is"


def test_what_cannot_be_started_goes_back_to_its_queue(tmp_path: Path) -> None:
    """DBOS has no thread for it at first: no attempt is counted, and nobody else need wait."""
    found = run(tmp_path, START)
    assert (found["refused"]["status"], found["refused"]["recovery_attempts"]) == ("ENQUEUED", 0)
    assert found["refused"]["owner_xid"] is None
    assert (found["done"]["status"], found["done"]["recovery_attempts"]) == ("SUCCESS", 1)
    assert (found["coming"], found["claimed"]) == ([], {})


def test_an_abort_writes_what_dbos_writes_but_for_the_start(tmp_path: Path) -> None:
    found = run(tmp_path, CANCEL)
    theirs, ours = found["rows"]
    assert ours["status"] == "CANCELLED"
    differ = {name for name in theirs if theirs[name] != ours[name]}
    times = {*TIMES, "completed_at"}
    assert differ <= {"workflow_uuid", "queue_partition_key", "creator_xid", *times}
    assert theirs["started_at_epoch_ms"] is None
    assert ours["started_at_epoch_ms"] is not None
    assert ours["completed_at"] is not None
    assert found["again"] == ours
    assert found["over"] == "SUCCESS"


def test_a_stop_fails_no_run_that_asks_the_database(tmp_path: Path) -> None:
    """It would be stored as failed: whoever asks waits for the end of the process."""
    asked = ("renumber", "aborts", "turns", "turns, away")
    assert run(tmp_path, STOPPING) == dict.fromkeys(asked, True)


def test_what_waits_to_begin_holds_up_no_end_of_the_daemon(tmp_path: Path) -> None:
    assert run(tmp_path, END) == ["a1", "b1", "c1"]
