"""A run of an agent, what is done to it, and what came of that."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runctl.client.events import Chunk, Continue, End, Reset
from runctl.protocol.errors import RunctlError
from runctl.protocol.model import Run

from .cast import Agent
from .endpoint import Endpoint
from .recipes import place
from .stage import Stage

#: How long an agent may take to come to a moment, or to its end, before it is given up, seconds.
DEADLINE = 300.0
#: The agent stores its call when it has begun it, and says so nowhere: so long it is given for
#: that, seconds.
SETTLE = 1.0
LOOK = 0.05
TASK, LATER = "Task alpha: append a line to the journal.", "Task beta: say what was done."


@dataclass(frozen=True)
class Moment:
    """``at``: where it is killed, ``times`` times. ``alone``: only the daemon is. ``later``:
    whether the thread's next run is tried as well."""

    name: str
    at: Literal["", "answer", "tool"] = ""
    times: int = 0
    alone: bool = False
    later: bool = False

    @property
    def attempts(self) -> int:
        return 1 if self.alone else 1 + self.times


MOMENTS = (
    Moment("undisturbed", later=True),
    Moment("daemon alone", "answer", 1, alone=True),
    Moment("in the answer", "answer", 1, later=True),
    Moment("in the answer, twice", "answer", 2),
    Moment("in the tool", "tool", 1),
)


@dataclass
class Result:
    """``wrong``: what must not be, a line each. ``outside``: hosts that it wanted to reach.
    ``asides``: how much else it asked the endpoint."""

    agent: str
    moment: Moment
    generations: int = 0
    effects: int = 0
    attempts: int = 0
    asides: int = 0
    seconds: float = 0.0
    outside: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


class GaveUp(Exception):
    """The agent did not come to where it was to be; the text says where."""


