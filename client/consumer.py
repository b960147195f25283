"""The reader's side of JetStream: every record once, in order, across any restart
(``stream_reader``), as events.

Chunk numbers are checked on top of that, per run: what retention removed is reported
as a ``Gap``, and what was seen already is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ..protocol import records
from .cancellation import end_tasks
from .events import CaughtUp, Connection, Event, Malformed, Progress
from .link import Link
from .run_state import RunState
from .stream_reader import StreamReader

if TYPE_CHECKING:
    from nats.aio.msg import Msg


class Watcher(StreamReader):
    """Events of ``subject`` (which may hold wildcards), in batches::

        async with Watcher(lambda: dial(config), subject) as watcher:
            async for events in watcher: ...

    ``link``: a connection to begin with. Connections are closed at the end, unless they
    are ``shared`` with others; one that does not answer is closed in any case.
    ``start``: the stream sequence to begin at. ``last_only``: begin with the last
    record of each subject. ``summaries``: begin likewise, and read no contents: what
    comes is ``Progress``, of records that carry a summary.

    Iteration raises Unavailable if watching cannot begin within ``START_TIMEOUT``;
    later troubles are waited out, and reported as ``Connection`` events.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[Link]],
        subject: str,
        *,
        link: Link | None = None,
        start: int | None = None,
        last_only: bool = False,
        shared: bool = False,
        summaries: bool = False,
    ) -> None:
        super().__init__(
            *(dial, subject),
            link=link,
            start=start,
            last_only=last_only or summaries,
            headers_only=summaries,
        )
        self._shared = shared
        self._summaries = summaries
        self._states: dict[str, RunState] = {}
        self._events: list[Event] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Watcher:
        self._task = asyncio.create_task(self.read())
        self._task.add_done_callback(lambda _: self._wake.set())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await end_tasks([self._task])
        if self._link is not None and not self._shared:
            await self._link.close()

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> list[Event]:
        assert self._task is not None
        while not self._events:
            if self._task.done():
                self._task.result()
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        events, self._events = self._events, []
        self.note_read()
        return events

    def push(self, event: Event) -> None:
        """Put an event that was learned elsewhere behind those that were read."""
        self._emit(event)

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._wake.set()

    def tell_connection(self, up: bool, stream: bool) -> None:
        self._emit(Connection(up, stream))

    def tell_caught_up(self) -> None:
        self._emit(CaughtUp())

    def take(self, msg: Msg, sequence: int) -> None:
        self._read_summary(msg) if self._summaries else self._read_record(msg)

    def _read_summary(self, msg: Msg) -> None:
        text = (msg.headers or {}).get(records.SUMMARY_HEADER)
        if text is None:  # written by an older daemon
            return
        run = msg.subject.rpartition(".")[2]
        try:
            self._emit(Progress(run, records.read_summary(text), msg.subject))
        except ValueError as error:
            self._emit(Malformed(f"a record of run {run} cannot be read: {error}"))

    def _read_record(self, msg: Msg) -> None:
        subject = msg.subject
        state = self._states.get(subject)
        if state is None:
            state = self._states[subject] = RunState(subject.rpartition(".")[2])
        try:
            record = records.decode_record(msg.data)
        except ValueError as error:
            self._emit(Malformed(f"a record of run {state.run} cannot be read: {error}"))
            return
        state.apply(record, self._events)
        self._wake.set()
