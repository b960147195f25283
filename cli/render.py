"""Printing: JSON, plain tables, and a run's output as it was written.

Tables are formatted here: importing rich takes longer than all the rest of ``list``.
"""

from __future__ import annotations

import base64
import os
import select
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from . import watch
from .common import ReaderGone

STDOUT = 1
STDERR = 2
_encode = msgspec.json.Encoder().encode


def write_all(fd: int, data: bytes) -> None:
    """Write without a buffer of our own: nothing may be left to flush at exit, where a
    reader that went away or stopped reading would hold us. Raises ReaderGone, OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # the terminal was left non-blocking by another program
            select.select([], [fd], [])
        except BrokenPipeError:
            raise ReaderGone from None


def say(text: str) -> None:
    """One line to the operator, on stderr."""
    write_all(STDERR, f"{printable(text)}\n".encode(errors="replace"))


def note(text: str) -> None:
    say(f"runctl: {text}")


def out(text: str) -> None:
    """One line of the answer, on stdout."""
    write_all(STDOUT, f"{text}\n".encode(errors="replace"))


def out_json(value: Any) -> None:
    write_all(STDOUT, _encode(value) + b"\n")


def out_json_pretty(value: Any) -> None:
    write_all(STDOUT, msgspec.json.format(_encode(value), indent=2) + b"\n")


def printable(text: str) -> str:
    """``text`` without anything that could steer a terminal, on one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut(text: str, columns: int) -> str:
    """``text`` in at most ``columns`` terminal columns."""
    if _width(text) <= columns:
        return text
    kept = ""
    room = columns - 1
    for character in text:
        room -= _width(character)
        if room < 0:
            break
        kept += character
    return kept + "…" if columns > 0 else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns on stdout."""
    cells = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = (c + " " * (w - _width(c)) for c, w in zip(row, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    out("\n".join(lines))


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """``key: value`` lines, values aligned."""
    shown = [(key, printable(value)) for key, value in pairs]
    width = max(len(key) for key, _ in shown) + 1
    out("\n".join(f"{key + ':':<{width}} {value}" for key, value in shown))


def seconds(value: float) -> str:
    """A length of time in at most two units."""
    value = max(0.0, value)
    if value < 10:
        return f"{value:.1f}s"
    total = int(value)
    for unit, size, below, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if total >= size:
            return f"{total // size}{unit}{total % size // small}{below}"
    return f"{total // 60}m{total % 60}s" if total >= 60 else f"{total}s"


def since(time: str | None, until: str | None = None) -> str:
    """From an RFC 3339 time to another, or to now; "-" when there is none."""
    if time is None:
        return "-"
    try:
        end = datetime.fromisoformat(until) if until else datetime.now(UTC)
        return seconds((end - datetime.fromisoformat(time)).total_seconds())
    except (ValueError, TypeError):
        return "-"


def size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def short(text: str, most: int = 60) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= most else line[: most - 1] + "…"


class Output:
    """What ``attach`` prints; call ``flush`` after each batch of events."""

    def show(self, event: watch.Event) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def discard(self) -> None:
        """Forget what was not written yet."""
        raise NotImplementedError

    def remark(self, text: str) -> None:
        """A line of ours, on stderr."""
        say(text)


class JsonOutput(Output):
    """One object a line, as the contract has them."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def show(self, event: watch.Event) -> None:
        value: dict[str, Any]
        if isinstance(event, watch.Chunk):
            value = {
                "type": "chunk",
                "run": event.run,
                "attempt": event.attempt,
                "seq": event.seq,
                "stream": event.stream,
            }
            try:
                value["data"] = event.data.decode()
            except UnicodeDecodeError:
                value["data"] = base64.b64encode(event.data).decode()
                value["encoding"] = "base64"
        elif isinstance(event, watch.Reset):
            value = {"type": "reset", "run": event.run, "attempt": event.attempt}
        elif isinstance(event, watch.Gap):
            value = {"type": "gap", "from": event.from_, "to": event.to}
        elif isinstance(event, watch.End):
            value = {
                "type": "end",
                "run": event.run,
                "attempt": event.attempt,
                "status": event.status,
                "exit_code": event.exit_code,
                "error": event.error,
            }
        else:
            return
        self._lines.append(_encode(value))
        if len(self._lines) >= 1000:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            lines.append(b"")
            write_all(STDOUT, b"\n".join(lines))

    def discard(self) -> None:
        self._lines.clear()


class HumanOutput(Output):
    """Bytes as the run wrote them; our own remarks on stderr, each on a line of its own.

    ``headers``: name each run before its output (several runs are followed)."""

    def __init__(self, headers: bool = False) -> None:
        self._headers = headers
        self._run: str | None = None
        self._fd = STDOUT
        self._pieces: list[bytes] = []
        self._size = 0
        self._at_line_start = True
        self._tty = sys.stdout.isatty()

    def show(self, event: watch.Event) -> None:
        if isinstance(event, watch.Chunk):
            self._header(event.run)
            fd = STDERR if event.stream == "stderr" else STDOUT
            if fd != self._fd or self._size > 65536:
                self.flush()
                self._fd = fd
            self._pieces.append(event.data)
            self._size += len(event.data)
        elif isinstance(event, watch.Reset):
            self._header(event.run)
            if event.attempt > 1:
                self.remark(
                    f"── runctl: run {event.run} was interrupted;"
                    f" attempt {event.attempt} starts over ──"
                )
        elif isinstance(event, watch.Gap):
            self._header(event.run)
            self.remark(
                f"runctl: chunks {event.from_} to {event.to} of run {event.run}"
                " are no longer stored"
            )
        elif isinstance(event, watch.End):
            self._header(event.run)
            self.ended(event.run, event.status, event.error)

    def _header(self, run: str) -> None:
        if self._headers and run != self._run:
            self.remark(f"── runctl: run {run} ──")
        self._run = run

    def ended(self, run: str, status: str, error: str | None) -> None:
        why = f": {error}" if error else ""
        if status == "failed":
            self.remark(f"runctl: run {run} failed{why}")
        elif status == "aborted":
            self.remark(f"runctl: run {run} was aborted")
        elif status == "dead":
            self.remark(f"runctl: run {run} is dead{why}; try again: runctl retry {run}")
        elif self._tty:
            self.end_line()

    def remark(self, text: str) -> None:
        self.end_line()
        say(text)

    def end_line(self) -> None:
        """Leave the cursor at the start of a line."""
        self.flush()
        if not self._at_line_start:
            write_all(STDERR, b"\n")
            self._at_line_start = True

    def flush(self) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._size = 0
            if data:
                self._at_line_start = data.endswith(b"\n")
                write_all(self._fd, data)

    def discard(self) -> None:
        self._pieces.clear()
        self._size = 0
