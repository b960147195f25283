"""A command's own terminal: a pseudo-terminal whose master end we read."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Mapping

from ....protocol.errors import RunFailed
from ....protocol.records import StreamName
from ...processes.terminal_size import Size
from .flow import Source, count_readable

TERM = "xterm-256color"


class Terminal:
    """``slave`` is for the command. We hold it, too, until the command has ended: otherwise a
    program that closes it and opens /dev/tty later would have ended its output. What the
    command leaves behind has no /dev/tty any more.

    Raises: RunFailed, when there is none left."""

    def __init__(self, size: Size) -> None:
        try:
            self.master, self.slave = os.openpty()
        except OSError as error:
            raise RunFailed(
                f"no terminal for the command: {error.strerror}; raise kernel.pty.max or the"
                " limit of open files, or run less",
                126,
            ) from None
        try:
            os.set_blocking(self.master, False)
            _quieten(self.slave)
            self.resize(size)
        except BaseException:
            self.close()
            raise

    @classmethod
    def take(cls, master: int, slave: int) -> Terminal:
        """One that was made by another daemon; ours from here on. ``slave``: -1 when its command
        has ended."""
        terminal = cls.__new__(cls)
        terminal.master, terminal.slave = master, slave
        return terminal

    def resize(self, size: Size) -> None:
        """The foreground process group gets SIGWINCH from the kernel, if it changed."""
        fcntl.ioctl(
            self.master, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0)
        )

    def source(self) -> Source:
        """Its output: stdout and stderr in one. It ends when nobody has ``slave``."""
        return TerminalSource(self.master)

    def release(self) -> None:
        """The command has ended: only what it left behind has ``slave`` now."""
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def close(self) -> None:
        self.release()
        os.close(self.master)


class TerminalSource:
    """Of ``fd``, a terminal's master end."""

    name: StreamName = "stdout"
    waits = False

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.held = b""

    @property
    def backlog(self) -> int:
        return count_readable(self.fd)

    def read(self, most: int) -> bytes | None:
        """The kernel hands out 4 KiB at most: take several, for fewer chunks."""
        parts: list[bytes] = []
        while most > 0:
            try:
                data = os.read(self.fd, most)
            except BlockingIOError:
                return b"".join(parts) or None
            except OSError:  # EIO on Linux: nobody has the other end any more
                break
            if not data:  # the same elsewhere
                break
            parts.append(data)
            most -= len(data)
        return b"".join(parts)


def _quieten(slave: int) -> None:
    """ONLCR off: stored lines end in "\\n", as with pipes, so that greps and files stay
    clean; the watcher's own terminal adds the carriage return. ECHO off: nobody types,
    and nothing that might come this way belongs in the output."""
    modes = termios.tcgetattr(slave)
    modes[1] &= ~termios.ONLCR
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, modes)


def terminal_environment(env: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """``env``, the daemon's, as fits our terminal; ``own``, the runner's, comes on top."""
    found = {k: v for k, v in env.items() if k not in ("COLUMNS", "LINES")}
    if found.get("TERM") in (None, "", "dumb"):
        found["TERM"] = TERM  # watchers' terminals know it
    return {**found, **own}
