"""Following one run, or one thread from run to run: what is shown, and when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...client import consumer
from ...client.requests import Link, LinkLost, NotReady, ask, ask_once
from ...client.suggestions import begins, explained
from ...config.schema import Config
from ...protocol import messages, subjects
from ...protocol.errors import Busy, NotFound, RequestError, Unavailable
from ...protocol.model import Run, Status
from ..common import FAILED, OK, STATUS_EXIT
from ..display import output as outputs
from ..display.tail import Tail
from .executor_presence import Presence
from .terminal_size import Window

#: How soon a run begins that nothing stands in the way of: only later is anything said.
PATIENCE = 1.0
#: Events of a run that has begun, or is over.
BEGUN = consumer.Reset | consumer.Chunk | consumer.Gap | consumer.End
#: JetStream's "no message found".
NO_MESSAGE = 10037


@dataclass(frozen=True)
class Options:
    """How to follow. Of what is stored, ``tail``: the last so many lines (chunks, as
    JSON); ``since``: what was written in the last so many seconds; None shows all."""

    follow: bool = True
    follow_thread: bool = False
    tail: int | None = None
    since: float | None = None


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


@dataclass
class Standing:
    """What whoever stops watching is told: which run it was ("": not known yet), and whether it
    had begun."""

    run: str = ""
    queued: bool = False

    def goes_on(self) -> str:
        return "the run stays queued" if self.queued else "the run goes on"

    def in_time(self) -> str:
        """What a time-out says of it."""
        if self.queued:
            return f"run {self.run} has not begun yet; it stays queued"
        return f"run {self.run} has not ended yet; it goes on"


async def goes_before(link: Link, run: str, thread: str) -> Run | None:
    """The run of its thread that goes before ``run``, which has not begun; itself, when it is
    the next; None when nobody says."""
    try:
        first = (await ask(link, messages.Locate(thread), messages.RunDetails)).run
    except (Unavailable, RequestError):
        return None
    return first if first.run == run or not first.status.terminal else None


def waits(run: str, behind: Run | None) -> str:
    """What a run that has not begun waits for."""
    if behind is None:
        return f"run {run} is queued; it begins when an executor has room"
    return f"run {run} waits behind run {behind.run} of its thread, which is {behind.status}"


async def locate(link: Link, thread: str, run: str | None, options: Options) -> Target:
    """The thread's current or latest run, or ``run``; from the stream alone when the
    daemon does not answer. Raises NotFound, Unavailable."""
    before = await _last(link, subjects.thread_subjects(thread)) if options.follow_thread else None
    found: Run | None = None
    try:
        found = await _located(link, thread, run)
        name = found.run
    except LinkLost:
        raise
    except (Unavailable, Busy):  # output is served by JetStream, without the daemon
        name = run or await _latest_run(link, thread)
    queued = found is not None and found.status is Status.QUEUED
    behind = await goes_before(link, name, thread) if queued and run is not None else None
    start = None
    if options.follow_thread:
        start = await _first(link, subjects.out_subject(thread, name))
        if start is None:
            start = (before[0] if before else 0) + 1
    if behind is not None and behind.run == name:
        behind = None
    return Target(thread, name, found, start, queued, behind)


async def _located(link: Link, thread: str, run: str | None) -> Run:
    """The thread's current or latest run, or ``run``, of whose id the beginning is enough."""
    request = messages.Locate(thread, run)
    try:
        return (await ask(link, request, messages.RunDetails, hint=run is None)).run
    except NotFound as error:
        if run is None:
            raise
        found = await begins(link, run)
        if found is None or found.thread != thread:
            raise await explained(link, request, error) from None
        return found


async def _last(link: Link, subject: str) -> tuple[int, str] | None:
    """(stream sequence, subject) of the last record of ``subject``, which may hold
    wildcards. Raises Unavailable."""
    return await _stored(link, {"last_by_subj": subject})


async def _first(link: Link, subject: str) -> int | None:
    found = await _stored(link, {"seq": 1, "next_by_subj": subject})
    return found[0] if found else None


async def _stored(link: Link, query: dict[str, object]) -> tuple[int, str] | None:
    try:
        message = (await link.api(f"STREAM.MSG.GET.{subjects.STREAM}", query))["message"]
    except NotReady as problem:
        if problem.code in (NO_MESSAGE, subjects.NO_STREAM):
            return None
        raise Unavailable(f"neither runctld nor JetStream answers ({problem})") from None
    return int(message["seq"]), str(message["subject"])