class Trial:
    """All of it is in ``folder``; the agent works in ``folder/work``, where its journal is."""

    def __init__(self, agent: Agent, recipe: dict[str, Any], commands: Path, folder: Path) -> None:
        self._agent, self._folder = agent, folder
        home, work = folder / "home", folder / "work"
        for path in (home, work):
            path.mkdir(parents=True)
        self._journal, self._hold = work / "journal", folder / "hold"
        command = (
            f"echo effect >> {self._journal};"
            f" while [ -e {self._hold} ]; do sleep 0.1; done; echo appended"
        )
        self._news = asyncio.Event()
        loop = asyncio.get_running_loop()

        def note_news() -> None:
            loop.call_soon_threadsafe(self._news.set)

        self.endpoint = Endpoint(command, note_news)
        self._work, self._home = work, home
        self._recipe, self._commands = recipe, commands

    async def play(self, moment: Moment) -> Result:
        result = Result(self._agent.name, moment)
        began = time.monotonic()
        url = self.endpoint.url
        runner = place(self._recipe, self._commands, self._work)
        runner["env"] = {
            "HOME": str(self._home),
            **{name: url for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")},
            **{name: "127.0.0.1,localhost" for name in ("NO_PROXY", "no_proxy")},
            **self._agent.settle(self._home, url),
        }
        stage = Stage(self._folder, runner, self._home, "120s" if moment.alone else "0s")
        try:
            await stage.start()
            await self._perform(stage, moment, result)
        except (GaveUp, RuntimeError, RunctlError) as problem:
            result.wrong.append(str(problem))
        finally:
            left = await stage.close()
            self.endpoint.close()
        result.wrong += [f"left behind: {argv}" for argv in left.values()]
        result.wrong += self.endpoint.strange
        result.outside = self.endpoint.outside
        result.asides = len(self.endpoint.asides)
        result.seconds = time.monotonic() - began
        return result

    async def _perform(self, stage: Stage, moment: Moment, result: Result) -> None:
        if moment.at == "answer":
            self.endpoint.held.set()
        elif moment.at == "tool":
            self._hold.touch()
        submitted = await stage.client.submit("thread", TASK, runner="agent", cwd=self._work)
        early = asyncio.create_task(self._read(stage, submitted.run))
        try:
            for time_ in range(1, moment.times + 1):
                await self._reach(moment, time_, early)
                if moment.alone:
                    stage.kill_daemon()
                else:
                    await asyncio.to_thread(stage.lose_machine)
                if time_ == moment.times:
                    self.endpoint.held.clear()
                    self._hold.unlink(missing_ok=True)
                await stage.start()
            end, seen = await self._wait(early, "its end")
        finally:
            early.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await early
        run = (await stage.client.show(submitted.run)).run
        result.generations = len(self.endpoint.generations)
        result.effects = self._count_effects()
        result.attempts = run.attempt
        result.wrong += self._judge(run, end, seen)
        if seen != (await self._read(stage, submitted.run))[1]:
            result.wrong.append("early and late watchers saw different output")
        if moment.later and not result.wrong:
            await self._go_on(stage, result)

    def _judge(self, run: Run, end: End, seen: dict[str, bytes]) -> list[str]:
        wrong = []
        if end.status != "succeeded":
            last = seen.get("stderr", b"").decode(errors="replace").strip().splitlines()[-3:]
            wrong.append(f"{end.status}, exit code {end.exit_code}: {' / '.join(last)}")
        generations = self.endpoint.generations
        wrong += [
            f"generation {x.number} was not told the task"
            for x in generations
            if TASK not in x.history
        ]
        if not generations or generations[-1].calls:
            wrong.append("the model was not asked for an answer")
        elif generations[-1].answer.encode() not in seen.get("stdout", b""):
            wrong.append("the answer is not in the output")
        return wrong

    async def _go_on(self, stage: Stage, result: Result) -> None:
        """With the thread's next run, whose agent must know of the first."""
        before, effects = len(self.endpoint.generations), self._count_effects()
        submitted = await stage.client.submit("thread", LATER, runner="agent", cwd=self._work)
        reading = asyncio.create_task(self._read(stage, submitted.run))
        end, seen = await self._wait(reading, "the end of the next run")
        run = (await stage.client.show(submitted.run)).run
        result.wrong += [f"next run: {x}" for x in self._judge(run, end, seen)]
        new = self.endpoint.generations[before:]
        took = len(new), self._count_effects() - effects
        if took != (1, 0):
            result.wrong.append(f"the next run took {took[0]}, {took[1]}, not 1, 0")
        if not all(LATER in x.history for x in new):
            result.wrong.append("the next run's prompt did not come")

    def _count_effects(self) -> int:
        return len(self._journal.read_text().splitlines()) if self._journal.exists() else 0

    async def _reach(self, moment: Moment, time_: int, early: asyncio.Task[Any]) -> None:
        where = f"the {moment.at}, time {time_}"
        if moment.at == "answer":
            await self._until(lambda: self.endpoint.halves >= time_, where, early)
        else:
            await self._until(lambda: self._count_effects() >= time_, where, early)
            await asyncio.sleep(SETTLE)

    async def _until(self, what: Callable[[], bool], where: str, early: asyncio.Task[Any]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not what():
            if early.done():
                end, seen = early.result()
                said = b" / ".join(x.strip()[-500:] for x in seen.values()).decode(errors="replace")
                raise GaveUp(f"it ended before {where}: {end.status}, {end.exit_code}: {said}")
            if time.monotonic() > deadline:
                raise GaveUp(f"it did not come to {where}")
            self._news.clear()
            with contextlib.suppress(TimeoutError):  # a file tells nobody
                await asyncio.wait_for(self._news.wait(), LOOK)

    async def _wait(
        self, reading: asyncio.Task[tuple[End, dict[str, bytes]]], where: str
    ) -> tuple[End, dict[str, bytes]]:
        try:
            return await asyncio.wait_for(reading, DEADLINE)
        except TimeoutError:
            raise GaveUp(f"it did not come to {where}") from None

    async def _read(self, stage: Stage, run: str) -> tuple[End, dict[str, bytes]]:
        """How the run ended, and what of its output is valid then, by stream."""
        chunks: dict[int, Chunk] = {}
        async for event in stage.client.attach("thread", run):
            if isinstance(event, Reset):
                chunks = {}
            elif isinstance(event, Continue):
                chunks = {seq: chunk for seq, chunk in chunks.items() if seq <= event.after}
            elif isinstance(event, Chunk):
                chunks[event.seq] = event
            elif isinstance(event, End):
                found: dict[str, bytes] = {}
                for _, chunk in sorted(chunks.items()):
                    found[chunk.stream] = found.get(chunk.stream, b"") + chunk.data
                self._news.set()
                return event, found
        raise GaveUp("the end of the output did not come")
