"""Which run is meant, where its output begins, and what stands before it."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol import messages, subjects
from ..protocol.errors import Busy, NotFound, RequestError, Unavailable
from ..protocol.model import Run, Status
from .link import Link, NotReady
from .requests import NobodyAnswers, ask
from .shared_link import SharedLink
from .suggestions import explain_not_found, find_by_prefix


@dataclass(frozen=True)
class Target:
    """What to follow. ``found``: what the daemon knows of the run, None when it does not
    answer. ``start``: the stream sequence at which the run's output begins, when the
    thread is followed from there on. ``queued``: it has not begun; ``behind``: the run of its
    thread that goes before it, None when none does."""

    thread: str
    run: str
    found: Run | None
    start: int | None = None
    queued: bool = False
    behind: Run | None = None


async def find_predecessor(links: SharedLink, run: str, thread: str) -> Run | None:
    """The run of its thread that goes before ``run``, which has not begun; itself, when it is
    the next; None when nobody says."""
    try:
        first = (await links.ask(messages.Locate(thread), messages.RunDetails)).run
    except (Unavailable, RequestError):
        return None
    return first if first.run == run or not first.status.terminal else None


async def locate(
    links: SharedLink, thread: str, run: str | None, *, follow_thread: bool = False
) -> Target:
    """The thread's current or latest run, or ``run``; from the stream alone when the
    daemon does not answer. Raises NotFound, Unavailable."""
    everything = subjects.thread_subjects(thread)
    before = await links.use(lambda x: _read_last(x, everything)) if follow_thread else None
    found: Run | None = None
    try:
        found = await links.use(lambda link: _ask_for_run(link, thread, run))
        name = found.run
    except (Unavailable, Busy):  # output is served by JetStream, without the daemon
        name = await links.use(lambda link: _latest_run(link, thread)) if run is None else run
    queued = found is not None and found.status is Status.QUEUED
    behind = await find_predecessor(links, name, thread) if queued and run is not None else None
    start = None
    if follow_thread:
        output = subjects.out_subject(thread, name)
        start = await links.use(lambda link: _read_first(link, output))
        if start is None:
            start = (before[0] if before else 0) + 1
    if behind is not None and behind.run == name:
        behind = None
    return Target(thread, name, found, start, queued, behind)


async def _ask_for_run(link: Link, thread: str, run: str | None) -> Run:
    """The thread's current or latest run, or ``run``, of whose id the beginning is enough."""
    request = messages.Locate(thread, run)
    try:
        return (await ask(link, request, messages.RunDetails, hint=run is None)).run
    except NotFound as error:
        if run is None:
            raise
        found = await find_by_prefix(link, run)
        if found is None or found.thread != thread:
            raise await explain_not_found(link, request, error) from None
        return found


async def _read_last(link: Link, subject: str) -> tuple[int, str] | None:
    """(stream sequence, subject) of the last record of ``subject``, which may hold
    wildcards. Raises Unavailable."""
    return await _read_message(link, {"last_by_subj": subject})


async def _read_first(link: Link, subject: str) -> int | None:
    found = await _read_message(link, {"seq": 1, "next_by_subj": subject})
    return found[0] if found else None


async def _read_message(link: Link, query: dict[str, object]) -> tuple[int, str] | None:
    try:
        message = (await link.api(f"STREAM.MSG.GET.{subjects.STREAM}", query))["message"]
    except NotReady as problem:
        if problem.code in (subjects.NO_MESSAGE, subjects.NO_STREAM):
            return None
        raise NobodyAnswers(f"neither runctld nor JetStream answers ({problem})") from None
    return int(message["seq"]), str(message["subject"])


async def _latest_run(link: Link, thread: str) -> str:
    last = await _read_last(link, subjects.thread_subjects(thread))
    if last is None:
        raise NotFound(
            f"no output of thread {thread!r} is stored, and runctld does not answer to say more"
        )
    return last[1].rpartition(".")[2]


async def locate_submitted(links: SharedLink, done: messages.Submitted) -> Target:
    """A run that was just submitted, or was before with the same id. Raises what ``ask`` does."""
    found = behind = None
    queued = done.status is Status.QUEUED
    if done.status.terminal:
        found = (await links.ask(messages.Show(done.run), messages.RunDetails)).run
    elif queued:
        behind = await find_predecessor(links, done.run, done.thread)
        if behind is not None and behind.run == done.run:  # or it has begun already
            queued, behind = behind.status is Status.QUEUED, None
    return Target(done.thread, done.run, found, queued=queued, behind=behind)