async def _latest_run(link: Link, thread: str) -> str:
    last = await _last(link, subjects.thread_subjects(thread))
    if last is None:
        raise NotFound(
            f"no output of thread {thread!r} is stored, and runctld does not answer to say more"
        )
    return last[1].rpartition(".")[2]


async def follow(
    config: Config,
    dial: Callable[[], Awaitable[Link]],
    target: Target,
    options: Options,
    output: outputs.Output,
    *,
    deadline: float | None = None,
    link: Link | None = None,
    shared: bool = False,
    standing: Standing | None = None,
) -> int:
    """Print the target's run until it ends; its exit code. ``dial`` makes connections,
    ``link`` is one to begin with; they are closed at the end unless ``shared``. ``standing``
    is kept up to date.

    Raises: TimeoutError, when it has not ended by ``deadline`` (the event loop's time)."""
    name, found = target.run, target.found
    standing = standing or Standing()
    standing.run, standing.queued = name, target.queued
    patience: float | None = None
    if target.queued and options.follow:
        if target.behind is not None:
            output.remark(f"runctl: {waits(name, target.behind)}")
        else:  # most begin at once
            patience = asyncio.get_running_loop().time() + PATIENCE
    subject = (
        subjects.thread_subjects(target.thread)
        if options.follow_thread
        else subjects.out_subject(target.thread, name)
    )
    follower = _Follower(target, options, output)
    presence = Presence(config, output, None if found is None else found.executor)
    settling: asyncio.Task[None] | None = None
    # Without the daemon nobody has told whether the run is over: its end may be purged.
    reconnected, caught_up = found is None, False
    watcher = consumer.Watcher(dial, subject, link=link, start=target.start, shared=shared)
    window = Window(watcher, options.follow and output.has_screen)
    async with (
        asyncio.timeout_at(deadline) as limit,
        watcher,
        presence.watching(watcher),
        window,
    ):
        try:
            while True:
                events = await _next(watcher, output, patience)
                if events is None:
                    patience = None
                    output.remark(f"runctl: {waits(name, None)}")
                    continue
                presence.heard()
                for event in events:
                    window.take(event)
                    if standing.queued and isinstance(event, BEGUN) and event.run == name:
                        standing.queued, patience = False, None
                    code = follower.take(event)
                    if code is not None:
                        output.flush()
                        limit.reschedule(None)  # the code is known, and stays
                        if follower.live:
                            await _confirm(config, watcher, name)
                        return code
                    if isinstance(event, consumer.Reset):
                        presence.moved(event.executor)
                    elif isinstance(event, consumer.End):
                        presence.moved("")
                    elif isinstance(event, consumer.Connection):
                        reconnected = event.up
                    elif isinstance(event, consumer.CaughtUp):
                        # A consumer that is not the first: the stream may be another one.
                        again = reconnected or caught_up
                        reconnected, caught_up = False, True
                        if not again:
                            continue
                        if not options.follow_thread and settling is None:
                            settling = asyncio.create_task(settle(config, name, watcher))
                output.flush()
                if settling is not None and settling.done():
                    settling = None
        finally:
            if settling is not None:
                settling.cancel()


async def _next(
    watcher: consumer.Watcher, output: outputs.Output, patience: float | None
) -> list[consumer.Event] | None:
    """What comes, None when nothing did until ``patience`` (the loop's time); meanwhile the
    output settles when it is due."""
    now = asyncio.get_running_loop().time
    while True:
        due = output.due()
        times = [now() + due] if due is not None else []
        times += [patience] if patience is not None else []
        try:
            async with asyncio.timeout_at(min(times, default=None)) as quiet:
                return await anext(watcher)
        except TimeoutError:
            if not quiet.expired():
                raise
        if due is not None and output.due() == 0:
            output.settle()
        elif patience is not None and now() >= patience:
            return None


async def settle(config: Config, name: str, watcher: consumer.Watcher) -> None:
    """After a reconnection: if the run ended and its end record is gone (retention, a
    purge), nothing would ever tell the watcher. Ask the daemon, once it answers."""
    delay = 0.1
    while True:
        try:
            found = (await ask_once(config, messages.Show(name), messages.RunDetails)).run
        except (Unavailable, Busy):
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)
            continue
        except RequestError:
            return
        if found.status.terminal:
            await asyncio.sleep(1.0)  # the record itself comes first, if it is there
            watcher.push(consumer.Lost(name))
            watcher.push(end_of(found))
        return


def end_of(found: Run) -> consumer.End:
    return consumer.End(
        *(found.run, found.attempt, found.status.value),
        *(found.exit_code, found.error, found.note),
    )


