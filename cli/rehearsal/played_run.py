"""One run under a private daemon, from its submit to its end, with kills or without."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from ...client.api import Client
from ...client.attachment import Attachment
from ...client.cancellation import end_tasks
from ...client.consumer import Watcher
from ...client.events import Event
from ...client.locate import locate_submitted
from ...client.patience import Patience
from ...client.shared_link import SharedLink
from ...config.load import load
from ...config.schema import Config
from ...protocol.errors import BadRequest
from ...protocol.messages import Submitted
from ...protocol.subjects import out_subject
from .child import PATIENCE, Child
from .kills import AfterWork, AtCheckpoint, Kill
from .private_daemon import kill_all_of, start_daemon, uninterrupted, wait_ready
from .recipe import Recipe
from .transcript import Transcript

#: All runs have the same names, so that whoever prints them prints the same.
THREAD = RUN = "rehearsal"
#: Names the directory that is compared.
DIRECTORY = "RUNCTL_REHEARSAL"


class Played(msgspec.Struct):
    """What came of a run. ``folder``: its directory, as it was left. ``late``, ``early``: the
    output of each stream, to who came when it was over, and who watched from the beginning.
    ``missing``: how many chunks the latter was not given. ``seconds``: of work, of a run without
    kills."""

    name: str
    folder: Path
    seconds: float
    status: str
    exit_code: int | None
    error: str | None
    late: dict[str, bytes]
    early: dict[str, bytes]
    missing: int
    chunks: int
    checkpoints: int
    kills: list[Kill]


class Stage:
    """Where runs are played, one after the other: each with a state directory and a directory of
    its own, whose paths are the same for all. ``begin_with``: what the latter holds at first."""

    def __init__(self, folder: Path, recipe: Recipe, begin_with: Path | None = None) -> None:
        self.folder = folder
        self._recipe = recipe
        self._begin_with = begin_with
        self._state = folder / "state"
        self._work = folder / "directory"
        self._config = folder / "runctld.toml"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RUNCTL_")}
        self._env = {**kept, DIRECTORY: str(self._work), "PYTHONUNBUFFERED": "1"}
        self._daemon: Child | None = None
        recipe.write_config(self._config, self._state)

    @contextmanager
    def set_up(self, name: str) -> Iterator[None]:
        """For one run; afterwards all processes are gone, and its directories have its name.
        Raises BadRequest."""
        if self._begin_with is None:
            self._work.mkdir(0o700)
        else:
            try:
                shutil.copytree(self._begin_with, self._work, symlinks=True)
            except shutil.Error as error:
                path, _, why = error.args[0][0]
                raise BadRequest(f"--copy: {path} cannot be copied: {why}") from None
        try:
            yield
        finally:
            with uninterrupted():
                kill_all_of(self._state, self._daemon)
                if self._daemon is not None:
                    log = "\n".join(line for _, _, line in self._daemon.lines)
                    (self.folder / f"{name}.log").write_text(f"{log}\n")
                self._daemon = None
                self._work.rename(self.folder / name)
                if self._state.exists():
                    self._state.rename(self.folder / f"{name}.state")

    async def start(self) -> None:
        """Raises ChildFailed."""
        daemon = self._daemon = start_daemon(self._config, self._env)
        try:
            await asyncio.to_thread(wait_ready, daemon)
        except asyncio.CancelledError:
            daemon.kill()  # which ends the wait in that thread
            raise

    def kill(self) -> None:
        """As a machine that loses power."""
        kill_all_of(self._state, self._daemon)

    async def play(
        self,
        name: str,
        moments: Sequence[AtCheckpoint | AfterWork] = (),
        notice: Callable[[int], None] = lambda kills: None,
    ) -> Played:
        """A run of the recipe, which is killed at ``moments``, in this order; those that come
        after its end do not happen. ``notice`` hears how many were done. Raises RunctlError."""
        with self.set_up(name):
            await self.start()
            config = load(self._config, client=True)
            recipe = self._recipe
            async with Client(config, Patience(config, PATIENCE)) as client:
                submitted = await client.submit(
                    *(THREAD, recipe.prompt),
                    argv=recipe.argv,
                    runner=recipe.runner,
                    run=RUN,
                    cwd=self._work,
                )
                kills: list[Kill] = []
                async with _watching(config, client.links, submitted) as early:
                    await early.wait(lambda: early.attempt > 0)
                    began = time.monotonic()
                    for moment in moments:
                        await _wait(moment, early)
                        if early.over:
                            break
                        seen = Kill(time.monotonic() - began, early.chunks, early.stored)
                        notice(len(kills) + 1)
                        kills.append(await self._kill(early, seen))
                    await early.wait(lambda: False)
                    seconds = time.monotonic() - began
                ended = await client.wait(RUN)
                rows = {row.attempt: row for row in (await client.show(RUN)).attempts}
                for kill in kills:
                    if kill.attempt in rows:
                        kill.void_bytes = rows[kill.attempt].void_bytes
                late = Transcript()
                async for event in client.attach(THREAD, RUN):
                    late.take(event)
        return Played(
            name=name,
            folder=self.folder / name,
            seconds=seconds,
            status=ended.status.value,
            exit_code=ended.exit_code,
            error=ended.error,
            late=late.read(),
            early=early.read(),
            missing=early.missing,
            chunks=early.chunks,
            checkpoints=early.stored,
            kills=kills,
        )

    async def _kill(self, early: Transcript, kill: Kill) -> Kill:
        before = early.attempt
        self.kill()
        await self.start()
        await early.wait(lambda: early.attempt > before)
        if early.attempt > before:
            kill.attempt, kill.after = early.attempt, early.after
        return kill


@asynccontextmanager
async def _watching(
    config: Config, links: SharedLink, submitted: Submitted
) -> AsyncIterator[Transcript]:
    """From the beginning, through all kills."""
    seen = Transcript()
    target = await locate_submitted(links, submitted)
    async with Attachment(config, links.dial, target, shared=True) as attachment:
        counter = Watcher(links.dial, out_subject(THREAD, RUN), shared=True, summaries=True)
        async with counter, asyncio.TaskGroup() as group:  # what ends them ends the block as well
            tasks = [group.create_task(_follow(batches, seen)) for batches in (attachment, counter)]
            yield seen
            await end_tasks(tasks)


async def _follow(batches: AsyncIterable[list[Event]], seen: Transcript) -> None:
    async for events in batches:
        for event in events:
            seen.take(event)


async def _wait(moment: AtCheckpoint | AfterWork, early: Transcript) -> None:
    """Until then, or the end of the run."""
    if isinstance(moment, AtCheckpoint):
        await early.wait(lambda: early.stored >= moment.number)
        seconds = moment.delay
    else:
        seconds = moment.seconds
    try:
        async with asyncio.timeout(seconds):
            await early.wait(lambda: False)
    except TimeoutError:
        pass
