"""The agent's process: started, spoken to in lines of JSON, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from .output import STDERR, Output
from .stops import Trouble

#: Of a message, bytes.
LONGEST_LINE = 64 * 1024 * 1024
#: Lines that are no messages, before the first that is one: then it does not speak ACP.
MOST_NOISE = 50
#: Some agents do not end when their stdin does: so long they may take for it, and then for TERM,
#: seconds.
CLOSING, TERMINATING = 1.0, 2.0


class Agent:
    """A transport for the library's ``Connection``: ``send``, ``receive`` and ``close``."""

    def __init__(self, name: str, process: Process, output: Output) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.name = name
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._output = output
        self._noise = 0
        self._speaks = False
        #: What it wrote first that was no message; why it is read no more.
        self._first_noise = ""
        self._broken: str | None = None

    @classmethod
    async def start(cls, argv: Sequence[str], output: Output) -> Agent:
        """In a process group of its own. Its stderr is ours. Raises Trouble."""
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=PIPE, stdout=PIPE, process_group=0, limit=LONGEST_LINE
            )
        except FileNotFoundError:
            raise Trouble(f"command not found: {argv[0]}", 127) from None
        except OSError as error:
            raise Trouble(f"{argv[0]} cannot be started: {error.strerror}", 126) from None
        return cls(PurePath(argv[0]).name, process, output)

    async def send(self, message: dict[str, Any]) -> None:
        """Raises OSError, when it has gone."""
        self._stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        await self._stdin.drain()

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end of them. It is not read while our own output waits."""
        while self._broken is None:
            await self._output.wait_for_room()
            try:
                line = await self._stdout.readline()
            except ValueError:
                self._broken = f"has written a line of more than {LONGEST_LINE >> 20} MiB"
                break
            if not line:
                break
            message = read_message(line)
            if message is not None:
                self._speaks = True
                return message
            self._note_noise(line)
        return None

    async def close(self) -> None:
        """Of the connection: the process is ended by ``end``."""

    def _note_noise(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\n")
        self._first_noise = self._first_noise or text.strip()
        self._output.write(STDERR, text[:2000] + "\n")
        self._noise += bool(text.strip())
        if self._noise > MOST_NOISE and not self._speaks:
            self._broken = "does not speak ACP"

    async def explain(self) -> str:
        """Why it is of no more use, once ``receive`` has said so, in words that follow its name."""
        if self._broken is not None:
            said = self._broken
        else:
            try:
                status = await asyncio.wait_for(self._process.wait(), CLOSING)
            except TimeoutError:
                said = "has closed its stdout"
            else:
                how = f"exit code {status}" if status >= 0 else _name_signal(-status)
                said = f"has ended by itself ({how})"
        if not self._speaks:
            said += "; it has sent no message of ACP"
            if self._first_noise:
                said += f", but wrote {self._first_noise[:120]!r}"
            said += ": does argv have the option that makes it an ACP agent?"
        return said

    async def end(self, patience: float = CLOSING) -> None:
        """Close its stdin, and end it when that does not. Returns when its process is gone."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, TERMINATING)):
            try:
                await asyncio.wait_for(self._process.wait(), seconds)
                return
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, number)
        await self._process.wait()


def read_message(line: bytes) -> dict[str, Any] | None:
    """A message of JSON-RPC; None for what is none, or would confuse the library."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("id"), int | str | None):
        return None
    if "method" in found:
        return found if isinstance(found["method"], str) else None
    fits = "id" in found and isinstance(found.get("error", {}), dict | None)
    return found if fits and ("result" in found or "error" in found) else None


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