async def _confirm(config: Config, watcher: consumer.Watcher, name: str) -> None:
    """Wait, briefly, until the daemon has recorded the end that we saw, so that a script's
    next command finds the run ended."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await recorded(config, watcher, name)


async def recorded(config: Config, watcher: consumer.Watcher, name: str) -> Run | None:
    """The run once the daemon says that it ended; None if the daemon does not answer."""
    delay = 0.005
    while True:
        link = watcher.link
        reply: messages.RunDetails | None
        try:
            if link is None or link.closed.is_set():
                reply = await ask_once(config, messages.Show(name), messages.RunDetails)
            else:
                reply = await ask(link, messages.Show(name), messages.RunDetails)
        except Busy:
            reply = None
        except (Unavailable, RequestError):
            return None
        if reply is not None and reply.run.status.terminal:
            return reply.run
        await asyncio.sleep(delay)
        delay = min(delay * 2, 0.2)


class _Follower:
    """Decides what of the events is shown, and when it is over."""

    def __init__(self, target: Target, options: Options, output: outputs.Output) -> None:
        self._name = target.run
        self._found = target.found
        self._options = options
        self._output = output
        self._from = 0.0 if options.since is None else time.time() - options.since
        self._seen = False
        self._begun = not options.follow_thread
        self._earlier: set[str] = set()
        #: With --tail, what is stored is held back until all of it was seen.
        self._tail: Tail | None = None
        self._held_reset: consumer.Reset | None = None
        self._held_end: consumer.End | None = None
        if options.tail is not None:
            self._tail = Tail(options.tail, output.counts_lines)
        #: Whether the end was seen as it happened.
        self.live = target.found is None or not target.found.status.terminal
        self._queued = target.queued
        self._behind = target.behind

    def take(self, event: consumer.Event) -> int | None:
        """The exit code, once there is nothing more to come."""
        if not self._begun and self._is_earlier(event):
            return None
        if isinstance(event, consumer.Chunk):
            self._seen = True
            if event.at < self._from:
                self._output.skip(event)
            elif self._tail is None:
                self._output.show(event)
            else:
                self._tail.add(event)
            return None
        if isinstance(event, consumer.CaughtUp):
            return self._caught_up()
        if isinstance(event, consumer.Connection):
            self._output.status(
                "connection",
                None
                if event.up
                else "runctl: the stored output is gone; waiting for runctld to write again what"
                " it has (Ctrl-C detaches)"
                if event.stream
                else "runctl: connection lost; waiting for runctld to come back (Ctrl-C detaches)",
            )
            return None
        if isinstance(event, consumer.Lost):
            self._output.remark(f"runctl: the end of run {event.run} is no longer stored")
            return None
        if isinstance(event, consumer.Malformed):
            self._output.remark(f"runctl: {event.why}")
            return None
        self._seen = True
        if self._tail is not None:
            if isinstance(event, consumer.Reset):
                self._tail.clear()
                self._held_reset, self._held_end = event, None
            elif isinstance(event, consumer.End):
                self._held_end = event
            return None
        self._output.show(event)
        return self._after(event)

    def _is_earlier(self, event: consumer.Event) -> bool:
        """Whether it is the rest of a run that ended while ours was looked for: what came
        before is not missing, it was not asked for."""
        if not isinstance(event, consumer.Reset | consumer.Chunk | consumer.Gap | consumer.End):
            return False
        self._begun = event.run == self._name
        if isinstance(event, consumer.Reset):
            if event.executor:
                self._earlier.discard(event.run)
            else:
                self._earlier.add(event.run)
        return not self._begun and event.run in self._earlier

    def _after(self, event: consumer.Event) -> int | None:
        if isinstance(event, consumer.End) and not self._options.follow_thread:
            return STATUS_EXIT.get(event.status, FAILED)
        return None

    def _caught_up(self) -> int | None:
        if self._tail is not None:
            left_out, kept = self._tail.take()
            self._tail = None
            if self._held_reset is not None:
                self._output.show(self._held_reset)
            for chunk in left_out:
                self._output.skip(chunk)
            for chunk in kept:
                self._output.show(chunk)
            if self._held_end is not None:
                self._output.show(self._held_end)
                code = self._after(self._held_end)
                if code is not None:
                    return code
        found, self._found = self._found, None
        if found is not None and found.status.terminal and not self._options.follow_thread:
            what = "end" if self._seen else "output"
            self._output.remark(f"runctl: the {what} of run {self._name} is no longer stored")
            self._output.show(end_of(found))
            return STATUS_EXIT[found.status]
        if self._options.follow:
            return None
        if self._queued and not self._seen:
            self._output.remark(f"runctl: no output yet: {waits(self._name, self._behind)}")
        return OK
