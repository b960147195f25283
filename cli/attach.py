"""``runctl attach``: a run's output from its first chunk, live."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

from ..config.schema import Config
from ..supervisor import wire
from ..supervisor.errors import NotFound, RequestError, Unavailable
from ..supervisor.model import Run, check_run_id, check_thread
from . import output as outputs
from . import render, watch
from .client import Link, LinkLost, NotReady, ask, ask_once, dial
from .common import DETACHED, FAILED, OK, STATUS_EXIT, App, Duration, Verb, pass_app, run
from .lines import Style
from .window import Window

#: JetStream's error codes for "no message found" and "stream not found".
NO_MESSAGE = 10037
NO_STREAM = 10059


@dataclass
class Options:
    """How to attach; ``tail`` None shows everything."""

    run: str | None = None
    follow: bool = True
    tail: int | None = None
    follow_thread: bool = False
    timeout: float | None = None
    #: Of what is stored, only what was written in the last so many seconds.
    since: float | None = None
    style: Style | None = None
    raw: bool = False


@click.command(
    cls=Verb,
    short_help="Watch a thread's run, live, from its first chunk.",
    epilog="""\b
Examples:
  runctl attach support-42
  runctl attach support-42 --no-follow > reply.txt
  runctl attach build --tail 20 --follow-thread
  runctl --json attach support-42 | jq -r 'select(.type=="chunk").data'""",
)
@click.argument("thread")
@click.option("--run", "run_id", metavar="RUN", help="This run, not the current or latest one.")
@click.option("--no-follow", is_flag=True, help="Print what is stored, and stop.")
@click.option(
    "--tail",
    type=click.IntRange(min=0),
    metavar="N",
    help="Of what is stored, show the last N chunks only.",
)
@click.option(
    "--follow-thread", "-f", is_flag=True, help="Go on to the thread's next runs, until Ctrl-C."
)
@click.option(
    "--since", type=Duration(), metavar="D", help="Only output of the last D; as in 90s, 5m."
)
@click.option("--timestamps", is_flag=True, help="Put the time (UTC) before each line.")
@click.option("--grep", metavar="REGEX", help="Only lines in which REGEX is found.")
@click.option("--raw", is_flag=True, help="The bytes as they were written, without our colours.")
@click.option(
    "--timeout", type=Duration(), metavar="D", help="Stop watching after D (exit 1); as in 90s, 5m."
)
@pass_app
def attach(
    app: App,
    thread: str,
    run_id: str | None,
    no_follow: bool,
    tail: int | None,
    follow_thread: bool,
    since: float | None,
    timestamps: bool,
    grep: str | None,
    raw: bool,
    timeout: float | None,
) -> int:
    """Show the current run of THREAD (or its latest) from the first chunk on, live.

    Exits with 0 if the run succeeded, 1 if it failed or is dead, 5 if it was aborted.
    Ctrl-C detaches (exit 130); the run goes on. Any number of watchers may attach, and
    attaching survives restarts of the daemon: an interrupted run's reply starts over.
    """
    if no_follow and follow_thread:
        raise click.UsageError("--no-follow and --follow-thread exclude each other")
    if raw and (timestamps or grep is not None):
        raise click.UsageError("--raw excludes --timestamps and --grep")
    if app.json and (timestamps or grep is not None or raw):
        raise click.UsageError("--json has events as they are: leave --timestamps, --grep, --raw")
    check_thread(thread)
    if run_id is not None:
        check_run_id(run_id)
    style = _style(timestamps, grep)
    options = Options(
        run_id, not no_follow, tail, follow_thread, timeout, since=since, style=style, raw=raw
    )
    output = make_output(app, options)
    return interruptible(thread, output, lambda: run(lambda: _attach(app, thread, options, output)))


def _style(timestamps: bool, grep: str | None) -> Style | None:
    if not timestamps and grep is None:
        return None
    try:
        pattern = None if grep is None else re.compile(grep)
    except re.error as error:
        raise click.UsageError(f"--grep {grep!r} is not a regular expression: {error}") from None
    return Style(timestamps, pattern, sys.stdout.isatty() and render.colours())


def make_output(app: App, options: Options) -> outputs.Output:
    return (
        outputs.JsonOutput()
        if app.json
        else outputs.HumanOutput(options.follow_thread, style=options.style, raw=options.raw)
    )


def interruptible(thread: str, output: outputs.Output, main: Callable[[], int]) -> int:
    """``main()``'s code, or that of being detached with Ctrl-C."""
    try:
        return main()
    except KeyboardInterrupt:
        output.discard()
        again = "runctl attach " + ("-- " if thread.startswith("-") else "") + shlex.quote(thread)
        output.remark(f"runctl: detached; the run goes on. Attach again: {again}")
        return DETACHED
    finally:
        output.leave()


