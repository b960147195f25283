"""The ``command`` runner: a process without a shell, its output as it comes."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Sequence

import trio

from ...config.schema import CommandRunner
from ..errors import RunFailed
from ..model import Outcome, RunSpec, Status
from ..processes import Keeper
from ..wire import StreamName
from .protocol import Emit, Turn

READ_SIZE = 64 * 1024
#: What the daemon got from its own supervisor is not the command's business.
_PRIVATE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY")


class Command:
    """Runs one process tree per run. ``grace``: seconds between TERM and KILL."""

    def __init__(self, config: CommandRunner, keeper: Keeper, grace: float) -> None:
        self._config = config
        self._keeper = keeper
        self._grace = grace

    async def run(
        self, spec: RunSpec, attempt: int, emit: Emit, history: Sequence[Turn]
    ) -> Outcome:
        """Ends with the process's exit code; the whole tree is gone on every way out."""
        argv, stdin_text = self._argv(spec)
        env = {k: v for k, v in os.environ.items() if k not in _PRIVATE}
        env.update(self._config.env)
        env.update(RUNCTL_THREAD=spec.thread, RUNCTL_ATTEMPT=str(attempt))
        cwd = str(self._config.cwd) if self._config.cwd else spec.cwd
        out_r, out_w = os.pipe()
        err_r, err_w = os.pipe()
        in_r, in_w = os.pipe() if stdin_text is not None else (os.open(os.devnull, os.O_RDONLY), -1)
        async with trio.lowlevel.FdStream(out_r) as out, trio.lowlevel.FdStream(err_r) as err:
            try:
                # Shielded: a cancelled spawn would leave a process that nobody knows.
                with trio.CancelScope(shield=True):
                    process = await self._keeper.spawn(
                        argv,
                        mark=spec.run,
                        env=env,
                        cwd=cwd,
                        stdin=in_r,
                        stdout=out_w,
                        stderr=err_w,
                    )
            except BaseException:
                if in_w >= 0:
                    os.close(in_w)
                raise
            finally:
                for fd in (in_r, out_w, err_w):
                    os.close(fd)
            scopes = (trio.CancelScope(shield=True), trio.CancelScope(shield=True))
            feed = trio.CancelScope()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_forward, out, "stdout", emit, scopes[0])
                nursery.start_soon(_forward, err, "stderr", emit, scopes[1])
                if in_w >= 0:
                    nursery.start_soon(_feed, in_w, stdin_text or b"", feed)
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
                    if trio.current_effective_deadline() == -math.inf:
                        for scope in scopes:
                            scope.deadline = trio.current_time() + 1
        return _outcome(argv[0], status)

    def _argv(self, spec: RunSpec) -> tuple[list[str], bytes | None]:
        """(argv, stdin): the prompt goes where "{prompt}" stands, else to stdin."""
        argv = [*self._config.argv, *spec.argv]
        if not argv:
            raise RunFailed("no command was given; submit one: runctl submit THREAD -- ARGV")
        if spec.prompt is None:
            return argv, None
        if any("{prompt}" in part for part in self._config.argv):
            return [part.replace("{prompt}", spec.prompt) for part in argv], None
        return argv, spec.prompt.encode()


async def _feed(fd: int, data: bytes, scope: trio.CancelScope) -> None:
    with scope:
        async with trio.lowlevel.FdStream(fd) as pipe:
            # Broken: the command did not want to read it.
            with contextlib.suppress(trio.BrokenResourceError):
                await pipe.send_all(data)


async def _forward(
    pipe: trio.lowlevel.FdStream, name: StreamName, emit: Emit, scope: trio.CancelScope
) -> None:
    with scope:
        await _forward_all(pipe, name, emit)


async def _forward_all(pipe: trio.lowlevel.FdStream, name: StreamName, emit: Emit) -> None:
    """Each read is a chunk; a UTF-8 character that a read cut waits for its rest."""
    held = b""
    while data := await pipe.receive_some(READ_SIZE):
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
