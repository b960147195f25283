"""A daemon with one agent, all of it in one folder, that can be killed alone or lose its
machine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runctl.client.api import Client
from runctl.client.patience import Patience
from runctl.config.load import load
from runctl.protocol.errors import RequestError, Unavailable

from .folder_processes import find_processes, kill_processes

#: For a daemon to be ready, or to end in order, and for its processes to be gone then, seconds.
PATIENCE = 120.0
GONE_WITHIN = 10.0
#: What is passed on of our own environment: an agent must not find a key in it.
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")


class Stage:
    """``runner``: the table of the runner "agent". ``outlive``: as in the configuration."""

    def __init__(self, folder: Path, runner: Mapping[str, Any], home: Path, outlive: str) -> None:
        self._folder = folder
        self._file = folder / "runctld.toml"
        self._file.write_text(
            f"state_dir = {format_value(str(folder / 'state'))}\n"
            'start_timeout = "120s"\n'
            f"[queue]\noutlive = {format_value(outlive)}\n[runners.agent]\n"
            + "".join(f"{key} = {format_value(value)}\n" for key, value in runner.items())
        )
        self._env = {x: os.environ[x] for x in KEPT if x in os.environ}
        self._env |= {"HOME": str(home), "RUNCTL_CONFIG": str(self._file)}
        self._process: subprocess.Popen[bytes] | None = None
        config = load(self._file, client=True)
        self.client = Client(config, Patience(config, PATIENCE))

    async def start(self) -> None:
        """Until it answers. Raises RuntimeError."""
        with (self._folder / "runctld.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runctl.supervisor.main", "--config", str(self._file)],
                env=self._env,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours alone
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"the daemon ended with {code}")
            try:
                await self.client.reach()
                await self.client.list(limit=1)
                return
            except (Unavailable, RequestError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    def kill_daemon(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def lose_machine(self) -> None:
        """All that runs of it dies at once: daemon, keeper, nats-server, the agent's tree."""
        kill_processes(self._folder, 0.0, environments=True)
        if self._process is not None:
            self._process.wait()

    async def close(self) -> dict[int, str]:
        """Stop it in order. The processes that were left behind then: pid to command line."""
        await self.client.__aexit__()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return await asyncio.to_thread(kill_processes, self._folder, GONE_WITHIN, environments=True)

    def find_processes(self) -> dict[int, str]:
        return find_processes(self._folder, environments=True)


def format_value(value: Any) -> str:
    """As TOML has it."""
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{json.dumps(k)} = {format_value(x)}" for k, x in value.items())
        return f"{{ {pairs} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
