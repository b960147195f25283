"""A real pseudo-terminal, read by a terminal emulator."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
import warnings
from typing import Any

import pyte
from conftest import DEADLINE, Box, wait_until


def _own_terminal() -> None:
    """A session of its own on the terminal that is stdin: Ctrl-C and SIGWINCH arrive."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """``runctl`` on a pseudo-terminal; ``text()`` is what its screen shows.

    ``hold``: keep the terminal open behind its program, so that ``attributes()`` can be
    compared; then ``wait`` closes it. ``script``: of a shell with job control, for which
    the command is "$@"."""

    def __init__(
        self,
        box: Box,
        *args: str,
        columns: int = 80,
        rows: int = 24,
        env: dict[str, str] | None = None,
        hold: bool = False,
        script: str | None = None,
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.raw = b""
        self._stream = pyte.ByteStream(self.screen)
        self._lock = threading.Lock()
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._master = master
        self._slave = slave if hold else None
        self.before = termios.tcgetattr(slave)
        with warnings.catch_warnings():
            # Of Python 3.12 and newer, since there are threads: two system calls are safe.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process = box.popen(
                *args,
                through=() if script is None else ("sh", "-mc", script, "sh"),
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **(env or {})},
                preexec_fn=_own_terminal,
            )
        if not hold:
            os.close(slave)
        self._reader = threading.Thread(target=self._read, args=(master,), daemon=True)
        self._reader.start()

    def _read(self, master: int) -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the other side is closed
                break
            if not data:
                break
            with self._lock:
                self.raw += data
                self._stream.feed(data)
        with self._lock:  # nobody writes to whatever has that number next
            self._master = -1
            os.close(master)

    def text(self) -> str:
        with self._lock:
            return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def send(self, keys: str) -> None:
        with self._lock:
            os.write(self._master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        with self._lock:
            self.screen.resize(lines, columns)
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def attributes(self) -> list[Any]:
        """The terminal's modes, as in ``before``."""
        assert self._slave is not None
        return termios.tcgetattr(self._slave)

    def until(self, text: str) -> None:
        wait_until(lambda: text in self.text(), f"{text!r} on the screen")

    def wait(self) -> int:
        code = self.process.wait(DEADLINE)
        if self._slave is not None:
            os.close(self._slave)
            self._slave = None
        self._reader.join(DEADLINE)
        return code
