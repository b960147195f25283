"""``list``, ``show`` and ``locate``: what is known of threads and runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from ...config.schema import CommandRunner
from ...protocol import messages, subjects
from ...protocol.errors import BadRequest, NotFound
from ...protocol.model import Run, RunSpec, Status, ThreadRow, check_thread, is_run_id
from ..queue.attempt_log import sum_usage
from .context import Context

Row = TypeVar("Row", Run, ThreadRow)

PAGE = 500
#: No database has so many rows; it counts them in 64 bits.
MAX_AFTER = 2**53
#: Bytes of an answer of ``list`` beside its rows, and of a row beside what is stored of it.
AROUND_ROWS, AROUND_ROW = 64 * 1024, 32


async def list_(c: Context, r: messages.List) -> messages.Reply:
    if r.status is not None and r.status not in [*Status, "idle"]:
        raise BadRequest(f"no status {r.status!r}; one of: {', '.join(Status)}, idle")
    if r.limit is not None and r.limit < 1:
        raise BadRequest("limit must be 1 or more")
    if not 0 <= r.after <= MAX_AFTER:
        raise BadRequest("after must be what the page before gave as next")
    size = min(r.limit or PAGE, PAGE) if r.status is None else PAGE
    if r.thread is None:
        if r.live:
            threads = await c.durable.rows.list_live_threads(limit=size, offset=r.after)
        else:
            busy = r.status in (Status.RUNNING, Status.QUEUED)
            threads = await c.durable.rows.list_threads(limit=size, offset=r.after, busy=busy)
        threads, more = fit_page(c, threads, r.after, size)
        said = await c.durable.attempts.log.find_words(list_running(x.run for x in threads))
        threads = [replace_words(c.waiting.seen_thread(x), said) for x in threads]
        wanted = [t for t in threads if r.status is None or _has(t, r.status)]
        return messages.Threads(wanted, more, await find_unheard(c, r))
    thread = check_thread(r.thread)
    statuses = [Status(r.status)] if r.status in list(Status) else []
    runs = await c.durable.rows.list_runs(thread, limit=size, offset=r.after)
    if not runs and r.after == 0:
        raise NotFound(f"no thread {thread!r}; see: runctl list")
    runs, more = fit_page(c, runs, r.after, size)
    runs = [*map(c.waiting.seen, runs)]
    silent = await find_unheard(c, r, [x for x in runs if x.status is Status.RUNNING])
    mute = {executor.executor_id for executor in silent}
    runs = [x if x.executor in mute else await _see_at_owner(c, x) for x in runs]
    said = await c.durable.attempts.log.find_words(list_running(runs))
    runs = [msgspec.structs.replace(x, status_text=said.get(x.run)) for x in runs]
    wanted_runs = [x for x in runs if not statuses or x.status in statuses]
    return messages.Runs(await with_output(c, thread, wanted_runs), more, silent)


def list_running(runs: Iterable[Run]) -> list[str]:
    return [run.run for run in runs if run.status is Status.RUNNING]


def replace_words(row: ThreadRow, said: Mapping[str, str]) -> ThreadRow:
    """``said``: what runs say of themselves."""
    if row.run.run not in said:
        return row
    run = msgspec.structs.replace(row.run, status_text=said[row.run.run])
    return msgspec.structs.replace(row, run=run)


def fit_page(c: Context, rows: list[Row], after: int, size: int) -> tuple[list[Row], int | None]:
    """Those of a page's rows that one answer of NATS holds, and where the next page
    begins. ``size``: how many rows were asked for."""
    count = how_many_fit(rows, c.client.max_payload - AROUND_ROWS)
    return rows[:count], after + count if count < len(rows) or count == size else None


async def with_output(c: Context, thread: str, runs: list[Run]) -> list[messages.RunRow]:
    counts = (await c.stored.counts(subjects.thread_subjects(thread))).records
    theirs = [subjects.out_subject(thread, x.run) for x in runs]
    stored = [subject for subject in theirs if subject in counts]
    found = dict(zip(stored, await c.stored.outputs(stored), strict=True))
    return [
        messages.run_row(x, found.get(subject, "none"))
        for x, subject in zip(runs, theirs, strict=True)
    ]


async def find_unheard(
    c: Context, r: messages.List, runs: list[Run] | None = None
) -> list[messages.ExecutorStatus]:
    """The executors that have ``runs`` in flight, or any, and do not answer. Said
    once per answer, with its first page."""
    if c.config.database.embedded or r.after:
        return []
    if runs is None:
        return await c.others.unheard(await c.durable.rows.list_owners())
    return await c.others.unheard(run.executor for run in runs)


async def locate(c: Context, r: messages.Locate) -> messages.Reply:
    return await read_details(c, await pick_run(c, r.thread, r.run))


async def pick_run(c: Context, name: str, run: str | None) -> str:
    thread = check_thread(name)
    if run is not None:
        found = await find_run(c, run)
        if found is None or found[1].thread != thread:
            raise NotFound(f"no run {run!r} on thread {thread!r}; see: runctl list THREAD")
        return run
    live = await c.durable.rows.list_live_runs(thread)
    latest = live[:1] or await c.durable.rows.list_runs(thread, limit=1)
    if not latest:
        raise NotFound(f"no thread {thread!r}; see: runctl list")
    return latest[0].run


async def show(c: Context, r: messages.Show) -> messages.Reply:
    details = await read_details(c, await find_beginning(c, r.run) if r.prefix else r.run)
    subject = subjects.out_subject(details.run.thread, details.run.run)
    (output,) = await c.stored.outputs([subject])
    runner, name = c.settings.runners.get(details.run.runner), None
    if isinstance(runner, CommandRunner):
        name = await c.durable.sessions.look(details.run.thread, runner.name)
    attempts = await c.durable.attempts.log.describe(details.run)
    return msgspec.structs.replace(
        details, output=output, session=name, attempts=attempts, usage=sum_usage(attempts)
    )


async def find_beginning(c: Context, beginning: str) -> str:
    """The only run whose id begins so."""
    found = []
    if is_run_id(beginning):
        found = await c.durable.rows.find_beginning_with(beginning, 3)
    if len(found) > 1:
        some = ", ".join(found[:2]) + (", …" if len(found) > 2 else "")
        raise NotFound(f"several runs begin with {beginning!r} ({some}); give more of its id")
    if not found:
        raise NotFound(f"no run {beginning!r}; see: runctl list THREAD")
    return found[0]


async def find_run(c: Context, run: str) -> tuple[RunSpec, Run] | None:
    return await c.durable.rows.get(run) if is_run_id(run) else None


async def read_details(c: Context, run: str) -> messages.RunDetails:
    found = await find_run(c, run)
    if found is None:
        raise NotFound(f"no run {run!r}; see: runctl list THREAD")
    spec, row = found
    waits_for = c.waiting.reason(run)
    if (theirs := await c.others.look(row)) is not None:
        row, waits_for = theirs.run, theirs.waits_for
    said = await c.durable.attempts.log.find_words(list_running([row]))
    row = msgspec.structs.replace(row, status_text=said.get(run))
    return messages.RunDetails(
        *(c.waiting.seen(row), list(spec.argv), spec.prompt, spec.cwd, spec.retry_of),
        waits_for=waits_for,
        push=spec.push,
    )


async def _see_at_owner(c: Context, run: Run) -> Run:
    theirs = await c.others.look(run)
    return run if theirs is None else theirs.run


def how_many_fit(rows: Sequence[Run | ThreadRow], room: int) -> int:
    """How many of the first of ``rows``, at least one, take up to ``room`` bytes as JSON."""
    for count, row in enumerate(rows):
        room -= len(msgspec.json.encode(row)) + AROUND_ROW
        if room < 0:
            return max(1, count)
    return len(rows)


def _has(row: ThreadRow, status: str) -> bool:
    """Whether the thread or its current run has ``status``; "queued": whether a run waits."""
    return status in (row.status, row.run.status) or (status == Status.QUEUED and row.queued > 0)
