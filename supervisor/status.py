"""What DBOS's row of a workflow says of a run: the one place in which its status is derived.

An outcome that we decided is the workflow's result; a run is dead when its attempts are
used up, whoever finds that out."""

from __future__ import annotations

import datetime
import shlex
from typing import Any

import msgspec

from .beginnings import parse_beginning
from .model import ABORTED, Outcome, Run, RunSpec, Status, ThreadRow, made_at, shortened

#: DBOS's statuses of what is not over, and ours.
LIVE = {"ENQUEUED": Status.QUEUED, "DELAYED": Status.QUEUED, "PENDING": Status.RUNNING}
_ENDED = {
    "CANCELLED": Status.ABORTED,
    "ERROR": Status.FAILED,
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": Status.DEAD,
}


def read(row: Any) -> tuple[RunSpec, Run]:
    """Of a row with the columns that ``Rows`` asks for, whose input and output may be cut."""
    spec = msgspec.convert(parse_beginning(row.inputs)["positionalArgs"][0], RunSpec)
    outcome = None
    if row.status == "SUCCESS" and row.output:
        outcome = msgspec.convert(parse_beginning(row.output), Outcome)
    status = _status(row.status, outcome)
    error = outcome.error if outcome else None
    if row.status == "CANCELLED":
        error = ABORTED.error
    elif row.status == "ERROR":
        error = "internal error; see the daemon's log"
    created, started, ended = _moments(row, status, outcome)
    run = Run(
        run=row.workflow_uuid,
        thread=row.queue_partition_key,
        status=status,
        attempt=row.recovery_attempts or 0,
        runner=spec.runner,
        executor=row.executor_id if row.recovery_attempts else None,
        created_at=_time(created) or "",
        started_at=_time(started),
        ended_at=_time(ended),
        exit_code=outcome.exit_code if outcome else None,
        error=error,
        note=outcome.note if outcome else None,
        command=shortened(shlex.join(spec.argv)) if spec.argv else None,
        prompt=None if spec.prompt is None else shortened(spec.prompt),
    )
    return spec, run


def read_thread(row: Any, queued: int, busy: int) -> ThreadRow:
    """Of the row of the run that is shown for its thread."""
    run = read(row)[1]
    status = "running" if busy else "queued" if queued else "idle"
    return ThreadRow(run.thread, status, run, int(queued))


def _status(row: str, outcome: Outcome | None) -> Status:
    if row in LIVE:
        return LIVE[row]
    if row == "SUCCESS" and outcome is not None:
        return outcome.status
    return _ENDED.get(row, Status.FAILED)


def _moments(
    row: Any, status: Status, outcome: Outcome | None
) -> tuple[int, int | None, int | None]:
    """When the run was submitted, its last attempt began, and it ended, in Unix milliseconds:
    as we saw it, else by the row, which had whole seconds once. None goes before another, though
    the clocks of executors and database differ."""
    created: int = row.created_at
    made = made_at(row.workflow_uuid)
    if made is not None and created % 1000 == 0 and abs(made * 1000 - created) < 2000:
        created = round(made * 1000)
    started: int | None = row.started_at_epoch_ms
    ended: int | None = (row.completed_at or row.updated_at) if status.terminal else None
    if outcome is not None:
        started, ended = outcome.started_ms or started, outcome.ended_ms or ended
    if started is not None:
        started = max(created, started)
    if ended is not None:
        ended = max(created, started or 0, ended)
    return created, started, ended


def _time(ms: int | None) -> str | None:
    if ms is None:
        return None
    stamp = datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)
    return stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")