async def _attach(app: App, thread: str, options: Options, output: outputs.Output) -> int:
    link = await dial(app.config)
    try:
        before = await _last(link, wire.thread_subjects(thread)) if options.follow_thread else None
        found: Run | None = None
        try:
            found = (await ask(link, wire.Locate(thread, options.run), wire.RunDetails)).run
            name = found.run
        except LinkLost:
            raise
        except Unavailable:  # output is served by JetStream, without the daemon
            name = options.run or await _latest_run(link, thread)
        start = None
        if options.follow_thread:
            start = await _first(link, wire.out_subject(thread, name))
            if start is None:
                start = (before[0] if before else 0) + 1
    except BaseException:
        await link.close()
        raise
    return await follow(app.config, link, thread, name, found, options, output, start)


async def _last(link: Link, subject: str) -> tuple[int, str] | None:
    """(stream sequence, subject) of the last record of ``subject``, which may hold
    wildcards. Raises Unavailable."""
    return await _stored(link, {"last_by_subj": subject})


async def _first(link: Link, subject: str) -> int | None:
    found = await _stored(link, {"seq": 1, "next_by_subj": subject})
    return found[0] if found else None


async def _stored(link: Link, query: dict[str, object]) -> tuple[int, str] | None:
    try:
        message = (await link.api(f"STREAM.MSG.GET.{wire.STREAM}", query))["message"]
    except NotReady as problem:
        if problem.code in (NO_MESSAGE, NO_STREAM):
            return None
        raise Unavailable(f"neither runctld nor JetStream answers ({problem})") from None
    return int(message["seq"]), str(message["subject"])


async def _latest_run(link: Link, thread: str) -> str:
    last = await _last(link, wire.thread_subjects(thread))
    if last is None:
        raise NotFound(
            f"no output of thread {thread!r} is stored, and runctld does not answer to say more"
        )
    return last[1].rpartition(".")[2]


async def follow(
    config: Config,
    link: Link,
    thread: str,
    name: str,
    found: Run | None,
    options: Options,
    output: outputs.Output,
    start: int | None = None,
) -> int:
    """Print run ``name`` until it ends; its exit code. Owns ``link``. ``found``: what the
    daemon knows of the run, None when it does not answer."""
    if found is not None and found.status == "queued" and options.follow and sys.stderr.isatty():
        render.note(f"run {name} is queued; its output starts when the thread is free")
    subject = (
        wire.thread_subjects(thread) if options.follow_thread else wire.out_subject(thread, name)
    )
    follower = _Follower(name, found, options, output)
    settling: asyncio.Task[None] | None = None
    reconnected = False
    try:
        async with asyncio.timeout(options.timeout):
            async with (
                watch.Watcher(lambda: dial(config), subject, link=link, start=start) as watcher,
                Window(
                    watcher, options.follow and not isinstance(output, outputs.JsonOutput)
                ) as window,
            ):
                async for events in watcher:
                    for event in events:
                        window.take(event)
                        code = follower.take(event)
                        if code is not None:
                            output.flush()
                            if follower.live and found is not None:
                                await _confirm(config, watcher, name)
                            return code
                        if isinstance(event, watch.Connection):
                            reconnected = event.up
                        elif isinstance(event, watch.CaughtUp) and reconnected:
                            reconnected = False
                            if not options.follow_thread and settling is None:
                                settling = asyncio.create_task(settle(config, name, watcher))
                    output.flush()
                    if settling is not None and settling.done():
                        settling = None
    except TimeoutError:
        output.leave()
        output.remark(f"runctl: run {name} has not ended yet; it goes on")
        return FAILED
    finally:
        if settling is not None:
            settling.cancel()
    raise AssertionError("a watcher ends only with an error")


