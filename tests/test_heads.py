"""Our claim of a thread's next run writes what DBOS's own claim writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, os, sys
import sqlalchemy as sa
from dbos import DBOS, DBOSConfig, SetEnqueueOptions, SetWorkflowID
from dbos._dbos import _get_dbos_instance
from runctl.supervisor.heads import Heads

DBOS(config=DBOSConfig(
    name="heads", system_database_url="sqlite:///" + sys.argv[1], log_level="WARNING",
    application_version="v", executor_id="e",
))

@DBOS.workflow()
def work() -> None: ...

DBOS.listen_queues([])
DBOS.launch()
queue = DBOS.register_queue("q", partition_concurrency=1, worker_concurrency=10)
system = _get_dbos_instance()._sys_db

def enqueue(key, run, priority):
    with SetEnqueueOptions(queue_partition_key=key, priority=priority), SetWorkflowID(run):
        DBOS.enqueue_workflow("q", work)

def row(run):
    table = system.tables.workflow_status
    with system.engine.connect() as c:
        return dict(c.execute(sa.select(table).where(table.c.workflow_uuid == run)).one()._mapping)

def theirs():
    return system.start_queued_partitioned_workflows(
        queue, "e", "v", 10, owner_xid="token", is_latest_version=False)

heads = Heads(system, "q", "e", "v")
enqueue("a", "a2", 2)
enqueue("a", "a1", 1)
found = {"theirs": theirs(), "none": heads.claim("b", "token"), "busy": heads.claim("a", "token")}
found["before"] = row("a2")
enqueue("b", "b2", 2)
enqueue("b", "b1", 1)
found["ours"] = heads.claim("b", "token")
found["again"] = heads.claim("b", "token")
found["theirs after ours"] = theirs()
found["rows"] = [row("a1"), row("b1")]
with open(sys.argv[2], "w") as file:
    json.dump(found, file, default=str)
os._exit(0)
"""


def test_it_writes_what_dbos_writes(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path / "heads.sqlite"), str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["theirs"] == ["a1"], "the lowest priority first"
    assert found["none"] is None, "nothing is queued there"
    assert found["busy"] is None, "one at a time"
    assert found["ours"] == "b1"
    assert found["again"] is None
    assert found["theirs after ours"] == [], "DBOS sees that both partitions are busy"
    theirs, ours = found["rows"]
    assert ours["status"] == "PENDING" != found["before"]["status"]
    differ = {name for name in theirs if theirs[name] != ours[name]}
    times = {"created_at", "updated_at", "started_at_epoch_ms"}
    enqueued = {"workflow_uuid", "queue_partition_key", "priority", "creator_xid"}
    assert differ <= enqueued | times
    assert set(theirs) == set(ours)
    assert all((theirs[name] is None) == (ours[name] is None) for name in times)
