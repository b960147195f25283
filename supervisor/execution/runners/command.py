"""The ``command`` runner: a process without a shell, its output as it comes."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import trio

from ....config.prompts import refusal, thread_refusal
from ....config.run_limits import Plan
from ....config.schema import CommandRunner
from ....config.units import readable
from ....protocol.errors import BadRequest, RunFailed, shortened
from ....protocol.model import Outcome, RunSpec, Status, one_line
from ...processes.keeper_client import Keeper
from ...processes.keeper_visit import About
from ...processes.process import Left, Process
from ...processes.terminal_size import Clients
from .agent_session import Invocation, SessionWatch, begin, choose, store_name
from .ends import FEED, SLAVE, Ends, adopt_ends, open_ends
from .filters import filters_left
from .flow import Flow
from .protocol import ALONE, Emit, Remains, Surroundings, Turn, ignore_stored
from .run_files import RunFiles
from .run_socket import RunSocket, read_data
from .workplace import Workplace

log = logging.getLogger("runctld.command")

#: So long nothing is written by what a command leaves behind: then nothing is waited for,
#: seconds, unless a filter is among it.
QUIET = 0.5
#: Looks at what a command left behind that a runner may have at once. One that hangs keeps its
#: thread for good, and what other parts of the daemon do in threads must not wait for that.
LOOKS = 8
#: The kernel passes on what is written to a terminal a little later, seconds.
TERMINAL_LAG = 0.05


#: Of why memory had a command killed, in words that name its limit.
_STARVED = {
    "limit": "over its memory limit of {}",
    "machine": "the machine, or the service, had no memory left",
}


@dataclass(slots=True)
class _Job:
    """A command that runs."""

    process: Process
    ends: Ends
    flow: Flow
    about: About
    listener: socket.socket | None

    async def keep_clients(self, clients: Clients) -> None:
        """The next daemon is told of whoever watches on a terminal."""
        self.about = msgspec.structs.replace(self.about, clients=clients)
        await self.process.describe(self.about)


class Command:
    """Runs one process tree per run. ``grace``: seconds between TERM and KILL, and the
    longest that what is left behind may still write after the command's own end. ``limits``:
    how those of ``config`` are kept. ``files``: what its runs have beside them; None for
    nothing. ``spooled``: see ``open_ends``."""

    def __init__(
        self,
        config: CommandRunner,
        keeper: Keeper,
        grace: float,
        limits: Plan | None = None,
        *,
        files: RunFiles | None = None,
        spooled: bool = False,
    ) -> None:
        self._config = config
        self._place = Workplace(config, keeper, files)
        self._limits = limits
        self._keeper = keeper
        self._grace = grace
        self._spooled = spooled
        self._keep = config.leftovers == "keep-until-daemon"
        self._looks = trio.CapacityLimiter(LOOKS)

    async def run(
        self,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        history: Sequence[Turn],
        around: Surroundings = ALONE,
    ) -> Outcome:
        """Ends with the process's exit code. The whole tree is gone on every way out but that of a
        daemon that breaks off: then another one finds it."""
        sessions = around.sessions
        refused = refusal(self._config, spec.prompt, spec.argv)
        refused = refused or thread_refusal(self._config, spec.thread)
        invocation = None
        if around.found is None:
            # Refused at submit time as well: it may have been queued under another configuration.
            if refused is not None:
                raise RunFailed(refused)
            resumed = around.resumption is not None
            invocation = await choose(self._config, spec, sessions, resumed=resumed)
        if self._config.session is None or sessions is None:
            return await self._run_once(invocation, spec, attempt, emit, around)
        watch = SessionWatch(self._config, emit, sessions)
        if around.found is not None and await sessions.find() is not None:
            watch.stop_searching()
        outcome = await self._run_once(invocation, spec, attempt, watch.emit, around)
        may_miss = refused is None and (invocation is None or invocation.goes_on)
        if may_miss and watch.is_missing(outcome):
            log.warning("the session is missing: the same attempt begins another one")
            if self._config.session != "uuid":
                await sessions.forget()
            await around.begin_anew()
            watch = SessionWatch(self._config, emit, sessions)
            invocation = await begin(self._config, spec, sessions)
            anew = replace(around, found=None, resumption=None)
            outcome = await self._run_once(invocation, spec, attempt, watch.emit, anew)
        return outcome

    async def _run_once(
        self,
        invocation: Invocation | None,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        around: Surroundings,
    ) -> Outcome:
        """``invocation``: None for what outlived an earlier daemon."""
        with ExitStack() as stack:
            stack.callback(self._forget, spec.run)
            if invocation is None:
                assert around.found is not None
                job = await self._go_on(stack, spec.run, emit, around, around.found)
            else:
                job = await self._begin(stack, spec, attempt, emit, around, invocation)
            if around.window is not None and job.ends.kept:
                await around.window.keep_for_next(job.keep_clients)
            around.watch_stored(job.ends.note_stored)
            stack.callback(around.watch_stored, ignore_stored)
            return await self._follow(job, self._answer(job, around))

    def _forget(self, run: str) -> None:
        if not self._keeper.broken_off:  # or the next daemon has what is beside it
            self._place.forget(run)

    def _answer(self, job: _Job, around: Surroundings) -> RunSocket | None:
        """Who answers the run's requests; None when there is no socket."""
        if job.listener is None:
            return None

        async def store_checkpoint(text: str) -> None:
            data = read_data(text)
            if job.ends.terminal is not None:
                await trio.sleep(TERMINAL_LAG)
            await job.flow.drain()
            await around.checkpoint(data)

        async def name_session(name: str) -> None:
            if around.sessions is None:
                raise BadRequest("this run has no session")
            await store_name(around.sessions, name)

        verbs = {"CHECKPOINT": store_checkpoint, "SESSION": name_session}
        if around.notes is not None:
            verbs |= {"STATUS": around.notes.say, "USAGE": around.notes.add_usage}
        return RunSocket(job.listener, verbs)

    async def _begin(
        self,
        stack: ExitStack,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        around: Surroundings,
        invocation: Invocation,
    ) -> _Job:
        argv, prompt = invocation.argv, invocation.stdin
        env, directory, listener = await self._place.prepare(
            stack, spec, attempt, invocation.session, around.resumption
        )
        with self._place.as_its_user():  # or it could not open /dev/stdout, or its terminal
            ends = open_ends(stack, self._config, prompt, around.window, spooled=self._spooled)
        flow = Flow(ends.sources, emit)
        stack.callback(flow.close)
        about = About(
            *("run", spec.run, attempt, around.began, one_line(shortened(argv[0], 200))),
            *(self._grace, self._keep),
        )
        try:
            process = await self._keeper.spawn(
                argv,
                mark=spec.run,
                env=env,
                cwd=directory,
                stdin=ends.given[0],
                stdout=ends.given[1],
                stderr=ends.given[2],
                tty=ends.terminal is not None,
                umask=self._keeper.inherited.umask,
                group=f"{spec.run}.{attempt}",
                account=self._config.account,
                limits=self._limits,
                stop_signal=signal.Signals[f"SIG{self._config.stop_signal}"],
                keep=ends.kept,
                tell=about if ends.kept else None,
            )
        finally:
            ends.hand_over()
        return _Job(process, ends, flow, about, listener)

    async def _go_on(
        self, stack: ExitStack, run: str, emit: Emit, around: Surroundings, found: Remains
    ) -> _Job:
        tree = found.tree
        assert tree.about is not None
        if around.window is not None:
            around.window.restore(tree.about.clients)
        ends = adopt_ends(stack, tree.take_files(), found.stored, around.window)
        if lost := ends.find_lost(found.stored):
            found.skip(lost)
        flow = Flow(ends.sources, emit)
        stack.callback(flow.close)
        (at, _), total = tree.about.adopted[-1], sum(found.stored.values())
        adopted = [*tree.about.adopted[:-1], (at, total)]
        about = msgspec.structs.replace(tree.about, adopted=adopted)
        await self._keeper.describe(tree.number, about)
        listener = self._place.listen(stack, run)
        # Last: from here on whoever has the job ends it, until then whoever gave us the tree.
        return _Job(self._keeper.claim_found(tree), ends, flow, about, listener)

    async def _follow(self, job: _Job, answering: RunSocket | None) -> Outcome:
        process, ends, flow, about = job.process, job.ends, job.flow, job.about
        # The reader outlives a cancellation, so that what the tree says while it is
        # stopped is kept; after it is gone a second is plenty.
        reading = trio.CancelScope(shield=True)
        feed = trio.CancelScope()
        # A program may want to store a checkpoint when it is told to end.
        asking = trio.CancelScope(shield=True)
        left: Left | None = None
        read = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, flow, reading, read)
            if answering is not None:
                nursery.start_soon(_serve, answering, asking)
            if ends.pipe >= 0:
                nursery.start_soon(_feed, ends, process, feed)
            try:
                try:
                    status = await process.wait()
                    feed.cancel()
                    await self._release_terminal(job)
                    late = await self._settle(flow, ends, process.pid, about.grace)
                    told = flow.total
                    # Children left behind would hold the pipes open, and outlive the run.
                    left = await process.end(about.grace, keep=about.keep)
                finally:
                    gone = left is not None
                    try:
                        if left is None and not self._keeper.broken_off:
                            with trio.CancelScope(shield=True):
                                await process.end(about.grace)
                            gone = True
                    finally:
                        await self._release_terminal(job)
                        asking.cancel()
                        flow.finish()
                        # Some may live on and have our pipes: what is kept, or all when
                        # the keeper is lost.
                        if self._keeper.broken_off:
                            reading.cancel()
                        elif about.keep or not gone:
                            reading.deadline = trio.current_time() + 1
                # The stream may take nothing: an abort gets through then as well.
                await read.wait()
            except BaseException:
                reading.deadline = min(reading.deadline, trio.current_time() + 1)
                raise
        if left.ended:
            log.info("ended with the run, which had left it behind: %s", ", ".join(left.ended))
        if left.kept:
            log.info("goes on until this daemon ends: %s", ", ".join(left.kept))
        outcome = _outcome(about.command, status)
        if status == -signal.SIGKILL and process.starved:
            why = _STARVED[process.starved].format(readable(self._config.limits.memory or 0))
            outcome = msgspec.structs.replace(outcome, error=f"killed: {why}")
        if not late and flow.total == told:
            return outcome
        when = f"not done {about.grace:g} s later" if late else "still writing when it was ended"
        note = f"the end of the output was cut: what the command left behind was {when}"
        log.warning("%s", note)
        return msgspec.structs.replace(outcome, note=note)

    async def _release_terminal(self, job: _Job) -> None:
        """The command has ended: only what it left behind has its terminal now."""
        if job.ends.terminal is not None and job.ends.terminal.slave >= 0:
            job.ends.terminal.release()
            if job.ends.kept and not self._keeper.broken_off:
                with trio.CancelScope(shield=True):
                    await job.process.drop([SLAVE])

    async def _settle(self, flow: Flow, ends: Ends, session: int, grace: float) -> bool:
        """The command itself has ended. Wait until what it left behind has closed its output,
        or has been quiet for ``QUIET`` and is no filter; whether it was still at it after
        ``grace``. Time in which the stream takes nothing does not count."""
        left = max(grace, QUIET)
        while flow.open:
            if left <= 0:
                return True
            began, before = trio.current_time(), flow.total
            with trio.move_on_after(min(QUIET, left)) as quiet:
                await flow.moved()
            left -= min(trio.current_time() - began, QUIET)
            if not quiet.cancelled_caught:
                continue
            if flow.emitting:
                await flow.moved()
                continue
            with trio.move_on_after(max(left, QUIET)) as looking:
                filters = await trio.to_thread.run_sync(
                    partial(self._filters_left, session, ends),
                    abandon_on_cancel=True,
                    limiter=self._looks,
                )
            if looking.cancelled_caught:  # a file of one is on a server that does not answer
                return True
            # A loop that was held up meets the deadline and what came before it at once.
            if not filters and flow.total == before:
                return False
        return False

    def _filters_left(self, session: int, ends: Ends) -> bool:
        with self._place.as_its_user():
            return filters_left(session, ends.outputs, ends.stdin)


async def _feed(ends: Ends, process: Process, scope: trio.CancelScope) -> None:
    await ends.feed(scope)
    if ends.kept:  # or the command would not see the end of its stdin
        await process.drop(FEED)


async def _serve(answering: RunSocket, scope: trio.CancelScope) -> None:
    with scope:
        await answering.serve()


async def _read(flow: Flow, scope: trio.CancelScope, over: trio.Event) -> None:
    with scope:
        await flow.run()
    over.set()


def _outcome(name: str, status: int) -> Outcome:
    if status == 0:
        return Outcome(Status.SUCCEEDED, exit_code=0)
    if status > 0:
        return Outcome(Status.FAILED, status, f"{name} exited with code {status}")
    try:
        what = signal.Signals(-status).name
    except ValueError:
        what = f"signal {-status}"
    return Outcome(Status.FAILED, 128 - status, f"{name} was ended by {what}")
