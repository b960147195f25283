"""Where a command runs: its directory and environment, and what it has beside it."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import AbstractContextManager, ExitStack, nullcontext

import trio

from ....config.schema import CommandRunner
from ....protocol.errors import RunFailed
from ....protocol.model import RunSpec
from ...host.private_files import env_of
from ...processes.credentials import acting_as
from ...processes.keeper_client import Keeper
from .agent_session import fill_name
from .protocol import Resumption
from .run_files import CHECKPOINT, OUTPUT, SOCKET, RunFiles
from .terminal import terminal_environment

log = logging.getLogger("runctld.command")


class Workplace:
    """Of all runs of one runner. ``files``: None where they have nothing beside them."""

    def __init__(self, config: CommandRunner, keeper: Keeper, files: RunFiles | None) -> None:
        self._config = config
        self._keeper = keeper
        self._files = files

    async def prepare(
        self,
        stack: ExitStack,
        spec: RunSpec,
        attempt: int,
        session: str,
        resumption: Resumption | None,
    ) -> tuple[dict[str, str], str | None, socket.socket | None]:
        """Its environment, its directory, and the socket where it may ask us things. Raises
        RunFailed, OSError."""
        env, listener = self._make_environment(spec, attempt, session), self.listen(stack, spec.run)
        if self._files is not None:
            if listener is not None:
                path = self._files.path(spec.run, SOCKET, self._config.account)
                env["RUNCTL_SOCKET"] = os.fspath(path)
            if resumption is not None:
                env |= await self._write_files(self._files, spec.run, resumption)
        return env, await self._find_directory(spec, session), listener

    def listen(self, stack: ExitStack, run: str) -> socket.socket | None:
        """``stack`` closes it."""
        if self._files is None:
            return None
        listener = self._files.listen(run, self._config.account)
        return None if listener is None else stack.enter_context(listener)

    def forget(self, run: str) -> None:
        """It is over, and so is the use of what it had beside it."""
        if self._files is not None:
            self._files.remove(run, self._config.account)

    async def _find_directory(self, spec: RunSpec, session: str) -> str | None:
        """None for its user's home. A submitter's directory is not entered unless the runner says
        so: many programs look there for settings, and for parts of themselves."""
        if self._config.cwd == "submitter":
            return spec.cwd
        if self._config.cwd is None:
            return None
        named = str(self._config.cwd)
        path = fill_name(named, spec, session)
        if path != named:  # each has one of its own
            try:
                await trio.to_thread.run_sync(self._make_directory, path, abandon_on_cancel=True)
            except OSError as error:
                raise RunFailed(f"cwd {path} cannot be made: {error.strerror}", 126) from None
        return path

    def _make_directory(self, path: str) -> None:
        with self.as_its_user():
            os.makedirs(path, 0o700, exist_ok=True)

    def _make_environment(self, spec: RunSpec, attempt: int, session: str) -> dict[str, str]:
        env = dict(self._keeper.inherited.env)
        if self._config.account is not None:
            env = env_of(self._config.account, env)
        ours = {k: fill_name(v, spec, session) for k, v in self._config.env.items()}
        if self._config.tty:
            env = terminal_environment(env, ours)
        else:
            env.update(ours)
        env.update(RUNCTL_THREAD=spec.thread, RUNCTL_ATTEMPT=str(attempt))
        env.pop("RUNCTL_SESSION", None)  # of a run that has started this daemon
        if session:
            env["RUNCTL_SESSION"] = session
        return env

    async def _write_files(
        self, files: RunFiles, run: str, resumption: Resumption
    ) -> dict[str, str]:
        """What an attempt that continues finds of the one before: variables that say so. Raises
        RunFailed."""
        account, env = self._config.account, {"RUNCTL_RESUME": "1"}
        path = files.path(run, CHECKPOINT, account)
        try:
            if resumption.checkpoint is not None:
                with files.create(run, CHECKPOINT, account) as checkpoint:
                    checkpoint.write(resumption.checkpoint)
                env["RUNCTL_CHECKPOINT_FILE"] = os.fspath(path)
            path = files.path(run, OUTPUT, account)
            with files.create(run, OUTPUT, account) as output:
                async for chunks in resumption.read_output():
                    piece = b"".join(chunk.data for chunk in chunks)
                    await trio.to_thread.run_sync(output.write, piece)
            env["RUNCTL_PREVIOUS_OUTPUT"] = os.fspath(path)
        except OSError as error:
            # An agent with a session can do without; what goes on from a checkpoint cannot.
            if resumption.checkpoint is not None:
                raise RunFailed(
                    f"{path}, from which it continues, cannot be written: {error.strerror};"
                    " mend that, then retry"
                ) from None
            log.warning("there is no RUNCTL_PREVIOUS_OUTPUT: %s: %s", path, error.strerror)
        return env

    def as_its_user(self) -> AbstractContextManager[None]:
        account = self._config.account
        return nullcontext() if account is None else acting_as(account.uid, account.gid)
