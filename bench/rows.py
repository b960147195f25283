"""Many runs in a database without running them: copies of a real one's rows."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

from .harness import Daemon

#: dbos keeps a workflow in these, by ``workflow_uuid``.
TABLES = "workflow_status", "workflow_input", "workflow_output"


def multiply(daemon: Daemon, run: str, count: int, *, first: int = 0, queued: bool = False) -> None:
    """Copy the finished ``run`` to ``count`` threads "copy-N", N from ``first``, as a run of
    its own each; ``queued`` as if it were to be done yet."""
    with sqlite3.connect(daemon.state / "runctl.sqlite", timeout=30) as db:
        db.row_factory = sqlite3.Row
        for table in TABLES:
            row = db.execute(f"SELECT * FROM {table} WHERE workflow_uuid = ?", (run,)).fetchone()
            if row is None or (queued and table == "workflow_output"):
                continue
            copies = [_copy(dict(row), run, n, queued) for n in range(first, first + count)]
            names = list(copies[0])
            marks = ", ".join("?" * len(names))
            db.executemany(
                f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})",
                [list(copy.values()) for copy in copies],
            )
    db.close()


def _copy(row: dict[str, Any], run: str, n: int, queued: bool) -> dict[str, Any]:
    row["workflow_uuid"] = new = f"copy-{n:06d}"
    thread = f"copy-{n}"
    if row.get("inputs"):
        inputs = json.loads(row["inputs"])
        inputs["positionalArgs"][0] |= {"run": new, "thread": thread}
        row["inputs"] = json.dumps(inputs)
    if "queue_partition_key" in row:
        row["queue_partition_key"] = thread
        # A second apart, the first the latest: how many there were in one decides on the cost.
        row["created_at"] -= 1000 * (n + 1)
        if queued:
            now = int(time.time() * 1000)
            row |= {"status": "ENQUEUED", "recovery_attempts": 0, "priority": 1}
            row |= {"started_at_epoch_ms": None, "completed_at": None, "owner_xid": None}
            row |= {"created_at": now, "updated_at": now}
    return row
