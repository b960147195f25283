"""One attempt's life: it waits for what is before it on its thread, opens the run's output, does
the work, writes the end, and tells whoever listens."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence

import trio

from ...config.schema import ChatRunner, CommandRunner
from ...config.schema import Runner as RunnerConfig
from ...protocol.errors import Fenced, RunFailed, StreamUnfit
from ...protocol.model import Outcome, RunSpec, Status, one_line
from ..host.logs import about
from ..host.metrics import Meters
from ..output.publisher import Streams
from ..output.writer import Writer
from ..processes.keeper_client import Keeper
from ..processes.terminal_size import Window
from ..queue.engine import Durable
from .registry import Live, Registry
from .run_end import Ended
from .runners.protocol import Runner, Turn
from .settings import Settings
from .thread_order import Order

log = logging.getLogger("runctld")


class Attempts:
    """``dispatch`` is called for each attempt."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        order: Order,
        streams: Streams,
        durable: Durable,
        keeper: Keeper,
        *,
        executor: str,
        meters: Meters,
        hide: Callable[[str], str],
        open_window: Callable[[], Window],
        on_end: Sequence[Callable[[Ended], None]],
    ) -> None:
        """``hide`` masks what is secret in a text. ``open_window``: of a run on a terminal.
        ``on_end``: told of each end in turn, before anybody else can know."""
        self._settings = settings
        self._registry = registry
        self._order = order
        self._streams = streams
        self._durable = durable
        self._keeper = keeper
        self._executor = executor
        self._meters = meters
        self._hide = hide
        self._open_window = open_window
        self._on_end = on_end

    async def dispatch(self, spec: RunSpec, attempt: int, unreadable: str | None = None) -> Outcome:
        """How the run ended. ``unreadable``: why its record cannot be read, if it cannot. When
        the daemon stops it neither returns nor raises, so that the row stays unfinished."""
        ended, fenced = await self._run_fenced(spec, attempt, unreadable)
        while fenced is not None and fenced.found is not None:
            counted = await self._durable.attempts.renumber(spec.run, attempt, fenced.found)
            if counted is None:
                break
            attempt = counted
            with about(thread=spec.thread, run=spec.run, attempt=attempt):
                log.warning("the database is older than the output, as from a backup: counting on")
            ended, fenced = await self._run_fenced(spec, attempt, unreadable)
        if ended is None:
            await trio.sleep_forever()
            raise AssertionError
        return ended.outcome

    async def _run_fenced(
        self, spec: RunSpec, attempt: int, unreadable: str | None
    ) -> tuple[Ended | None, Fenced | None]:
        """The attempt's end, or why it had to stop; neither when the daemon stops."""
        ended, fenced = None, None
        with about(thread=spec.thread, run=spec.run, attempt=attempt):
            with self._registry.start(spec, attempt) as live:
                broken: Exception | None = None
                try:
                    ended = await self._run(live, unreadable)
                except* Fenced as group:
                    (fenced,) = (e for e in group.exceptions[:1] if isinstance(e, Fenced))
                    log.warning("%s", fenced)
                except* Exception as group:
                    broken = group
                if broken is not None:
                    ended = await self._end_broken(live, broken)
            if ended is not None:
                for tell in self._on_end:
                    tell(ended)
        return ended, fenced

    async def _run(self, live: Live, unreadable: str | None) -> Ended | None:
        """None when the daemon stops."""
        spec = live.spec
        runner = self._settings.runner(spec.runner)
        if runner is not None and isinstance(runner[0], CommandRunner) and runner[0].tty:
            live.show_in(self._open_window())
        writer = Writer(
            *(self._streams, spec.thread, spec.run, live.attempt, self._executor),
            tty=live.window is not None,
        )
        opened = False
        adopted = outcome = None
        async with trio.open_nursery() as nursery:
            with live.scope:
                await self._wait_turn(live)
                adopted = await writer.open()
                if adopted is None:
                    opened = True
                    nursery.start_soon(writer.pump)
                    if live.window is not None:
                        nursery.start_soon(live.window.watch)
                    outcome = await self._work(live, writer, runner, unreadable)
            if live.window is not None:
                live.window.close()
            writer.close()
        if adopted is not None:
            return Ended(spec, live.decide(adopted), written=False, stored=True)
        if outcome is None and not live.aborting:
            return None
        decided = live.decide(outcome or Outcome(Status.ABORTED))
        stored = opened and await self._write_end(live, writer, decided)
        log.info("run %s%s", decided.status, f": {decided.error}" if decided.error else "")
        return Ended(spec, decided, opened, stored)

    async def _wait_turn(self, live: Live) -> None:
        """Until nothing of its thread is before it. Cancels it when it is not to begin."""
        for other in self._registry.before(live):
            live.wait_behind(other.spec.run)
            await other.gone.wait()
        if not await self._order.clear(live):
            live.abort()
        live.wait_behind(None)

    async def _write_end(self, live: Live, writer: Writer, decided: Outcome) -> bool:
        """Whether the stream has it by now."""
        stored = True
        try:
            await writer.end(decided)
        except StreamUnfit as unfit:  # the row says how it ended, and the stream later on
            log.warning("its end is not stored yet: %s", unfit)
            self._streams.defer_end(writer, decided)
            stored = False
        live.end_written()
        return stored

    async def _work(
        self,
        live: Live,
        writer: Writer,
        runner: tuple[RunnerConfig, Runner] | None,
        unreadable: str | None,
    ) -> Outcome:
        spec, limit = live.spec, self._settings.queue.max_attempts
        if live.attempt > limit:
            return Outcome(
                Status.DEAD, error=f"its daemon died in each of {limit} attempts; not tried again"
            )
        if unreadable is not None:
            return Outcome(Status.FAILED, error=unreadable)
        if runner is None:
            return Outcome(
                Status.FAILED,
                error=f"runner {spec.runner!r} is no longer configured; add it, then retry",
            )
        log.info("run started")
        self._meters.dispatched(time.monotonic() - live.began)
        with live.working():
            try:
                history = await self._read_history(spec, runner[0])
                return await runner[1].run(spec, live.attempt, writer.append, history, live.window)
            except RunFailed as error:
                return Outcome(Status.FAILED, error.exit_code, one_line(str(error)))
            except (Fenced, trio.Cancelled):
                raise
            except Exception as error:
                # The daemon is about to end, and with it the keeper: leave it to replay.
                if self._is_ending(live):
                    await trio.sleep_forever()
                if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                    log.warning("%s", error)
                    text = "runctld has no file descriptors left; raise its limit, then retry"
                    return Outcome(Status.FAILED, error=text)
                log.exception("the runner failed by an internal error")
                return self._internal_error(error)

    async def _read_history(self, spec: RunSpec, config: RunnerConfig) -> list[Turn]:
        if not isinstance(config, ChatRunner):
            return []
        pairs = await self._durable.conversations.read_turns(
            spec.thread, spec.run, config.history // 2, config.history_bytes
        )
        return [Turn(prompt, reply) for prompt, reply in pairs]

    async def _end_broken(self, live: Live, error: Exception) -> Ended | None:
        """The attempt was ended by a fault of our own: nobody must wait for it on."""
        if self._is_ending(live):
            return None
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        spec, stored = live.spec, True
        log.error("the attempt was ended by an internal error", exc_info=error)
        decided = live.decide(self._internal_error(error))
        try:
            await self._streams.end(spec.thread, spec.run, live.attempt, decided)
        except Fenced as fenced:
            log.warning("%s", fenced)
            return None
        except StreamUnfit as unfit:
            log.warning("its end is not stored: %s", unfit)
            stored = False
        return Ended(spec, decided, True, stored)

    def _is_ending(self, live: Live) -> bool:
        return self._keeper.dead.is_set() or live.stopping

    def _internal_error(self, error: Exception) -> Outcome:
        words = self._hide(f"{type(error).__name__}: {error}")
        return Outcome(Status.FAILED, error=one_line(f"internal error: {words}"))
