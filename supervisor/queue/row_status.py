"""What DBOS's row of a workflow says of a run: the one place in which its status is derived.

An outcome that we decided is the workflow's result; a run is dead when its attempts are
used up, whoever finds that out."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Iterable
from typing import Any

import msgspec

from ...protocol.model import ABORTED, Outcome, Run, RunSpec, Status, ThreadRow, made_at, shortened
from .partial_json import parse_beginning

#: The workflow that a run is.
WORKFLOW = "run_thread"
#: The workflow that tells of a run's end.
HOOK = "tell_hook"
#: The format of what is in a row: DBOS's name of JSON, or none, which is ours.
FORMATS = (None, "portable_json")
#: DBOS's statuses of what is not over, and ours.
LIVE = {"ENQUEUED": Status.QUEUED, "DELAYED": Status.QUEUED, "PENDING": Status.RUNNING}
_ENDED = {
    "CANCELLED": Status.ABORTED,
    "ERROR": Status.FAILED,
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": Status.DEAD,
}


#: What a row is shown to be of that names none: another program's, or a hand's.
NO_THREAD, NO_RUNNER = "(none)", "?"


def hook_id(run: str) -> str:
    """The id of the workflow that tells of the run's end. No run's id has a dot."""
    return f"{run}.hook"


def read_run(row: Any) -> tuple[RunSpec, Run]:
    """Of a row with the columns that ``Rows`` asks for, whose input and output may be cut. One
    that cannot be read is shown as what it is by its other columns, and its error says why."""
    thread = NO_THREAD if row.queue_partition_key is None else row.queue_partition_key
    spec, unread = RunSpec(row.workflow_uuid, thread, NO_RUNNER), None
    try:
        check_format(row.serialization)
        spec = parse_spec(row.workflow_uuid, row.queue_partition_key, row.name, row.inputs)
    except ValueError as problem:
        unread = str(problem)
    outcome = None
    if row.status == "SUCCESS":
        try:
            check_format(row.serialization)
            outcome = msgspec.convert(parse_beginning(row.output or ""), Outcome)
        except ValueError:
            unread = unread or f"{UNREADABLE}: its outcome is none of runctl's"
    status = _derive_status(row.status, outcome)
    error = outcome.error if outcome else None
    if row.status == "CANCELLED":
        error = ABORTED.error
    elif row.status == "ERROR":
        error = "internal error; see the daemon's log"
    error = unread or error
    created, started, ended = _find_moments(row, status, outcome)
    run = Run(
        run=row.workflow_uuid,
        thread=thread,
        status=status,
        attempt=row.recovery_attempts or 0,
        runner=spec.runner,
        executor=row.executor_id if row.recovery_attempts else None,
        created_at=format_time(created) or "",
        started_at=format_time(started),
        ended_at=format_time(ended),
        exit_code=outcome.exit_code if outcome else None,
        error=error,
        note=outcome.note if outcome else None,
        command=shortened(shlex.join(spec.argv)) if spec.argv else None,
        prompt=None if spec.prompt is None else shortened(spec.prompt),
        adopted_at=format_times(outcome.adopted_ms if outcome else ()),
    )
    return spec, run


def read_thread_row(row: Any, queued: int, busy: int) -> ThreadRow:
    """Of the row of the run that is shown for its thread."""
    run = read_run(row)[1]
    # A row without a thread is in nobody's count.
    busy = busy or run.status is Status.RUNNING
    status = "running" if busy else "queued" if queued or run.status is Status.QUEUED else "idle"
    return ThreadRow(run.thread, status, run, int(queued))


UNREADABLE = "its record cannot be read"


def check_format(name: str | None) -> None:
    """Raises ValueError, with words as ``parse_spec``'s, unless it is ours."""
    if name not in FORMATS:
        raise ValueError(f"{UNREADABLE}: its input is in another format")


