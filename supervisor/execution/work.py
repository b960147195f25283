"""The work of an attempt: its runner, and what a failure of it means."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import trio

from ...config.schema import ChatRunner, CommandRunner, PushRunner
from ...config.schema import Runner as RunnerConfig
from ...protocol.errors import Fenced, RunFailed, Unavailable
from ...protocol.model import Outcome, RunSpec, Status, one_line, unix_ms
from ..host.metrics import Meters
from ..output.continuation import Unit
from ..output.writer import Writer
from ..processes.keeper_client import Keeper
from ..processes.terminal_size import Window
from ..queue.attempt_log import AttemptNote
from ..queue.engine import Durable
from ..queue.session_rows import SessionRows
from .registry import Live
from .run_notes import RunNotes
from .runners.protocol import Remains, Resumption, Runner, Surroundings, Turn
from .settings import Settings

log = logging.getLogger("runctld")


class Work:
    """A run that was dispatched keeps the runner that it began with (``choose``)."""

    def __init__(
        self,
        settings: Settings,
        durable: Durable,
        keeper: Keeper,
        meters: Meters,
        hide: Callable[[str], str],
        open_window: Callable[[], Window],
        tell_changed: Callable[[str], Awaitable[None]],
    ) -> None:
        """``hide`` masks what is secret in a text. ``open_window``: of a run on a terminal.
        ``tell_changed``: what lists show of a thread is not what it was."""
        self._settings = settings
        self._durable = durable
        self._keeper = keeper
        self._meters = meters
        self._hide = hide
        self._open_window = open_window
        self._tell_changed = tell_changed

    def choose(self, live: Live) -> tuple[RunnerConfig, Runner] | None:
        """The run's runner and its settings, with a terminal for ``live`` if it is on one; None
        when there is no such runner any more."""
        runner = self._settings.runner(live.spec.runner)
        if runner is not None and isinstance(runner[0], CommandRunner) and runner[0].tty:
            live.show_in(self._open_window())
        return runner

    async def find_unit(
        self, live: Live, runner: tuple[RunnerConfig, Runner] | None
    ) -> Unit | None:
        """Behind what of an earlier attempt's output this one goes on; None, if it may not."""
        if live.attempt == 1 or runner is None or _find_policy(live, runner) != "continue":
            return None
        config = runner[0]
        if isinstance(config, ChatRunner):
            return "checkpoint" if config.background else "character" if config.prefill else None
        if isinstance(config, PushRunner):
            return None
        return "line" if await self._has_session(live.spec, config) else "checkpoint"

    async def _has_session(self, spec: RunSpec, config: CommandRunner) -> bool:
        """Whether the run's agent can go on with a session of its thread."""
        if config.session is None or not (config.resume_argv or config.next_argv):
            return False
        try:
            return await self._sessions_of(spec).find() is not None
        except Unavailable:  # its runner says so
            return False

    def _sessions_of(self, spec: RunSpec) -> ThreadSession:
        return ThreadSession(self._durable.sessions, spec.thread, spec.runner)

    def _notes_of(self, live: Live) -> RunNotes:
        log = self._durable.attempts.log
        tell = partial(self._tell_changed, live.spec.thread)
        return RunNotes(log, live.spec.run, live.attempt, tell)

    async def list_past(self, live: Live) -> list[AttemptNote]:
        """What is known of the run's earlier attempts: nothing, where the database does not say."""
        try:
            return await self._durable.attempts.log.list_of(live.spec.run)
        except Exception as error:
            log.warning("nothing is known of earlier attempts: %s", error)
            return []

    async def note_stop(self, live: Live, writer: Writer) -> None:
        """The attempt was ended by a daemon that stops in order, if by anything of ours."""
        if live.stopping and not self._keeper.gone and not self._keeper.broken_off:
            note = note_stopped(live, writer.executor)
            if writer.began:
                note = msgspec.structs.replace(note, began=int(writer.began * 1000))
            await self._durable.attempts.log.note(note)

    def refuse(
        self, live: Live, runner: tuple[RunnerConfig, Runner] | None, since: int, deaths: int
    ) -> Outcome | None:
        """How the run ends, when there is to be no further attempt. ``since``: the attempt that
        has stored its last checkpoint, 0 for none; ``deaths``: of daemons, or machines, in those
        behind it."""
        if live.attempt == 1:
            return None
        if _find_policy(live, runner) == "fail":
            return Outcome(
                Status.FAILED,
                error=f"interrupted; not run again (on_interrupt); runctl retry {live.spec.run}",
            )
        queue = self._settings.queue
        if deaths >= queue.max_attempts:
            chat = runner is not None and isinstance(runner[0], ChatRunner)
            more = "more of its reply" if chat else "a checkpoint"
            why = f"its daemon died in {deaths} attempts" + (f" without {more}" if since else "")
        elif live.attempt > queue.max_total_attempts:
            why = f"it was interrupted in each of {queue.max_total_attempts} attempts"
        else:
            return None
        return Outcome(Status.DEAD, error=f"{why}; not tried again")

    async def do(
        self,
        live: Live,
        writer: Writer,
        runner: tuple[RunnerConfig, Runner] | None,
        unreadable: str | None,
        found: Remains | None = None,
        resumption: Resumption | None = None,
    ) -> Outcome:
        """``found``: its command, when that outlived the daemon that began it. ``resumption``: the
        attempt continues. When the daemon is
        about to end it neither returns nor raises. Raises Fenced."""
        spec = live.spec
        if found is not None:
            return await self._go_on(live, writer, runner, found)
        if unreadable is not None:
            return Outcome(Status.FAILED, error=unreadable)
        if runner is None:
            return Outcome(
                Status.FAILED,
                error=f"runner {spec.runner!r} is no longer configured; add it, then retry",
            )
        log.info("run started")
        self._meters.dispatched(time.monotonic() - live.began)
        around = Surroundings(
            *(live.window, writer.watch_stored, None, writer.began),
            checkpoint=writer.checkpoint,
            resumption=resumption,
            sessions=self._sessions_of(spec),
            notes=self._notes_of(live),
            begin_anew=writer.begin_anew,
            emit_with=writer.append_with,
            start_over=writer.start_over,
            is_aborted=lambda: live.aborting,
        )
        return await self._run(live, writer, runner, around)

    async def _go_on(
        self,
        live: Live,
        writer: Writer,
        runner: tuple[RunnerConfig, Runner] | None,
        found: Remains,
    ) -> Outcome:
        log.info("run goes on, as an earlier daemon began it")
        self._meters.went_on()
        if runner is None or not isinstance(runner[0], CommandRunner):
            # What it was begun with is not configured any more.
            config = CommandRunner(live.spec.runner)
            runner = config, self._settings.make_runner(config)
        around = Surroundings(
            *(live.window, writer.watch_stored, found, writer.began),
            checkpoint=writer.checkpoint,
            sessions=self._sessions_of(live.spec),
            notes=self._notes_of(live),
            begin_anew=writer.begin_anew,
        )
        return await self._run(live, writer, runner, around)

    async def _run(
        self,
        live: Live,
        writer: Writer,
        runner: tuple[RunnerConfig, Runner],
        around: Surroundings,
    ) -> Outcome:
        spec = live.spec
        with live.working(None if around.found is None else around.began):
            try:
                history = await self._read_history(spec, runner[0])
                return await runner[1].run(spec, live.attempt, writer.append, history, around)
            except RunFailed as error:
                return Outcome(Status.FAILED, error.exit_code, one_line(str(error)))
            except Unavailable as error:
                return Outcome(Status.FAILED, error=one_line(str(error)))
            except (Fenced, trio.Cancelled):
                raise
            except Exception as error:
                # The daemon is about to end, and with it the keeper: leave it to replay.
                if self.is_ending(live):
                    await trio.sleep_forever()
                if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                    log.warning("%s", error)
                    text = "runctld has no file descriptors left; raise its limit, then retry"
                    return Outcome(Status.FAILED, error=text)
                log.exception("the runner failed by an internal error")
                return self.make_internal_error(error)

    async def _read_history(self, spec: RunSpec, config: RunnerConfig) -> list[Turn]:
        if not isinstance(config, ChatRunner):
            return []
        pairs = await self._durable.conversations.read_turns(
            spec.thread, spec.run, config.history // 2, config.history_bytes
        )
        return [Turn(prompt, reply) for prompt, reply in pairs]

    def is_ending(self, live: Live) -> bool:
        """Whether an error may be the daemon's end: then it is left to the replay."""
        return self._keeper.gone or self._keeper.broken_off or live.stopping

    async def forget(self, live: Live) -> None:
        """The end of the run is stored: its tree is of no use to another daemon."""
        await self._keeper.forget_run(live.spec.run)

    def make_internal_error(self, error: Exception) -> Outcome:
        words = self._hide(f"{type(error).__name__}: {error}")
        return Outcome(Status.FAILED, error=one_line(f"internal error: {words}"))


class ThreadSession:
    """The session of one thread with one runner."""

    def __init__(self, rows: SessionRows, thread: str, runner: str) -> None:
        self._rows = rows
        self._thread = thread
        self._runner = runner

    async def find(self) -> str | None:
        return await self._rows.find(self._thread, self._runner)

    async def look(self) -> str | None:
        return await self._rows.look(self._thread, self._runner)

    async def store(self, name: str) -> None:
        await self._rows.store(self._thread, self._runner, name)

    async def forget(self) -> None:
        await self._rows.forget(self._thread, self._runner)


def _find_policy(live: Live, runner: tuple[RunnerConfig, Runner] | None) -> str | None:
    if live.spec.on_interrupt is not None:
        return live.spec.on_interrupt
    return None if runner is None else runner[0].on_interrupt


def note_stopped(live: Live, executor: str) -> AttemptNote:
    """It ends now, with a daemon that stops in order."""
    return AttemptNote(
        run=live.spec.run,
        attempt=live.attempt,
        executor=executor,
        ended=unix_ms(),
        cause="stopped",
    )
