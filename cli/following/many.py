"""Several threads on one terminal, each line behind the name of its thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ...client import consumer
from ...client.events import Progress
from ...client.link import Link, NotReady
from ...client.locate import Target, locate
from ...client.requests import ask
from ...client.shared_link import SharedLink
from ...protocol import messages, subjects
from ...protocol.errors import Unavailable, innermost
from ...protocol.model import untoken
from ..common import ABORTED, FAILED, OK, App
from ..display import render
from ..display.json_output import JsonOutput
from ..display.lines import Style
from ..display.open_lines import OpenLines
from ..display.output import Label, Output
from ..display.patience import make_patience
from ..display.status_line import StatusLine
from ..display.text_output import HumanOutput
from .follow import Options, Standing, follow

#: SGR codes of the names, in turn: bright enough on dark, dark enough on light.
COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)
#: A longer name is cut, so that there is room for the lines.
WIDEST = 20


class Many:
    """Follows several threads until all of their runs have ended."""

    def __init__(
        self, app: App, options: Options, style: Style | None, timeout: float | None
    ) -> None:
        self._app = app
        self._options = options
        self._style = style
        self._timeout = timeout
        self._deadline: float | None = None
        #: The runs that had not ended at the deadline.
        self._late: list[Standing] = []
        self._line = StatusLine()
        self._open = OpenLines()
        self._outputs: dict[str, Output] = {}
        self._codes: list[int] = []
        self._width = 0
        self._connection = SharedLink(app.config, make_patience(app, self._line))

    async def attach(self, threads: list[str] | None) -> int:
        """Of ``threads``, or of those that are running; the exit code. Raises NotFound,
        before anything is shown, when one of them is unknown."""
        try:
            links = self._connection
            newcomers = threads is None and self._options.follow_thread
            since = await links.use(_last_sequence) if newcomers else 0
            names = await links.use(_list_running) if threads is None else threads
            targets = [
                await locate(links, name, None, follow_thread=self._options.follow_thread)
                for name in names
            ]
            widths = [render.width(render.cut(render.printable(n), WIDEST)) for n in names]
            self._width = max(widths, default=0)
            if threads is None and not targets:
                render.note(
                    "nothing is running" + (": waiting for what comes" if newcomers else "")
                )
            if self._timeout is not None:
                self._deadline = asyncio.get_running_loop().time() + self._timeout
            async with _raise_first(asyncio.TaskGroup()) as group:
                for target in targets:
                    self._start_following(group, target)
                if newcomers:
                    group.create_task(self._follow_newcomers(group, since))
        finally:
            await self._connection.close()
        if self._late:
            queued = sum(standing.queued for standing in self._late)
            rest = "they go on" if not queued else "those that have begun go on"
            rest = "they stay queued" if queued == len(self._late) else rest
            self.remark(f"runctl: not all runs have ended yet; {rest}")
        return next((code for code in (FAILED, ABORTED) if code in self._codes), OK)

    async def _follow(self, target: Target, output: Output) -> None:
        standing = Standing()
        try:
            code = await follow(
                self._app.config,
                self._connection.dial,
                target,
                self._options,
                output,
                deadline=self._deadline,
                shared=True,
                standing=standing,
            )
        except TimeoutError:
            self._late.append(standing)
            code = FAILED
        self._codes.append(code)

    async def _follow_newcomers(self, group: asyncio.TaskGroup, since: int) -> None:
        """Follow each thread that begins to write, until the deadline."""
        subject = f"{subjects.SUBJECT_PREFIX}.*.*"
        watcher = consumer.Watcher(
            self._connection.dial, subject, start=since + 1, shared=True, summaries=True
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline), watcher:
                async for events in watcher:
                    for event in events:
                        if isinstance(event, Progress):
                            self._follow_newcomer(group, event, since)

    def _follow_newcomer(self, group: asyncio.TaskGroup, event: Progress, since: int) -> None:
        try:
            thread = untoken(event.subject.split(".")[-2])
        except ValueError:
            return  # not a subject of ours
        if thread not in self._outputs:
            self._start_following(group, Target(thread, event.run, None, since + 1))

    def _start_following(self, group: asyncio.TaskGroup, target: Target) -> None:
        output = self._outputs[target.thread] = self._make_output(target.thread)
        group.create_task(self._follow(target, output))

    def _make_output(self, thread: str) -> Output:
        if self._app.json:
            return JsonOutput(thread)
        name = render.cut(render.printable(thread), WIDEST)
        self._width = max(self._width, render.width(name))
        pad = " " * (self._width - render.width(name))
        colour = COLOURS[len(self._outputs) % len(COLOURS)]
        return HumanOutput(
            self._options.follow_thread,
            style=self._style,
            label=Label(f"{name}{pad} | ", colour),
            line=self._line,
            open_lines=self._open,
        )

    # What ``run_interruptibly`` needs.

    def discard(self) -> None:
        for output in self._outputs.values():
            output.discard()

    def leave(self) -> None:
        for output in self._outputs.values():
            output.leave()

    def suspend(self) -> None:
        for output in self._outputs.values():
            output.suspend()

    def resume(self) -> None:
        for output in self._outputs.values():
            output.resume()

    def remark(self, text: str) -> None:
        self._line.hide()
        render.tell(self._open.end())
        render.say(text)


@contextlib.asynccontextmanager
async def _raise_first(group: asyncio.TaskGroup) -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error comes out as itself."""
    try:
        async with group:
            yield group
    except BaseExceptionGroup as found:
        raise innermost(found) from None


async def _last_sequence(link: Link) -> int:
    try:
        info = await link.api(f"STREAM.INFO.{subjects.STREAM}")
    except NotReady as problem:
        raise Unavailable(f"JetStream does not answer ({problem})") from None
    return int(info["state"]["last_seq"])


async def _list_running(link: Link) -> list[str]:
    names: list[str] = []
    after: int | None = 0
    while after is not None:
        page = await ask(link, messages.List(status="running", after=after), messages.Threads)
        names += [row.thread for row in page.threads if row.status == "running"]
        after = page.next
    return names