def parse_spec(run: str, thread: str | None, name: str, inputs: str | None) -> RunSpec:
    """What is to be done, from the row ``run`` of a workflow ``name``. Raises ValueError, with
    words for whoever asks what became of the run."""
    if name != WORKFLOW:
        raise ValueError(f"{UNREADABLE}: it is a workflow {name!r} of another program")
    if inputs is None:
        raise ValueError(f"{UNREADABLE}: its input is gone")
    try:
        spec = msgspec.convert(parse_beginning(inputs)["positionalArgs"][0], RunSpec)
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"{UNREADABLE}: its input is none of runctl's") from None
    if spec.run != run:
        raise ValueError(f"{UNREADABLE}: it is a copy of run {spec.run}; use runctl retry")
    if spec.thread != thread:
        raise ValueError(f"{UNREADABLE}: it was submitted to thread {spec.thread!r}")
    return spec


def make_executable(row: dict[str, Any]) -> dict[str, Any]:
    """``row``, a claimed workflow as DBOS executes it; one that cannot be read gets an input
    from which ``read_claimed`` knows why, so that it ends like any other."""
    run, thread = row["workflow_uuid"], row["queue_partition_key"]
    try:
        check_format(row["serialization"])
        _check_plain(row)
        parse_spec(run, thread, row["name"], row["inputs"])
    except ValueError as problem:
        spec = {"run": run, "thread": thread or NO_THREAD, "unreadable": str(problem)}
        return _replace_work(row, WORKFLOW, spec)
    return row


def make_tellable(row: dict[str, Any]) -> dict[str, Any]:
    """``make_executable``, of what was claimed to tell of a run's end. Which run that is stands
    in the row's id, so that its input is not needed."""
    run = row["workflow_uuid"].removesuffix(hook_id(""))
    try:
        check_format(row["serialization"])
        _check_plain(row)
        if row["name"] != HOOK or row["workflow_uuid"] != hook_id(run):
            raise ValueError(f"{UNREADABLE}: it is a workflow {row['name']!r} of another program")
    except ValueError as problem:
        return _replace_work(row, HOOK, run, str(problem))
    return _replace_work(row, HOOK, run)


#: What DBOS acts upon that no row of ours has.
_THEIRS = ("class_name", "config_name", "authenticated_user", "authenticated_roles")


def _check_plain(row: dict[str, Any]) -> None:
    if any(row[name] is not None for name in _THEIRS):
        raise ValueError(f"{UNREADABLE}: it is of another program")


def _replace_work(row: dict[str, Any], name: str, *arguments: object) -> dict[str, Any]:
    """``row`` as a workflow ``name`` of ours with these arguments, and with nothing else of it
    that DBOS would read."""
    inputs = json.dumps({"positionalArgs": arguments, "namedArgs": {}})
    changed = {"name": name, "inputs": inputs, "serialization": FORMATS[-1]}
    return {**row, **dict.fromkeys(_THEIRS), **changed}


def read_claimed(spec: dict[str, Any]) -> tuple[RunSpec, str | None]:
    """What a claimed workflow is to do, and why it cannot."""
    why = spec.get("unreadable")
    if why is None:
        return msgspec.convert(spec, RunSpec), None
    return RunSpec(spec["run"], spec["thread"], NO_RUNNER), why


def _derive_status(row: str, outcome: Outcome | None) -> Status:
    if row in LIVE:
        return LIVE[row]
    if row == "SUCCESS" and outcome is not None:
        return outcome.status
    return _ENDED.get(row, Status.FAILED)


def _find_moments(
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


def format_times(moments: Iterable[int]) -> list[str]:
    """RFC 3339 UTC, of Unix milliseconds."""
    return [stamp for ms in moments if (stamp := format_time(ms)) is not None]


def format_time(ms: int | None) -> str | None:
    """Of Unix milliseconds, as RFC 3339 UTC."""
    if ms is None:
        return None
    stamp = datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)
    return stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")
