"""The ``command`` runner: a process without a shell, its output as it comes."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from ...config.prompts import PROMPT, refusal, takes_prompt
from ...config.schema import CommandRunner
from ..errors import RunFailed, shortened
from ..model import Outcome, RunSpec, Status, one_line
from ..processes import Keeper
from ..windows import DEFAULT, Window
from ..wire import StreamName
from .protocol import Emit, Turn
from .terminal import Terminal, terminal_environment

READ_SIZE = 64 * 1024


Receive = Callable[[int], Awaitable[bytes | bytearray]]


@dataclass(frozen=True, slots=True)
class _Ends:
    """``given``: the command's three descriptors; ``ours_no_more``: those to close once it
    has them; ``feed``: where its stdin is written, or -1."""

    given: tuple[int, int, int]
    ours_no_more: tuple[int, ...]
    feed: int
    sources: list[tuple[StreamName, Receive]]
    terminal: Terminal | None = None


class Command:
    """Runs one process tree per run. ``grace``: seconds between TERM and KILL."""

    def __init__(self, config: CommandRunner, keeper: Keeper, grace: float) -> None:
        self._config = config
        self._keeper = keeper
        self._grace = grace

    async def run(
        self,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        history: Sequence[Turn],
        window: Window | None = None,
    ) -> Outcome:
        """Ends with the process's exit code; the whole tree is gone on every way out."""
        argv, prompt = self._argv(spec)
        async with AsyncExitStack() as stack:
            ends = await self._open(stack, prompt is not None, window)
            try:
                process = await self._keeper.spawn(
                    argv,
                    mark=spec.run,
                    env=self._environment(spec, attempt),
                    cwd=str(self._config.cwd) if self._config.cwd else spec.cwd,
                    stdin=ends.given[0],
                    stdout=ends.given[1],
                    stderr=ends.given[2],
                    tty=ends.terminal is not None,
                    umask=self._keeper.inherited.umask,
                    group=f"{spec.run}.{attempt}",
                )
            except BaseException:
                if ends.feed >= 0:
                    os.close(ends.feed)
                raise
            finally:
                for fd in ends.ours_no_more:
                    os.close(fd)
            scopes = []
            feed = trio.CancelScope()
            async with trio.open_nursery() as nursery:
                for name, receive in ends.sources:
                    scope = trio.CancelScope(shield=True)
                    scopes.append(scope)
                    nursery.start_soon(_forward, receive, name, emit, scope)
                if ends.feed >= 0:
                    nursery.start_soon(_feed, ends.feed, prompt or b"", feed)
                try:
                    status = await process.wait()
                    feed.cancel()
                    # Children left behind would hold the pipes open, and outlive the run.
                    await process.end(self._grace)
                finally:
                    # The readers outlive a cancellation, so that what the tree says while
                    # it is stopped is kept; after it is gone a second is plenty.
                    with trio.CancelScope(shield=True):
                        await process.end(self._grace)
                    if ends.terminal is not None:
                        ends.terminal.finish()
                    if trio.current_effective_deadline() == -math.inf:
                        for scope in scopes:
                            scope.deadline = trio.current_time() + 1
        return _outcome(argv[0], status)

    async def _open(self, stack: AsyncExitStack, feed: bool, window: Window | None) -> _Ends:
        """What the command reads and writes. What ``stack`` does not close is the caller's."""
        if not self._config.tty:
            out_r, out_w = os.pipe()
            err_r, err_w = os.pipe()
            in_r, in_w = os.pipe() if feed else (os.open(os.devnull, os.O_RDONLY), -1)
            out = await stack.enter_async_context(trio.lowlevel.FdStream(out_r))
            err = await stack.enter_async_context(trio.lowlevel.FdStream(err_r))
            given = (in_r, out_w, err_w)
            return _Ends(
                given, given, in_w, [("stdout", out.receive_some), ("stderr", err.receive_some)]
            )
        terminal = Terminal(window.size if window else DEFAULT)
        stack.callback(terminal.close)
        if window is not None:
            window.apply = terminal.resize
            stack.callback(window.close)
        slave = terminal.slave
        # A prompt needs an end, which a terminal that nobody types at cannot give.
        in_r, in_w = os.pipe() if feed else (slave, -1)
        return _Ends(
            (in_r, slave, slave),
            (in_r,) if feed else (),
            in_w,
            [("stdout", terminal.receive_some)],
            terminal,
        )

    def _environment(self, spec: RunSpec, attempt: int) -> dict[str, str]:
        env = dict(self._keeper.inherited.env)
        if self._config.tty:
            env = terminal_environment(env, self._config.env)
        else:
            env.update(self._config.env)
        env.update(RUNCTL_THREAD=spec.thread, RUNCTL_ATTEMPT=str(attempt))
        return env

    def _argv(self, spec: RunSpec) -> tuple[list[str], bytes | None]:
        """(argv, stdin): the prompt goes where "{prompt}" stands in the runner's argv, else to
        stdin. What is refused at submit time is refused here too: the run may have been queued
        under another configuration. Raises RunFailed."""
        ours = list(self._config.argv)
        if (reason := refusal(self._config, spec.prompt, spec.argv)) is not None:
            raise RunFailed(reason)
        if spec.prompt is not None and takes_prompt(ours):
            ours = [part.replace(PROMPT, spec.prompt) for part in ours]
            return [*ours, *spec.argv], None
        return [*ours, *spec.argv], None if spec.prompt is None else spec.prompt.encode()


async def _feed(fd: int, data: bytes, scope: trio.CancelScope) -> None:
    with scope:
        async with trio.lowlevel.FdStream(fd) as pipe:
            # Broken: the command did not want to read it.
            with contextlib.suppress(trio.BrokenResourceError):
                await pipe.send_all(data)


async def _forward(receive: Receive, name: StreamName, emit: Emit, scope: trio.CancelScope) -> None:
    with scope:
        await _forward_all(receive, name, emit)


async def _forward_all(receive: Receive, name: StreamName, emit: Emit) -> None:
    """Each read is a chunk; a UTF-8 character that a read cut waits for its rest."""
    held = b""
    while data := await receive(READ_SIZE):
        data = held + data
        cut = _incomplete_tail(data)
        held = data[len(data) - cut :] if cut else b""
        if data := data[: len(data) - cut]:
            await emit(name, data)
    if held:
        await emit(name, held)


def _incomplete_tail(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character whose rest is missing (0 to 3)."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        need = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return back if need > back and byte < 0xF8 else 0
    return 0


def _outcome(command: str, status: int) -> Outcome:
    name = one_line(shortened(command, 200))
    if status == 0:
        return Outcome(Status.SUCCEEDED, exit_code=0)
    if status > 0:
        return Outcome(Status.FAILED, status, f"{name} exited with code {status}")
    try:
        what = signal.Signals(-status).name
    except ValueError:
        what = f"signal {-status}"
    return Outcome(Status.FAILED, 128 - status, f"{name} was ended by {what}")
