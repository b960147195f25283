"""All runs that are watched, a channel each, and the beat by which watchers are known to live."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from ..client.cancellation import end_tasks
from ..client.shared_link import SharedLink
from ..config.schema import Config
from ..protocol import subjects
from .channel import Channel
from .run_over import RunOver

#: A channel that nobody watches is kept for so long, seconds: clients that were cut come back.
LINGER = 5.0
#: Of silence until a watcher is sent a sign of life, at least, seconds; twice as long at most.
BEAT = 10.0


class Hub:
    """``stopping`` is set when watchers are to be sent away."""

    def __init__(self, config: Config) -> None:
        #: Output comes over a connection of its own: requests do not wait behind it.
        self._links = SharedLink(config)
        self._channels: dict[str, Channel] = {}
        self._lingering: dict[str, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._beating: asyncio.TimerHandle | None = None
        self.stopping = False

    def start(self) -> None:
        """On the event loop that it is used on."""
        self._beating = asyncio.get_running_loop().call_later(BEAT, self._beat)

    def _beat(self) -> None:
        for channel in self._channels.values():
            for watcher in channel.watchers:
                watcher.beat()
        self.start()

    @contextmanager
    def open(self, thread: str, run: str) -> Iterator[Channel]:
        subject = subjects.out_subject(thread, run)
        if (timer := self._lingering.pop(subject, None)) is not None:
            timer.cancel()
        channel = self._channels.get(subject)
        if channel is None:
            over = RunOver(self._links, run, subject)
            channel = self._channels[subject] = Channel(self._links.dial, run, subject, over)
        channel.users += 1
        try:
            yield channel
        finally:
            channel.users -= 1
            if not channel.users and self._channels.get(subject) is channel:
                loop = asyncio.get_running_loop()
                wait = 0 if channel.ended else LINGER
                self._lingering[subject] = loop.call_later(wait, self._close, subject)

    def _close(self, subject: str) -> None:
        self._lingering.pop(subject, None)
        task = asyncio.create_task(self._channels.pop(subject).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def stop(self) -> None:
        """Send all watchers away."""
        self.stopping = True
        for channel in self._channels.values():
            channel.wake_all()

    async def close(self) -> None:
        for timer in (*self._lingering.values(), self._beating):
            if timer is not None:
                timer.cancel()
        channels, self._channels = [*self._channels.values()], {}
        await asyncio.gather(*(channel.close() for channel in channels))
        await end_tasks([*self._closing])
        await self._links.close()