async def settle(config: Config, name: str, watcher: watch.Watcher) -> None:
    """After a reconnection: if the run ended and its end record is gone (retention, a
    purge), nothing would ever tell the watcher. Ask the daemon, once it answers."""
    delay = 0.1
    while True:
        try:
            found = (await ask_once(config, wire.Show(name), wire.RunDetails)).run
        except Unavailable:
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)
            continue
        except RequestError:
            return
        if found.status.terminal:
            await asyncio.sleep(1.0)  # the record itself comes first, if it is there
            watcher.push(end_of(found))
        return


def end_of(found: Run) -> watch.End:
    return watch.End(found.run, found.attempt, found.status.value, found.exit_code, found.error)


async def _confirm(config: Config, watcher: watch.Watcher, name: str) -> None:
    """Wait, briefly, until the daemon has recorded the end that we saw, so that a script's
    next command finds the run ended."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await recorded(config, watcher, name)


async def recorded(config: Config, watcher: watch.Watcher, name: str) -> Run | None:
    """The run once the daemon says that it ended; None if the daemon does not answer."""
    delay = 0.005
    while True:
        link = watcher.link
        try:
            if link is None or link.closed.is_set():
                reply = await ask_once(config, wire.Show(name), wire.RunDetails)
            else:
                reply = await ask(link, wire.Show(name), wire.RunDetails)
        except (Unavailable, RequestError):
            return None
        if reply.run.status.terminal:
            return reply.run
        await asyncio.sleep(delay)
        delay = min(delay * 2, 0.2)


class _Follower:
    """Decides what of the events is shown, and when it is over."""

    def __init__(
        self, name: str, found: Run | None, options: Options, output: outputs.Output
    ) -> None:
        self._name = name
        self._found = found
        self._options = options
        self._output = output
        self._from = 0.0 if options.since is None else time.time() - options.since
        self._seen = False
        #: With --tail, what is stored is held back until all of it was seen.
        self._held: collections.deque[watch.Event] | None = None
        self._held_reset: watch.Reset | None = None
        self._held_end: watch.End | None = None
        if options.tail is not None:
            self._held = collections.deque(maxlen=options.tail)
        #: Whether the end was seen as it happened.
        self.live = found is None or not found.status.terminal

    def take(self, event: watch.Event) -> int | None:
        """The exit code, once there is nothing more to come."""
        if isinstance(event, watch.Chunk):
            self._seen = True
            if event.at < self._from:
                return None
            if self._held is None:
                self._output.show(event)
            else:
                self._held.append(event)
            return None
        if isinstance(event, watch.CaughtUp):
            return self._caught_up()
        if isinstance(event, watch.Connection):
            self._output.away(
                None
                if event.up
                else "runctl: connection lost; waiting for runctld to come back"
                " (Ctrl-C detaches, the run goes on)"
            )
            return None
        if isinstance(event, watch.Malformed):
            self._output.remark(f"runctl: {event.why}")
            return None
        self._seen = True
        if self._held is not None:
            if isinstance(event, watch.Reset):
                self._held.clear()
                self._held_reset, self._held_end = event, None
            elif isinstance(event, watch.End):
                self._held_end = event
            return None
        self._output.show(event)
        return self._after(event)

    def _after(self, event: watch.Event) -> int | None:
        if isinstance(event, watch.End) and not self._options.follow_thread:
            return STATUS_EXIT.get(event.status, FAILED)
        return None

    def _caught_up(self) -> int | None:
        if self._held is not None:
            for event in (self._held_reset, *self._held):
                if event is not None:
                    self._output.show(event)
            self._held = None
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
        return None if self._options.follow else OK
