"""The HTTP gateway beside the daemon: a child of the keeper, so that it goes on while daemons are
replaced under what runs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import time
from typing import Any

import msgspec
import trio

from ...config.schema import Config
from ...protocol import __version__
from ...protocol.errors import RunFailed
from ..host.private_files import inherited
from ..processes.keeper_client import Keeper
from ..processes.keeper_link import KeeperLost
from ..processes.keeper_visit import About
from ..processes.process import Process

log = logging.getLogger("runctld.gateway")

KIND = "gateway"
LOG_FILE = "gateway.log"
#: Where the configuration may have files that systemd gave us.
CREDENTIALS = "CREDENTIALS_DIRECTORY"
#: For those who watch to be told that it stops, seconds.
GRACE = 2.0
#: Seconds before one that ended is started again, doubled each time, at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
#: Of its log, bytes: the end is looked at when it has ended.
LAST_WORDS = 4096


class GatewayProcess:
    """Where ``config`` has one listen. ``adopt`` comes before runs are looked for."""

    def __init__(self, config: Config, keeper: Keeper) -> None:
        self._config = config
        self._keeper = keeper
        self._process: Process | None = None
        self._about = About(KIND, command=_describe_settings(config))

    async def adopt(self) -> None:
        """Go on with the one that an earlier daemon has started, if it is as we would. Raises
        KeeperLost."""
        for tree in list(self._keeper.found.values()):
            if tree.about is None or tree.about.kind != KIND:
                continue
            if tree.status is not None or tree.about != self._about or self._process is not None:
                await self._keeper.end_found(tree, GRACE)
            else:
                self._process = self._keeper.claim_found(tree)

    async def supervise(self) -> None:
        """Start it, and again whenever it ends, until cancelled."""
        pause = FIRST_PAUSE
        try:
            while True:
                began = time.monotonic()
                try:
                    status = await self._run()
                except (RunFailed, OSError) as error:  # no disk, no descriptors
                    said = str(error)
                else:
                    said = f"{_read_last_words(self._log_path)} ({status})"
                if time.monotonic() - began > 10:
                    pause = FIRST_PAUSE
                log.error("the gateway ended: %s; starting it again", said)
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            if self._process is not None and not self._keeper.broken_off:
                with trio.CancelScope(shield=True), contextlib.suppress(KeeperLost):
                    await self._process.end(GRACE)

    async def _run(self) -> int:
        """Until it ends; how it did. Raises RunFailed, OSError, KeeperLost."""
        if self._process is None:
            self._process = await self._spawn()
            log.info("gateway at http://%s/v1", self._config.gateway.listen)
        status = await self._process.wait()
        await self._process.forget()
        self._process = None
        return status

    @property
    def _log_path(self) -> str:
        return os.path.join(self._config.state_dir, LOG_FILE)

    async def _spawn(self) -> Process:
        source = self._config.source
        env = {**inherited((), source=source).env, "RUNCTL_STATE": str(self._config.state_dir)}
        if (folder := os.environ.get(CREDENTIALS)) is not None:
            env[CREDENTIALS] = folder
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        log_fd = os.open(self._log_path, flags, 0o600)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return await self._keeper.spawn(
                [sys.executable, "-P", "-m", "runctl.gateway.main", "--config", str(source)],
                mark="gateway",
                env=env,
                cwd=str(self._config.state_dir),
                stdin=null,
                stdout=log_fd,
                stderr=log_fd,
                tell=self._about,
            )
        finally:
            os.close(log_fd)
            os.close(null)


def _describe_settings(config: Config) -> str:
    """Of two gateways whose settings and program are alike the same words, which tell no secret."""
    parts: list[Any] = [config.gateway, config.nats, config.state_dir, config.source, config.log]
    data = msgspec.json.encode(parts, enc_hook=str)
    return f"{__version__} {hashlib.sha256(data).hexdigest()}"


def _read_last_words(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS))
            lines = file.read(LAST_WORDS).decode(errors="replace").splitlines()
    except OSError:
        return "nothing is known of why"
    return lines[-1] if lines else "it said nothing"
