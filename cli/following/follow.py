"""Following one run, or one thread from run to run: what is shown, and when it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...client.attachment import Attachment, RunEvent
from ...client.events import (
    CaughtUp,
    Chunk,
    Connection,
    Continue,
    End,
    Event,
    Lost,
    Malformed,
    Reset,
)
from ...client.link import Link
from ...client.locate import Target
from ...config.schema import Config
from ...protocol.model import Run
from ..common import FAILED, OK, STATUS_EXIT
from ..display.output import Output
from ..display.tail import Tail
from .executor_presence import Presence
from .terminal_size import Window

#: How soon a run begins that nothing stands in the way of: only later is anything said.
PATIENCE = 1.0


@dataclass(frozen=True)
class Options:
    """How to follow. Of what is stored, ``tail``: the last so many lines (chunks, as
    JSON); ``since``: what was written in the last so many seconds; None shows all."""

    follow: bool = True
    follow_thread: bool = False
    tail: int | None = None
    since: float | None = None


@dataclass
class Standing:
    """What whoever stops watching is told: which run it was ("": not known yet), and whether it
    had begun."""

    run: str = ""
    queued: bool = False

    def describe_future(self) -> str:
        return "the run stays queued" if self.queued else "the run goes on"

    def describe_timeout(self) -> str:
        """What a time-out says of it."""
        if self.queued:
            return f"run {self.run} has not begun yet; it stays queued"
        return f"run {self.run} has not ended yet; it goes on"


def describe_wait(run: str, behind: Run | None) -> str:
    """What a run that has not begun waits for."""
    if behind is None:
        return f"run {run} is queued; it begins when an executor has room"
    return f"run {run} waits behind run {behind.run} of its thread, which is {behind.status}"


async def follow(
    config: Config,
    dial: Callable[[], Awaitable[Link]],
    target: Target,
    options: Options,
    output: Output,
    *,
    deadline: float | None = None,
    shared: bool = False,
    standing: Standing | None = None,
) -> int:
    """Print the target's run until it ends; its exit code. ``dial`` makes connections,
    which are closed at the end unless ``shared``. ``standing`` is kept up to date.

    Raises: TimeoutError, when it has not ended by ``deadline`` (the event loop's time)."""
    name, found = target.run, target.found
    standing = standing or Standing()
    standing.run, standing.queued = name, target.queued
    patience: float | None = None
    if target.queued and options.follow:
        if target.behind is not None:
            output.remark(f"runctl: {describe_wait(name, target.behind)}")
        else:  # most begin at once
            patience = asyncio.get_running_loop().time() + PATIENCE
    follower = _Follower(target, options, output)
    presence = Presence(config, output, None if found is None else found.executor)
    attachment = Attachment(
        config, dial, target, follow_thread=options.follow_thread, shared=shared
    )
    watcher = attachment.watcher
    window = Window(watcher, options.follow and output.has_screen)
    async with (
        asyncio.timeout_at(deadline) as limit,
        attachment,
        presence.watching(watcher),
        window,
    ):
        while True:
            events = await _next_events(attachment, output, patience)
            if events is None:
                patience = None
                output.remark(f"runctl: {describe_wait(name, None)}")
                continue
            presence.note_event()
            for event in events:
                window.take(event)
                if standing.queued and isinstance(event, RunEvent) and event.run == name:
                    standing.queued, patience = False, None
                code = follower.take(event)
                if code is not None:
                    output.flush()
                    limit.reschedule(None)  # the code is known, and stays
                    await attachment.confirm_end()
                    return code
                if isinstance(event, Reset | Continue):
                    presence.note_executor(event.executor)
                elif isinstance(event, End):
                    presence.note_executor("")
            output.flush()


async def _next_events(
    attachment: Attachment, output: Output, patience: float | None
) -> list[Event] | None:
    """What comes, None when nothing did until ``patience`` (the loop's time); meanwhile the
    output settles when it is due."""
    now = asyncio.get_running_loop().time
    while True:
        due = output.due()
        times = [now() + due] if due is not None else []
        times += [patience] if patience is not None else []
        try:
            async with asyncio.timeout_at(min(times, default=None)) as quiet:
                return await anext(attachment)
        except TimeoutError:
            if not quiet.expired():
                raise
        if due is not None and output.due() == 0:
            output.settle()
        elif patience is not None and now() >= patience:
            return None


class _Follower:
    """Decides what of the events is shown, and when it is over."""

    def __init__(self, target: Target, options: Options, output: Output) -> None:
        self._name = target.run
        self._ended = target.found is not None and target.found.status.terminal
        self._options = options
        self._output = output
        self._from = 0.0 if options.since is None else time.time() - options.since
        self._seen = False
        self._begun = not options.follow_thread
        self._earlier: set[str] = set()
        #: With --tail, what is stored is held back until all of it was seen.
        self._tail: Tail | None = None
        self._held_reset: Reset | None = None
        self._held_end: End | None = None
        if options.tail is not None:
            self._tail = Tail(options.tail, output.counts_lines)
        self._queued = target.queued
        self._behind = target.behind

    def take(self, event: Event) -> int | None:
        """The exit code, once there is nothing more to come."""
        if not self._begun and self._is_earlier(event):
            return None
        if isinstance(event, Chunk):
            self._seen = True
            if event.at < self._from:
                self._output.skip(event)
            elif self._tail is None:
                self._output.show(event)
            else:
                self._tail.add(event)
            return None
        if isinstance(event, CaughtUp):
            return self._end_stored()
        if isinstance(event, Connection):
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
        if isinstance(event, Lost):
            what = "end" if self._seen else "output"
            self._output.remark(f"runctl: the {what} of run {event.run} is no longer stored")
            return None
        if isinstance(event, Malformed):
            self._output.remark(f"runctl: {event.why}")
            return None
        self._seen = True
        if self._tail is not None:
            if isinstance(event, Reset):
                self._tail.clear()
                self._held_reset, self._held_end = event, None
            elif isinstance(event, Continue):
                self._tail.void(event.run, event.after)
            elif isinstance(event, End):
                self._held_end = event
            return None
        self._output.show(event)
        return self._exit_code_after(event)

    def _is_earlier(self, event: Event) -> bool:
        """Whether it is the rest of a run that ended while ours was looked for: what came
        before is not missing, it was not asked for."""
        if not isinstance(event, RunEvent):
            return False
        self._begun = event.run == self._name
        if isinstance(event, Reset):
            if event.executor:
                self._earlier.discard(event.run)
            else:
                self._earlier.add(event.run)
        return not self._begun and event.run in self._earlier

    def _exit_code_after(self, event: Event) -> int | None:
        if isinstance(event, End) and not self._options.follow_thread:
            return STATUS_EXIT.get(event.status, FAILED)
        return None

    def _end_stored(self) -> int | None:
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
                code = self._exit_code_after(self._held_end)
                if code is not None:
                    return code
        if self._ended and not self._options.follow_thread:
            return None  # its end is not stored, and comes next
        if self._options.follow:
            return None
        if self._queued and not self._seen:
            self._output.remark(f"runctl: no output yet: {describe_wait(self._name, self._behind)}")
        return OK
