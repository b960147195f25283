"""``abort``: answered when every process of the run is gone, or with what is left of it."""

from __future__ import annotations

import time

import trio

from ...protocol import messages
from ...protocol.errors import NotFound, NotGone, Refused, RequestError
from ...protocol.model import Run, Status, check_thread
from ..execution.registry import Live
from ..execution.settings import Settings
from .context import Context
from .queries import find_run

#: An abort is answered so long after the longest grace, at the latest, seconds.
ABORT_LIMIT = 15.0
#: For what is answered to get here, and for a peer that takes its time.
ANSWER = 10.0


async def abort(c: Context, r: messages.Abort) -> messages.Reply:
    thread = check_thread(r.thread)
    if r.run is not None:
        found = await find_run(c, r.run)
        if found is None or found[1].thread != thread:
            raise NotFound(f"no run {r.run!r} on thread {thread!r}; see: runctl list THREAD")
        if found[1].status.terminal and c.registry.get(r.run) is None:
            raise Refused(f"run {r.run} has ended already ({found[1].status})")
        wanted = [found[1]]
    else:
        live = await c.durable.rows.list_live_runs(thread)
        if not live and not await c.durable.rows.list_runs(thread, limit=1):
            raise NotFound(f"no thread {thread!r}; see: runctl list")
        # Who waits for its replay runs, to whoever asks. (Behind it, some may have been claimed.)
        replayed = [x for x in live if x.status is Status.QUEUED and x.attempt][:1]
        live = [*map(c.waiting.seen, live)]
        wanted = [x for x in live if x.status is Status.RUNNING or r.queued]
        if not wanted and (ending := c.waiting.ending(thread)) is not None:
            name = ending.spec.run
            reason = c.waiting.reason(name) or "its processes have their grace"
            raise Refused(f"run {name} is being aborted already: {reason}")
        wanted = wanted or replayed
        if not wanted:
            what = f"{len(live)} queued; add --queued" if live else "nothing is in flight"
            raise Refused(f"thread {thread!r} has no running run ({what})")
    # Queued ones first: ending the running one would start the next.
    wanted.sort(key=lambda run: run.status is Status.RUNNING)
    ended: list[str] = []
    limit = trio.current_time() + abort_limit(c.settings)
    for run in wanted:
        try:
            if await abort_run(c, run, limit):
                ended.append(run.run)
        except RequestError as error:
            if not ended:
                raise
            kind = NotGone if isinstance(error, NotGone) else Refused
            raise kind(f"{error}; aborted already: {', '.join(ended)}") from error
    if not ended:
        raise Refused("the run ended by itself before it could be aborted")
    return messages.Aborted(ended)


def abort_limit(settings: Settings) -> float:
    """Seconds from the request to its answer."""
    return settings.longest_grace + ABORT_LIMIT


async def abort_run(c: Context, run: Run, limit: float) -> bool:
    """Whether it was this that ended it. Raises NotGone, when something of it is left at
    ``limit``."""
    if c.others.owns(run):
        aborted = await c.others.abort(run)
        if aborted is not None:
            return aborted
        found = await c.durable.rows.get(run.run)  # its executor has it no more
        return False if found is None else await abort_run(c, found[1], limit)
    return await _abort_here(c, run, limit)


async def _abort_here(c: Context, run: Run, limit: float) -> bool:
    """Of a run of this executor, or of one that is queued."""
    began = time.monotonic()
    live = c.registry.get(run.run)
    if live is not None:
        with trio.move_on_at(limit):
            aborted = await c.pushed.abort(live)
            if aborted:
                c.meters.aborted(time.monotonic() - began)
                await _cancel_row(c, run, live)  # so that it says so at once
            if aborted is not None:
                return aborted
    if live is not None and not live.begin_abort():
        return False
    if live is None and run.attempt and await c.streams.has_end(run.thread, run.run):
        return False  # only its row does not say so yet
    await _cancel_row(c, run, live)
    live = c.registry.get(run.run) or live  # it may have been claimed meanwhile
    if live is not None:
        live.abort()
        with trio.move_on_at(limit):
            await live.gone.wait()
        if not live.gone.is_set():
            raise NotGone(describe_left(c, live))
        if live.aborted:
            c.meters.aborted(time.monotonic() - began)
            return True
    if not await _write_end(c, run, live):
        return False
    c.meters.aborted(time.monotonic() - began)
    return True


async def _cancel_row(c: Context, run: Run, live: Live | None) -> None:
    """The row first: a crash from here on does not replay the run."""
    try:
        with c.registry.dooming(run.run):
            await c.durable.cancel(run.run)
        await c.announcer.tell_if_full()
        await c.announcer.tell_changed(run.thread)
    except BaseException:
        live = c.registry.get(run.run) or live
        if live is not None:
            live.take_back_abort()
        raise


async def _write_end(c: Context, run: Run, live: Live | None) -> bool:
    """Of a run that has no attempt here to write it; False when the run ended by itself."""
    c.durable.kick()  # the thread is free, and no attempt's end says so
    again = await c.durable.rows.get(run.run)
    if again is not None and again[1].status is not Status.ABORTED:
        return False
    if live is None and again is not None and c.others.owns(again[1]):
        # Claimed by another just before it was aborted: its processes may have begun.
        await c.others.settle(again[1])
    # It may have been claimed since ``run`` was read, and cancelled while its stream was reset.
    attempt = run.attempt if again is None else again[1].attempt
    await c.endings.write(run.thread, run.run, attempt)
    if live is None:  # else it is counted where its attempt ended
        c.meters.run_ended(Status.ABORTED, run.runner)
    return True


def describe_left(c: Context, live: Live) -> str:
    run = live.spec.run
    if live.ended_ms is not None:
        why = c.streams.life.unfit or "NATS does not take it"
        left = f"its processes are gone, the end of its output is not stored yet: {why}"
    else:
        left = c.waiting.reason(run) or "some of its processes have not ended"
    return (
        f"run {run} is aborted, and not gone after {abort_limit(c.settings):g} s: {left};"
        " it will not be replayed, its thread goes on when it is gone. See what it waits for:"
        f" runctl show {run}"
    )
