"""A bare DBOS program, by the path of this file: ``bare_program.py FOLDER KIND [COUNT]``.

KIND ``direct``: workflows are started without a queue; ``queue``: on one queue; ``partitions``:
on that queue, each in a partition of its own. COUNT: so many are started, which is left out
when those of the last time are to be recovered. The step of each writes a line to
FOLDER/started and never ends. The database is as runctl's: SQLite, WAL, executor ID fixed.
"""

import asyncio
import os
import sqlite3
import sys
import time
from pathlib import Path

from dbos import DBOS, SetEnqueueOptions

#: Seconds between two looks of the queue's worker.
POLLING = 0.05
FOLDER, KIND = Path(sys.argv[1]), sys.argv[2]
STARTED = os.open(FOLDER / "started", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


@DBOS.step()
async def begin(number: int) -> None:
    os.write(STARTED, b"%06d\n" % number)
    await asyncio.Event().wait()


@DBOS.workflow()
async def work(number: int) -> None:
    await begin(number)


def main() -> None:
    database = FOLDER / "dbos.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    DBOS(
        config={
            "name": "bare",
            "system_database_url": f"sqlite:///{database}",
            "executor_id": "bare",
            "application_version": "1",
            "log_level": "ERROR",
        }
    )
    DBOS.launch()
    if KIND != "direct":
        DBOS.register_queue(
            "runs",
            worker_concurrency=100_000,
            partition_concurrency=1 if KIND == "partitions" else None,
            polling_interval_sec=POLLING,
        )
    for number in range(int(sys.argv[3]) if len(sys.argv) > 3 else 0):
        if KIND == "direct":
            DBOS.start_workflow(work, number)
        elif KIND == "queue":
            DBOS.enqueue_workflow("runs", work, number)
        else:
            with SetEnqueueOptions(queue_partition_key=f"thread-{number}"):
                DBOS.enqueue_workflow("runs", work, number)
    time.sleep(600)


if __name__ == "__main__":
    main()
