"""``purge``: output is deleted that was there when it was asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ...protocol import messages, subjects
from ...protocol.errors import BadRequest, NotFound, Refused
from ...protocol.model import Status, check_thread
from .context import Context


async def purge(c: Context, r: messages.Purge) -> messages.Reply:
    if not r.threads:
        raise BadRequest("name at least one thread")
    if r.older_than is not None and r.older_than < 0:
        raise BadRequest("older_than must be 0 or more")
    drop: list[tuple[str, int]] = []
    purged: list[str] = []
    runs = 0
    for thread in dict.fromkeys(map(check_thread, r.threads)):
        # Before all else is looked at: what is written from here on stays.
        there = await c.stored.counts(subjects.thread_subjects(thread))
        live = await c.durable.rows.list_live_runs(thread)
        if not live and not await c.durable.rows.list_runs(thread, limit=1):
            raise NotFound(f"no thread {thread!r}; see: runctl list")
        # Of one that waits to be replayed, perhaps only the stream knows that it has ended.
        busy = [x.run for x in live if x.status is Status.RUNNING or x.attempt]
        # One that was aborted writes until its processes are gone.
        busy += [x.spec.run for x in c.registry.of(thread)]
        if busy and not r.force and r.older_than is None:
            raise Refused(
                f"thread {thread!r} has run {busy[0]} in flight; wait, abort it, or add --force"
            )
        if r.older_than is None:
            drop.append((subjects.thread_subjects(thread), there.last))
            purged += [x.spec.run for x in c.registry.of(thread)]
            runs += len(there.records)
        else:
            old = await find_old(c, there.records, time.time() - r.older_than)
            drop += [(subject, there.last) for subject in old]
            runs += len(old)
    if not r.check:
        await c.stored.drop(drop)
        await c.streams.mark_purged(purged)
        c.pushed.look(purged)
    return messages.Purged(runs)


async def find_old(c: Context, ended: Iterable[str], limit: float) -> list[str]:
    """Those whose runs ended before Unix time ``limit``, with nothing left of them."""
    names = {subject.rpartition(".")[2]: subject for subject in ended}
    ends = await c.durable.rows.read_ends(list(names))
    return [
        names[run] for run, ended in ends.items() if ended < limit and c.registry.get(run) is None
    ]
