"""One performance: a run, watched from its beginning, whose machine is lost at given moments."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...client.api import Client
from ...client.cancellation import end_tasks
from ...client.consumer import Watcher
from ...client.events import Chunk, Continue, End, Progress, Reset
from ...protocol.model import AttemptRow
from ...protocol.subjects import out_subject
from .directory import Entry, read_directory
from .private_daemon import DIRECTORY, PrivateDaemon, RehearsalFailed


@dataclass(frozen=True)
class Work:
    """What is performed: a command, or a prompt, as ``submit`` takes it."""

    argv: Sequence[str] = ()
    prompt: str | None = None


@dataclass(frozen=True)
class Moment:
    """When the machine is lost: right after so many checkpoints of an attempt, or so many seconds
    after its output began."""

    checkpoints: int | None = None
    seconds: float = 0.0


@dataclass
class Kill:
    """One that was done: so many seconds and chunks after the run's beginning, and what the next
    attempt made of it."""

    at: float
    chunks: int
    checkpoint: bool
    next: AttemptRow | None = None


@dataclass
class Performance:
    """What came of it. ``output``: by stream, for whoever comes late; ``early``, for whoever was
    there all the time."""

    thread: str
    run: str = ""
    status: str = ""
    exit_code: int | None = None
    error: str | None = None
    seconds: float = 0.0
    checkpoints: int = 0
    output: dict[str, bytes] = field(default_factory=dict)
    early: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, Entry] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)


class _Follower:
    """Where the run is, by its records. ``changed`` is set whenever that is news."""

    def __init__(self) -> None:
        self.attempt = 0
        self.began = 0.0
        self.first = 0.0
        self.chunks = 0
        self.checkpoints = 0
        self.ended = False
        self.changed = asyncio.Event()

    async def follow(self, watcher: Watcher) -> None:
        async for events in watcher:
            for event in events:
                if isinstance(event, Progress):
                    self._take(event)
            self.changed.set()

    def _take(self, event: Progress) -> None:
        said = event.summary
        if said.attempt > self.attempt:
            self.attempt, self.checkpoints = said.attempt, 0
            self.began = time.monotonic()
            self.first = self.first or self.began
        self.chunks = said.chunks
        self.checkpoints += said.checkpoint
        self.ended |= said.kind == "end"


async def perform(
    client: Client, daemon: PrivateDaemon, thread: str, work: Work, moments: Sequence[Moment] = ()
) -> Performance:
    """Raises RehearsalFailed; what the client raises."""
    place = daemon.work / thread
    place.mkdir(parents=True)
    done = Performance(thread, f"{thread}-run")
    follower = _Follower()
    watcher = Watcher(client.links.dial, out_subject(thread, done.run), shared=True, summaries=True)
    async with watcher:
        following = asyncio.create_task(follower.follow(watcher))
        try:
            began = time.monotonic()
            await client.submit(
                *(thread, work.prompt), argv=work.argv, runner="rehearsed", run=done.run
            )
            early = asyncio.create_task(_read_output(client, thread, done.run))
            try:
                for moment in moments:
                    if not await _wait(follower, moment):
                        break
                    await _lose_machine(client, daemon, follower, done, moment)
                end, done.early = await early
            finally:
                await end_tasks([early])
            done.seconds = time.monotonic() - (follower.first or began)
        finally:
            await end_tasks([following])
    done.status, done.exit_code, done.error = end.status, end.exit_code, end.error
    done.checkpoints = follower.checkpoints
    _, done.output = await _read_output(client, thread, done.run)
    details = await client.show(done.run)
    for number, kill in enumerate(done.kills):
        if number + 1 < len(details.attempts):
            kill.next = details.attempts[number + 1]
    # What is different of itself: names that are of this performance alone.
    own = {os.fsencode(place): DIRECTORY, done.run.encode(): "RUNCTL_RUN"}
    own[thread.encode()] = "RUNCTL_THREAD"
    if details.session:
        own[details.session.encode()] = "RUNCTL_SESSION"
    done.files = {
        name: replace(entry, content=_neutralise(entry.content, own))
        for name, entry in read_directory(place).items()
    }
    for output in (done.output, done.early):
        output.update({stream: _neutralise(data, own) for stream, data in output.items()})
    return done


def _neutralise(data: bytes, own: Mapping[bytes, str]) -> bytes:
    for name, variable in own.items():
        data = data.replace(name, b"$" + variable.encode())
    return data


async def _wait(follower: _Follower, moment: Moment) -> bool:
    """Whether it came before the run's end."""
    while not follower.ended:
        follower.changed.clear()
        left = None
        if moment.checkpoints is None and follower.began:
            left = follower.began + moment.seconds - time.monotonic()
            if left <= 0:
                return True
        elif moment.checkpoints is not None and follower.checkpoints >= moment.checkpoints:
            return True
        try:
            await asyncio.wait_for(follower.changed.wait(), left)
        except TimeoutError:
            pass
    return False


async def _lose_machine(
    client: Client,
    daemon: PrivateDaemon,
    follower: _Follower,
    done: Performance,
    moment: Moment,
) -> None:
    attempt = follower.attempt
    daemon.lose_machine()
    at = time.monotonic() - follower.first
    done.kills.append(Kill(at, follower.chunks, moment.checkpoints is not None))
    await daemon.start(client)
    while follower.attempt == attempt and not follower.ended:
        follower.changed.clear()
        await follower.changed.wait()


async def _read_output(client: Client, thread: str, run: str) -> tuple[End, dict[str, bytes]]:
    """How the run ended, and what of its output is valid then, by stream."""
    chunks: dict[int, Chunk] = {}
    async for event in client.attach(thread, run):
        if isinstance(event, Reset):
            chunks = {}
        elif isinstance(event, Continue):
            chunks = {seq: chunk for seq, chunk in chunks.items() if seq <= event.after}
        elif isinstance(event, Chunk):
            if event.seq in chunks:
                raise RehearsalFailed(f"chunk {event.seq} was shown twice")
            chunks[event.seq] = event
        elif isinstance(event, End):
            found: dict[str, bytes] = {}
            for _, chunk in sorted(chunks.items()):
                found[chunk.stream] = found.get(chunk.stream, b"") + chunk.data
            return event, found
    raise RehearsalFailed("the end of the output did not come")
