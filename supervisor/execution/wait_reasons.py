"""What a run of this executor waits for: its own processes, or those of the run before it.

An aborted run's row frees its thread while processes of it may live, and some cannot be ended.
The next run is claimed by then, and its row says running; but it has not begun.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ...protocol.model import Run, Status, ThreadRow
from ..queue.row_status import format_times
from .registry import Live, Registry


class Waiting:
    """``held``: why processes of a run that is being ended cannot be, in words."""

    def __init__(self, registry: Registry, held: Callable[[str], str | None]) -> None:
        self._registry = registry
        self._held = held

    def reason(self, run: str) -> str | None:
        """What ``run`` waits for, in words."""
        live = self._registry.get(run)
        if live is None or live.behind is None:
            return self._held(run)
        held = self._held(live.behind)
        return f"run {live.behind}, which has not ended yet{f': {held}' if held else ''}"

    def ending(self, thread: str) -> Live | None:
        """An aborted run of ``thread`` whose processes are not gone."""
        return next((live for live in self._registry.of(thread) if live.aborting), None)

    def seen(self, run: Run) -> Run:
        """``run``, queued as long as it waits for another, and with what only we know of it."""
        live = self._registry.get(run.run)
        if live is None or run.status is not Status.RUNNING:
            return run
        if live.behind is None:
            if not live.adopted_ms:
                return run
            return msgspec.structs.replace(run, adopted_at=format_times(live.adopted_ms))
        return msgspec.structs.replace(run, status=Status.QUEUED, started_at=None)

    def seen_thread(self, row: ThreadRow) -> ThreadRow:
        run = self.seen(row.run)
        if run is row.run:
            return row
        if run.status is row.run.status:
            return msgspec.structs.replace(row, run=run)
        return msgspec.structs.replace(row, run=run, status="queued", queued=row.queued + 1)
