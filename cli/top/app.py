"""``runctl top``: threads, live, with keys to attach, abort and purge."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any

import click

from ...client.shared_link import SharedLink
from ...protocol.errors import innermost
from ..common import DETACHED, OK, App, DaemonVerb, pass_app, run
from ..display import render
from ..display.patience import make_patience
from .board import Board
from .feed import PAGE, Feed
from .key_decoder import Keys

STDIN = 0
#: Seconds from one picture to the next, at least; keys are answered at once.
FRAME = 0.1
#: Ages and rates go on without events.
TICK = 1.0
#: How long the rest of a key's sequence may be on its way.
ESCAPE = 0.05
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGWINCH)


@click.command(
    cls=DaemonVerb,
    short_help="Watch all threads live; attach, abort and purge by key.",
    epilog="""\b
Examples:
  runctl top
  NO_COLOR=1 runctl top
  runctl list --status running             (once, for scripts)""",
)
@pass_app
def top(app: App) -> int:
    """Show all threads as they run: live ones first, then others, most recent first.

    Keys: up and down select, enter attaches (Ctrl-C comes back), x aborts the run,
    p purges the stored output, / filters, ? shows help, q quits. Quitting stops no run.
    """
    if app.json:
        raise click.UsageError("top has no JSON output; use: runctl list --json")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not terminal or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        raise click.UsageError("top needs a terminal; use: runctl list")
    return run(lambda: _top(app))


async def _top(app: App) -> int:
    return await Top(app).main()


class Top:
    def __init__(self, app: App) -> None:
        # rich takes a while to import: not before it is known that it is needed.
        from .fullscreen import Screen
        from .keymap import KeyMap
        from .view import AROUND, View, picture

        self._app = app
        self._around = AROUND
        self._picture = picture
        self._view = View()
        self._screen = Screen()
        self._board = Board()
        self._dirty = asyncio.Event()
        links = SharedLink(app.config, make_patience(app))
        self._feed = Feed(links, self._board, self._wanted, self._dirty.set)
        self._keys = Keys()
        self._map = KeyMap(
            self._board,
            self._feed,
            self._view,
            self._start,
            self._attach,
            lambda: self._finish(OK),
            self._dirty.set,
        )
        self._flushing: asyncio.TimerHandle | None = None
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._attached: asyncio.subprocess.Process | None = None
        #: Set by a key, for one who waits for any.
        self._any_key: asyncio.Event | None = None
        self._listed = 0
        self._jobs: set[asyncio.Task[None]] = set()
        self._tasks: asyncio.TaskGroup

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        await self._feed.start()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        try:
            self._take()
            async with asyncio.TaskGroup() as self._tasks:
                self._start(self._feed.run())
                self._start(self._show())
                code = await self._done
                for job in self._jobs:
                    job.cancel()
            return code
        except BaseExceptionGroup as problems:
            raise innermost(problems) from None
        finally:
            self._leave()

    def _start(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    def _finish(self, code: int) -> None:
        if not self._done.done():
            self._done.set_result(code)

    # ---- pictures -----------------------------------------------------------------

    def _room(self) -> int:
        return max(1, self._screen.size()[1] - self._around)

    def _wanted(self) -> int:
        """How many threads to list: what fills the screen, and a page below; a filter
        may look further."""
        self._listed = PAGE if self._view.filter else self._view.selected + 2 * self._room()
        return self._listed

    async def _show(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await self._dirty.wait()
            self._draw()
            await asyncio.sleep(FRAME)

    def _draw(self) -> None:
        self._dirty.clear()
        if not self._screen.taken:
            return
        view, now = self._view, time.monotonic()
        chosen = view.chosen()
        view.lines = self._board.lines(view.filter, now, time.time())
        view.choose(chosen)
        view.counts = self._board.counts()
        view.empty = (
            "no thread holds this text"
            if view.filter
            else "no threads yet; start one: runctl submit THREAD -- COMMAND"
        )
        view.warning = "; ".join(render.describe_silence(x) for x in self._feed.silent)
        away = self._feed.away
        columns, height = self._screen.size()
        self._screen.draw(self._picture(view, away and (away[0], now - away[1]), columns, height))

    # ---- keys and signals ---------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = os.read(STDIN, 4096)
        except OSError:
            data = b""
        if not data:  # the terminal is gone
            self._finish(OK)
            return
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        self._press(self._keys.feed(data))
        if self._keys.pending:
            loop = asyncio.get_running_loop()
            self._flushing = loop.call_later(ESCAPE, lambda: self._press(self._keys.flush()))

    def _press(self, keys: list[str]) -> None:
        if self._any_key is not None:
            if keys:
                self._any_key.set()
            return
        view = self._view
        before = view.filter
        for key in keys:
            self._map.press(key, self._room())
        if view.filter != before or view.selected + self._room() > self._listed:
            self._feed.refresh()
        self._draw()

    def _signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGWINCH:
            self._feed.refresh()  # there may be room for more
            self._draw()
        elif number == signal.SIGTSTP:
            self._stop()
        elif number in (signal.SIGTERM, signal.SIGHUP):
            self._finish(128 + number)
        elif self._any_key is not None:
            self._any_key.set()
        elif self._attached is None:  # else Ctrl-C was for what is attached, which ends
            self._finish(DETACHED)

    def _stop(self) -> None:
        """Ctrl-Z, until the shell sends SIGCONT."""
        taken = self._screen.taken
        if taken:
            self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        if taken:
            self._take()
            self._draw()

    def _take(self) -> None:
        self._screen.take()
        asyncio.get_running_loop().add_reader(STDIN, self._readable)

    def _leave(self) -> None:
        asyncio.get_running_loop().remove_reader(STDIN)
        self._screen.leave()

    # ---- attach -------------------------------------------------------------------

    async def _attach(self, thread: str) -> None:
        """``runctl attach`` in the foreground, until it ends or Ctrl-C ends it."""
        if self._attached is not None:
            return
        file = self._app.config_file
        command = [sys.executable, "-m", "runctl.cli.main"]
        command += ["-c", str(file)] if file is not None else []
        self._leave()
        render.note(f"attached to {thread}; Ctrl-C comes back to top")
        try:
            self._attached = await asyncio.create_subprocess_exec(*command, "attach", "--", thread)
            code = await self._attached.wait()
            self._attached = None
            if code != DETACHED:  # what it printed last is to be read
                await self._wait_for_key("press any key to come back to top")
        finally:
            if self._attached is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._attached.terminate()
                self._attached = None
            if not self._done.done():
                self._take()
                self._feed.refresh()
                self._dirty.set()

    async def _wait_for_key(self, why: str) -> None:
        render.note(why)
        self._any_key = asyncio.Event()
        try:
            self._screen.cbreak()
            asyncio.get_running_loop().add_reader(STDIN, self._readable)
            await self._any_key.wait()
        finally:
            self._any_key = None
            self._leave()
