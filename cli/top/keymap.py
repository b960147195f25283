"""What the keys of ``top`` do."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from ...config.schema import RunctlError
from ...protocol import messages
from .board import Board, Line
from .feed import Feed
from .view import View

Job = Coroutine[Any, Any, None]

FAILED = "bold red"
GOOD = "green"
MOVES = {"up": -1, "k": -1, "down": 1, "j": 1}
SELECT = (*MOVES, "pageup", "pagedown", "home", "g", "end", "G")


class KeyMap:
    """``press`` a key; what takes time is handed to ``start``. ``changed``: the view is
    another now. ``attach`` a thread, ``quit``."""

    def __init__(
        self,
        board: Board,
        feed: Feed,
        view: View,
        start: Callable[[Job], object],
        attach: Callable[[str], Job],
        quit: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._board = board
        self._feed = feed
        self._view = view
        self._start = start
        self._attach = attach
        self._quit = quit
        self._changed = changed
        self._filtering = False
        self._confirmed: Callable[[], Job] | None = None

    def press(self, key: str, page: int) -> None:
        """``page``: how many threads the screen shows."""
        view = self._view
        if self._confirmed is not None:
            job, self._confirmed, view.prompt = self._confirmed, None, ""
            if key in ("y", "Y"):
                self._start(job())
        elif self._filtering:
            self._edit_filter(key)
        elif view.help:
            view.help = False
        else:
            view.message = None
            self._command(key, page)

    def _command(self, key: str, page: int) -> None:
        view = self._view
        last = len(view.lines) - 1
        line = view.lines[view.selected] if 0 <= view.selected <= last else None
        if key in MOVES:
            view.selected += MOVES[key]
        elif key in ("pageup", "pagedown"):
            view.selected += page if key == "pagedown" else -page
        elif key in ("home", "g"):
            view.selected = 0
        elif key in ("end", "G"):
            view.selected = last
        elif key == "q":
            self._quit()
        elif key == "?":
            view.help = True
        elif key == "/":
            self._filtering = True
            self._show_filter()
        elif key == "escape":
            view.filter = ""
        elif line is not None:
            self._on_thread(key, line)
        at = max(0, min(view.selected, last))
        view.moved = at > 0 if key in SELECT else view.moved
        view.selected = at

    def _on_thread(self, key: str, line: Line) -> None:
        if key in ("enter", "a"):
            self._start(self._attach(line.thread))
        elif key == "x" and not line.live:
            self._view.message = (f"nothing is in flight on {line.thread}", "")
        elif key == "x":
            # The question first: a name may be longer than the screen.
            self._ask(
                f"abort? y/n   run {line.run} of thread {line.thread}",
                lambda: self._abort(line.thread, line.run),
            )
        elif key == "p":
            self._ask(
                f"purge stored output? y/n   thread {line.thread}, to run {line.run}",
                lambda: self._purge(line.thread),
            )

    def _ask(self, prompt: str, job: Callable[[], Job]) -> None:
        self._view.prompt = prompt
        self._confirmed = job

    # ---- filter -------------------------------------------------------------------

    def _edit_filter(self, key: str) -> None:
        view = self._view
        if key in ("enter", "escape"):
            self._filtering = False
            view.prompt = ""
            if key == "escape":
                view.filter = ""
            return
        if key == "backspace":
            view.filter = view.filter[:-1]
        elif len(key) == 1:
            view.filter += key
        self._show_filter()

    def _show_filter(self) -> None:
        self._view.prompt = f"filter: {self._view.filter}_   (enter keeps it, escape shows all)"

    # ---- what takes time ----------------------------------------------------------

    async def _abort(self, thread: str, run: str) -> None:
        self._say(f"aborting run {run} of {thread} ...")
        try:
            await self._feed.ask(messages.Abort(thread, run), messages.Aborted)
        except RunctlError as error:
            self._say(str(error), FAILED)
        else:
            self._say(f"aborted run {run} of {thread}", GOOD)
        self._feed.refresh()

    async def _purge(self, thread: str) -> None:
        self._say(f"purging {thread} ...")
        try:
            done = await self._feed.ask(messages.Purge([thread]), messages.Purged)
        except RunctlError as error:
            self._say(str(error), FAILED)
        else:
            self._board.forget(thread)
            runs = f"{done.runs} run{'' if done.runs == 1 else 's'}"
            self._say(f"purged the output of {runs} of {thread}", GOOD)

    def _say(self, text: str, style: str = "") -> None:
        self._view.message = (text, style)
        self._changed()
