"""Argument types whose values the daemon knows, so that a shell can complete them.

Completion is quick, silent and harmless: without a daemon, or when it takes longer than
``PATIENCE``, there is none.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from ..common import App, mute_libraries

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ...client.link import Link
    from ...protocol.model import Run, ThreadRow

R = TypeVar("R")

#: Seconds for asking the daemon; then the shell gets no answer.
PATIENCE = 0.7
#: How many threads are looked through, and of how many the runs, and how many of each.
THREADS = 2000
LATEST_THREADS = 20
RUNS = 20


def suggest(value: str, type: str = "plain", help: str | None = None) -> CompletionItem:
    from click.shell_completion import CompletionItem

    return CompletionItem(value, type, help)


class Completing(App):
    """The invocation that a shell completes. ``words``: what stands before the word."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self.words = words


class ThreadName(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    name = "text"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        given = ctx.params.get(param.name or "")
        taken = given if isinstance(given, tuple) else ()
        return [
            suggest(row.thread, help=_thread_help(row))
            for row in _ask(ctx, _threads)
            if row.thread.startswith(incomplete) and row.thread not in taken
        ]


class RunName(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Ids of recent runs, latest first: of the thread that the line names, else of the
    threads that were active last. ``statuses``: only these."""

    name = "text"

    def __init__(self, *statuses: str) -> None:
        self._statuses = statuses

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        threads = _named_threads(ctx)
        return [
            suggest(run.run, help=f"{run.thread}, {run.status}")
            for run in _ask(ctx, lambda link: _runs(link, threads))
            if run.run.startswith(incomplete)
            and (not self._statuses or run.status in self._statuses)
        ]


class RunnerName(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    name = "text"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [suggest(name) for name in _ask(ctx, _runners) if name.startswith(incomplete)]


class Work(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A prompt, for which there is nothing to suggest; behind "--" a command."""

    name = "text"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        app = ctx.find_object(App)
        words = app.words if isinstance(app, Completing) else []
        if "--" not in words:
            return []
        return [suggest("", type="command" if words[-1] == "--" else "file")]


THREAD = ThreadName()
RUN = RunName()
RUNNER = RunnerName()
WORK = Work()


def _named_threads(ctx: click.Context) -> list[str]:
    params = ctx.params
    if not (params.get("thread") or params.get("threads")):
        # click parsed nothing when the last option has no value yet: give it one.
        app = ctx.find_object(App)
        words = app.words if isinstance(app, Completing) else []
        if ctx.info_name in words:
            rest = [*words[words.index(ctx.info_name) + 1 :], "-"]
            with ctx.command.make_context(
                ctx.info_name, rest, parent=ctx.parent, resilient_parsing=True
            ) as again:
                params = again.params
    named = params.get("thread") or params.get("threads") or ()
    return [named] if isinstance(named, str) else list(named)


def _thread_help(row: ThreadRow) -> str:
    return row.status + (f", {row.queued} queued" if row.queued else "")


async def _threads(link: Link) -> list[ThreadRow]:
    from ...client.requests import ask
    from ...protocol import messages

    rows: list[ThreadRow] = []
    after: int | None = 0
    while after is not None and len(rows) < THREADS:
        page = await ask(link, messages.List(after=after), messages.Threads)
        rows += page.threads
        after = page.next
    return rows


async def _runs(link: Link, threads: list[str]) -> list[Run]:
    from ...client.requests import ask
    from ...protocol import messages

    if not threads:
        rows = (await ask(link, messages.List(limit=LATEST_THREADS), messages.Threads)).threads
        threads = [row.thread for row in rows]
    pages = await asyncio.gather(
        *(ask(link, messages.List(thread, limit=RUNS), messages.Runs) for thread in threads)
    )
    runs = [run for page in pages for run in page.runs]
    return sorted(runs, key=lambda run: run.created_at, reverse=True)


async def _runners(link: Link) -> list[str]:
    from ...client.requests import ask
    from ...protocol import messages

    return (await ask(link, messages.StatusRequest(alone=True), messages.DaemonStatus)).runners


def _ask(ctx: click.Context, question: Callable[[Link], Awaitable[Iterable[R]]]) -> list[R]:
    """The daemon's answer; nothing when there is none, for whatever reason. Ends the
    process when it takes too long: waiting could not be cut short everywhere."""
    app = ctx.find_object(App) or App()
    file = ctx.find_root().params.get("config")
    if file is not None:  # as it stands in the line: the shell has not expanded it
        app.config_file = Path(os.path.expandvars(file)).expanduser()

    async def main() -> list[R]:
        from ...client.link import dial

        link = await dial(app.config)
        try:
            return list(await question(link))
        finally:
            await link.close()

    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        mute_libraries()
        return asyncio.run(main())
    except Exception:
        return []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _give_up(_: int, __: FrameType | None) -> NoReturn:
    os._exit(0)
