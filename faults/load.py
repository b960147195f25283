"""A round's load: clients that submit, watch, abort, purge and retry as its plan says,
and what they were told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runctl.protocol import messages
from runctl.protocol.errors import RequestError, RunctlError

from . import work as program
from .client import Client
from .http_watching import HttpWatcher
from .plan import Act, Plan, Work
from .stage import Stage

#: From its first submit, faults and all.
ACCEPTED_WITHIN = 60.0
RETRIED_WITHIN = 5.0
#: What an attach exits with, by the run's status.
EXIT = {"succeeded": 0, "failed": 1, "dead": 1, "aborted": 5}
#: Exit codes of an attach that began while there was nobody to ask.
TRY_AGAIN = (3, 4)


@dataclass
class Told:
    """What a request was answered, or that it was not (``reply`` and ``problem`` None)."""

    act: Act
    asked: float
    answered: float = 0.0
    reply: Any = None
    problem: str | None = None


@dataclass
class Seen:
    """What a watcher was shown: ``events`` of ``attach --json``, and when each came."""

    act: Act
    events: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    code: int | None = None
    left: bool = False
    stderr: str = ""
    process: asyncio.subprocess.Process | None = None
    reader: asyncio.Task[None] | None = None
    http: HttpWatcher | None = None

    @property
    def name(self) -> str:
        return f"{self.act.what} {self.act.thread} {self.act.run or ''} at {self.act.at}"


class Load:
    def __init__(self, stage: Stage, plan: Plan, folder: Path) -> None:
        self._stage, self._plan, self._folder = stage, plan, folder
        self.journal = folder / "journal"
        self._client = stage.client()
        self._accepted = {run: asyncio.Event() for run in plan.works}
        self._any = {thread: asyncio.Event() for thread in plan.lanes}
        #: thread -> its runs in the order in which they were accepted, by one client.
        self.accepted: dict[str, list[str]] = {thread: [] for thread in plan.lanes}
        self.unsure = 0
        self.aborts: list[Told] = []
        self.purges: list[Told] = []
        self.retries: list[Told] = []
        self.watchers: list[Seen] = []
        self.wrong: list[str] = []

    async def run(self) -> None:
        """Until all was submitted and done; watchers stay."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for lane in self._plan.lanes.values():
                group.create_task(self._submit_lane(lane))
            for act in self._plan.acts:
                group.create_task(self._act(act, began))

    async def _submit_lane(self, lane: list[Work]) -> None:
        async with asyncio.TaskGroup() as group:
            for work in lane:
                await asyncio.sleep(work.wait)
                await self._submit(work)
                self.accepted[work.thread].append(work.run)
                self._accepted[work.run].set()
                self._any[work.thread].set()
                for _ in range(work.again):
                    group.create_task(self._submit(work))

    async def _submit(self, work: Work) -> None:
        """Until it is accepted, under the same id."""
        request = self._request(work)
        end = time.monotonic() + ACCEPTED_WITHIN
        while True:
            try:
                reply = await self._client.ask(request, messages.Submitted)
                break
            except (RunctlError, TimeoutError, OSError) as error:
                self.unsure += 1
                if _inexcusable(error):
                    self.wrong.append(f"submit of {work.run}: {error}")
                if time.monotonic() > end:
                    self.wrong.append(f"submit of {work.run} was never accepted: {error!r}")
                    return
                await asyncio.sleep(0.1)
        if (reply.run, reply.thread) != (work.run, work.thread):
            self.wrong.append(f"submit of {work.run} was answered with {reply}")

    def _request(self, work: Work) -> messages.Submit:
        if work.chat:
            wanted = {
                "run": work.run,
                "parts": work.parts,
                "pause": work.pause,
                "size": work.size,
            }
            return messages.Submit(work.thread, "chat", work.run, json.dumps(wanted))
        argv = [sys.executable, "-I", "-S", program.__file__, str(self.journal), work.mode]
        numbers = (work.parts, work.pause, work.size, work.code, work.prompt)
        argv += [str(x) for x in numbers]
        prompt = program.prompt_of(work.prompt) if work.prompt else None
        return messages.Submit(work.thread, work.kind, work.run, prompt, argv, cwd="/")

    async def _act(self, act: Act, began: float) -> None:
        await asyncio.sleep(max(0.0, began + act.at - time.monotonic()))
        event = self._accepted[act.run] if act.run else self._any[act.thread]
        await event.wait()
        if act.what in ("attach", "follow", "http"):
            seen = Seen(act)
            self.watchers.append(seen)
            await self._watch(seen, began)
            return
        kind: type[Any]
        request: messages.Request
        if act.what == "abort":
            request, kind, told = messages.Abort(act.thread, act.run), messages.Aborted, self.aborts
        elif act.what == "purge":
            request = messages.Purge([act.thread], force=act.force)
            kind, told = messages.Purged, self.purges
        else:
            assert act.run is not None
            request, kind, told = messages.Retry(act.run), messages.Submitted, self.retries
            await self._wait_end(act.run)
        this = Told(act, time.monotonic())
        told.append(this)
        client = self._stage.client()
        try:
            this.reply = await client.ask(request, kind)
        except RequestError as error:
            if _inexcusable(error):
                self.wrong.append(f"{act.what}: {error}")
            if type(error) is not RequestError:  # by its name nothing was done
                this.problem = str(error)
        except (RunctlError, TimeoutError, OSError):
            self.unsure += 1
        finally:
            this.answered = time.monotonic()
            await client.close()

    async def _wait_end(self, run: str) -> None:
        """What has not ended cannot be retried."""
        with contextlib.suppress(RunctlError, TimeoutError):
            async with asyncio.timeout(RETRIED_WITHIN):
                while True:
                    found = await self._client.sure(messages.Show(run), messages.RunDetails)
                    if found.run.status.terminal:
                        return
                    await asyncio.sleep(0.3)

    # ---- watchers ---------------------------------------------------------------

    async def _watch(self, seen: Seen, began: float) -> None:
        """Start the watcher; when it leaves by itself, until it has."""
        await self._attach(seen)
        if not seen.act.until:
            return
        await asyncio.sleep(max(0.0, began + seen.act.until - time.monotonic()))
        await self.leave(seen)

    async def _attach(self, seen: Seen) -> None:
        act = seen.act
        if act.what == "http":
            seen.reader = asyncio.create_task(self._read_http(seen))
            return
        words = ["attach", act.thread, *(["--run", act.run] if act.run else ["-f"]), "--json"]
        seen.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "runctl.cli.main", "-c", str(self._stage.client_config)),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        seen.reader = asyncio.create_task(self._read(seen, seen.process))

    async def _read(self, seen: Seen, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        async for line in process.stdout:
            if seen.left and not line.endswith(b"\n"):
                break  # Ctrl-C comes in the middle of a write, too
            seen.times.append(time.monotonic())
            seen.events.append(json.loads(line))
        seen.stderr += (await process.stderr.read()).decode(errors="replace")
        code = await process.wait()
        if code in TRY_AGAIN and not seen.events and not seen.left:
            await asyncio.sleep(0.3)
            await self._attach(seen)
            return
        seen.code = code

    async def _read_http(self, seen: Seen) -> None:
        def hear(event: dict[str, Any]) -> None:
            seen.times.append(time.monotonic())
            seen.events.append(event)

        assert seen.act.run is not None
        watcher = HttpWatcher(seen.act.run, [x.port for x in self._stage.gateways], seen.act.cuts)
        seen.http = watcher
        try:
            await watcher.watch(hear)
        except RuntimeError as error:
            self.wrong.append(f"{seen.name}: {error}")
            seen.code = -1
            return
        seen.code = EXIT[seen.events[-1]["status"]]

    async def leave(self, seen: Seen) -> None:
        """Detach as Ctrl-C does."""
        seen.left = True
        if seen.act.what == "http":
            if seen.code is None and seen.reader is not None:
                seen.reader.cancel()
                await asyncio.wait([seen.reader])
                seen.code = 130
            return
        if seen.process is not None and seen.process.returncode is None:
            # Python itself does not take an interrupt well while it starts.
            seen.process.send_signal(signal.SIGINT if seen.events else signal.SIGKILL)
        if not await self.ended(seen, 20.0) and seen.process is not None:
            seen.stderr += f" (it does not end: {_state(seen.process.pid)})"

    async def ended(self, seen: Seen, deadline: float) -> bool:
        """Whether the watcher ends within ``deadline`` seconds."""
        end = time.monotonic() + deadline
        while seen.code is None and time.monotonic() < end:
            reader = seen.reader  # an attach that is tried again has a new one
            assert reader is not None
            await asyncio.wait([reader], timeout=max(0.0, end - time.monotonic()))
            if reader.done():
                reader.result()
        return seen.code is not None

    async def finish(self, deadline: float) -> None:
        """After the settling: watchers of runs end by themselves; those of threads leave."""
        end = time.monotonic() + deadline
        for seen in self.watchers:
            if seen.act.run is None or seen.left:
                continue
            if not await self.ended(seen, max(1.0, end - time.monotonic())):
                self.wrong.append(f"watcher hangs: {seen.name}: last {seen.events[-1:]}")
        for seen in self.watchers:
            if seen.code is None:
                await self.leave(seen)
        self._save()

    def _save(self) -> None:
        told = [*self.aborts, *self.purges, *self.retries]
        (self._folder / "told").write_text("".join(f"{each}\n" for each in told))
        for n, seen in enumerate(self.watchers):
            lines = [
                json.dumps({"t": round(t, 4), **event})
                for t, event in zip(seen.times, seen.events, strict=True)
            ]
            head = f"# {seen.name}, exit {seen.code}, left {seen.left}\n# {seen.stderr!r}\n"
            (self._folder / f"watcher-{n}").write_text(head + "\n".join(lines) + "\n")

    async def close(self) -> None:
        for seen in self.watchers:
            if seen.process is not None and seen.process.returncode is None:
                seen.process.kill()
            if seen.reader is not None:
                await asyncio.wait([seen.reader], timeout=5)
        await self._client.close()

    @property
    def client(self) -> Client:
        return self._client


def _inexcusable(error: BaseException) -> bool:
    """An answer that does not say in one line what is wrong and what to do."""
    text = str(error)
    return isinstance(error, RequestError) and ("\n" in text or "see the daemon's log" in text)


def _state(pid: int) -> str:
    """What a process is doing, in the kernel's words."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        return f"{status[0]}, {status[2]}, in {Path(f'/proc/{pid}/wchan').read_text()}"
    except OSError as error:
        return str(error)
