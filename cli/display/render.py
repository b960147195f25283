"""Printing: JSON, plain tables, lines to the operator.

Tables are formatted here: importing rich takes longer than all the rest of ``list``.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ...protocol import json_text
from ..common import ReaderGone, WriteFailed
from ..interrupts import writing
from .harmless_text import escape_controls

if TYPE_CHECKING:
    from ...protocol.messages import ExecutorStatus, Submitted

STDOUT = 1
STDERR = 2
_NAMES = {STDOUT: "standard output", STDERR: "standard error"}


def write_all(fd: int, data: bytes) -> None:
    """Write without a buffer of our own: nothing may be left to flush at exit, where a
    reader that went away or stopped reading would hold us. Raises ReaderGone, WriteFailed."""
    view = memoryview(data)
    with writing():
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # the terminal was left non-blocking by another program
                select.select([], [fd], [])
            except BrokenPipeError:
                raise ReaderGone from None
            except OSError as error:
                raise WriteFailed(f"cannot write to {_NAMES[fd]}: {error.strerror}") from None


def tell(data: bytes) -> None:
    """Write to stderr what is not part of any answer: where it cannot be written, what we do
    and how it ends stay the same."""
    with contextlib.suppress(ReaderGone, WriteFailed):
        write_all(STDERR, data)


def say(text: str) -> None:
    """One line to the operator, on stderr."""
    tell(f"{printable(text)}\n".encode(errors="replace"))


def note(text: str) -> None:
    say(f"runctl: {text}")


def out(text: str) -> None:
    """Lines of the answer, on stdout. Raises ReaderGone, WriteFailed."""
    if os.isatty(STDOUT):
        text = escape_controls(text)
    write_all(STDOUT, f"{text}\n".encode(errors="replace"))


def out_json(value: Any) -> None:
    """Raises ReaderGone, WriteFailed."""
    write_all(STDOUT, json_text.encode(value) + b"\n")


def submitted(done: Submitted, as_json: bool) -> None:
    """The answer that a run is queued. Raises ReaderGone; WriteFailed, which names the run."""
    try:
        if as_json:
            out_json({"thread": done.thread, "run": done.run, "status": done.status})
        else:
            out(done.run)
    except WriteFailed as error:
        raise WriteFailed(f"run {done.run} is queued, but {error}") from None


def printable(text: str) -> str:
    """``text`` without anything that could steer a terminal, on one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def width(text: str) -> int:
    """Terminal columns that ``text`` takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def colours() -> bool:
    """Whether the operator wants them (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def cut(text: str, columns: int) -> str:
    """``text`` in at most ``columns`` terminal columns."""
    if width(text) <= columns:
        return text
    kept = ""
    room = columns - 1
    for character in text:
        room -= width(character)
        if room < 0:
            break
        kept += character
    return kept + "…" if columns > 0 else ""


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    least: Mapping[str, int] | None = None,
    drop: Sequence[str] = (),
) -> None:
    """Aligned columns on stdout; nothing is cut, unless stdout is a terminal. There, those of
    ``drop`` that hold nothing but "-" are left out, the columns in ``least`` are made narrower,
    down to so many terminal columns, and when that is not enough, columns are left out in the
    order of ``drop``."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    cells = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = {name: max(width(row[i]) for row in cells) for i, name in enumerate(header)}
    if columns is not None:
        for i, name in enumerate(header):
            if name in drop and all(row[i] == "-" for row in cells[1:]):
                del widths[name]
        widths = fitted(widths, columns, least or {}, drop)
    lines = []
    for row in cells:
        kept = ((c, widths[n]) for c, n in zip(row, header, strict=True) if n in widths)
        line = "  ".join(padded(cell, wide) for cell, wide in kept).rstrip()
        lines.append(line if columns is None else cut(line, columns))
    out("\n".join(lines))


def padded(text: str, columns: int) -> str:
    """``text`` in exactly ``columns`` terminal columns."""
    shown = cut(text, columns)
    return shown + " " * (columns - width(shown))


def fitted(
    widths: Mapping[str, int], columns: int, least: Mapping[str, int], drop: Sequence[str]
) -> dict[str, int]:
    """The columns of ``table`` that are shown in ``columns``, and how wide: what is left over
    goes to the narrowed ones, evenly, until they hold their content."""
    found = {name: min(wide, least.get(name, wide)) for name, wide in widths.items()}

    def spare() -> int:
        return columns - sum(found.values()) - 2 * (len(found) - 1)

    for name in drop:
        if spare() >= 0:
            break
        found.pop(name, None)
    grow(found, widths, spare())
    return found


def grow(widths: dict[str, int], wanted: Mapping[str, int], spare: int) -> int:
    """Give ``spare`` to those of ``widths`` that are below ``wanted``, evenly; what is left."""
    while growing := [name for name in widths if widths[name] < wanted[name]][: max(0, spare)]:
        for name in growing:
            widths[name] += 1
        spare -= len(growing)
    return spare


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """``key: value`` lines, values aligned."""
    shown = [(key, printable(value)) for key, value in pairs]
    widest = max(len(key) for key, _ in shown) + 1
    out("\n".join(f"{key + ':':<{widest}} {value}" for key, value in shown))


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


def duration(started: str | None, ended: str | None) -> str:
    """From one RFC 3339 time to another, or to now; "-" when it has not begun. Whole seconds
    where the times have no more: those of runs that an older version stored."""
    try:
        begin = datetime.fromisoformat(started or "")
        end = datetime.fromisoformat(ended) if ended else datetime.now(UTC)
        passed = (end - begin).total_seconds()
    except (ValueError, TypeError):
        return "-"
    if ended and not begin.microsecond and not end.microsecond:
        return seconds(passed).replace(".0s", "s") if passed else "<1s"
    return f"{passed:.2f}s" if 0 <= passed < 1 else seconds(passed)


def moment(stamp: str) -> str:
    """An RFC 3339 time as it is shown: without milliseconds that it does not have."""
    return stamp.replace(".000Z", "Z")


def size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def describe_silence(x: ExecutorStatus) -> str:
    """What its rows are worth: they say what was so when it was last heard of."""
    if x.state == "silent":
        return f"executor {x.executor_id} holds its lease but does not answer; see: runctl status"
    if x.takeover:
        return f"executor {x.executor_id} is gone: a peer takes its runs over in a moment"
    return f"executor {x.executor_id} is gone: its runs wait for its restart"


def short(text: str, most: int = 60) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= most else line[: most - 1] + "…"
