"""A daemon of our own, in a folder of its own, that can lose its machine."""

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

from ...client.api import Client
from ...client.patience import Patience
from ...config.load import load
from ...config.schema import Config
from ...protocol.errors import RequestError, Unavailable
from .folder_processes import kill_processes

#: The variable that names the directory that a performance is given.
DIRECTORY = "RUNCTL_REHEARSAL"
#: For a daemon to be ready, and to end, seconds.
PATIENCE = 60.0


class RehearsalFailed(Exception):
    """It cannot be performed; the text is one line that says why."""


class PrivateDaemon:
    """Everything of it is in ``folder``; performances work in ``work``. ``runner``: the
    table of the one that is rehearsed; None for a command that is given."""

    def __init__(self, folder: Path, runner: Mapping[str, Any] | None) -> None:
        self.work = folder / "work"
        self.state = folder / "state"
        self._folder = folder
        self._log = folder / "runctld.log"
        self._process: subprocess.Popen[bytes] | None = None
        given = str(self.work / "{thread}")
        table: dict[str, Any] = dict(runner or {"kind": "command"})
        if table.get("kind", "command") != "chat":
            table["env"] = {**table.get("env", {}), DIRECTORY: given}
            table.setdefault("cwd", given)
        file = folder / "runctld.toml"
        file.write_text(
            f"state_dir = {_format(str(self.state))}\n"
            'executor_id = "rehearsal"\n'
            "[queue]\n"
            'outlive = "0s"\n'
            "[runners.rehearsed]\n"
            + "".join(f"{key} = {_format(value)}\n" for key, value in table.items())
        )
        self._file = file
        self._env = {**os.environ, "RUNCTL_CONFIG": str(file)}

    def load(self) -> Config:
        """Its configuration. Raises ConfigError."""
        return load(self._file, client=True)

    def make_client(self, config: Config) -> Client:
        return Client(config, Patience(config, PATIENCE))

    async def start(self, client: Client) -> None:
        """Until it answers. Raises RehearsalFailed."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runctl.supervisor.main", "--config", str(self._file)],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours alone
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            if (code := self._process.poll()) is not None:
                raise RehearsalFailed(f"the private daemon ended with {code}: {self._last_words()}")
            try:
                await client.reach()
                await client.list(limit=1)
                return
            except (Unavailable, RequestError) as error:
                if time.monotonic() > deadline:
                    raise RehearsalFailed(f"the private daemon does not answer: {error}") from None
                await asyncio.sleep(0.05)

    def lose_machine(self) -> None:
        """All that runs of it dies at once, its commands too."""
        kill_processes(self._folder, 0.0, environments=True)
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """In order, if it can; nothing of it runs any more when this returns."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        kill_processes(self._folder, 1.0, environments=True)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"


def _format(value: Any) -> str:
    """As TOML has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(key)} = {_format(x)}" for key, x in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format, value))}]"
    return str(value)
