"""A gateway, started again whenever it ends, at the same port."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from pgserver import free_port

from .parts import PAUSE, strike


class GatewayProcess:
    """``config``: of a client. ``exits``: the codes that gateways ended with."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        log.touch()
        self.port = free_port()
        self.exits: list[int] = []
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def signal(self, number: int) -> bool:
        return strike(self.pid, number)

    async def _run(self) -> None:
        try:
            while True:
                with self.log.open("ab") as log:
                    self._process = await asyncio.create_subprocess_exec(
                        *(sys.executable, "-m", "runctl.gateway.main"),
                        *("--config", str(self._config), "--listen", f"127.0.0.1:{self.port}"),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                self.exits.append(await self._process.wait())
                await asyncio.sleep(PAUSE)
        finally:
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
