"""What one line of a program's output looks like when it is over: the carriage returns,
backspaces and erasures within it carried out, its colours kept, everything else that
would steer the terminal left out."""

from __future__ import annotations

import re

from .harmless_text import escape_controls

#: SGR sequences that are in effect at once, at most.
MAX_COLOURS = 16
#: A program moves the cursor no further to the right.
MAX_COLUMN = 4096

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
#: A sequence, whole or not; an unfinished string takes the rest of the line with it.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)([0-?]*)([ -/]*)([@-~])?"
    r"|(?:\x1b[]P_^X]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x18\x1a\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
#: What moves within the line or changes it.
_EDITS = re.compile(r"[\r\x08]|(?:\x1b\[|\x9b)[0-9;]*[@CDEFGHJKPXaf`]")
_COLOUR = re.compile(r"[0-9;:]*\Z")


class Colours:
    """The SGR sequences in effect at a point of a stream."""

    def __init__(self) -> None:
        self._active: list[str] = []

    def apply(self, parameters: str) -> None:
        if re.match(r"0*(?:;|\Z)", parameters):
            self._active.clear()
        if parameters.strip("0;"):
            self._active.append(f"\x1b[{parameters}m")
            del self._active[:-MAX_COLOURS]

    def text(self) -> str:
        return "".join(self._active)

    def copy(self) -> Colours:
        twin = Colours()
        twin._active = list(self._active)
        return twin


def visible(data: bytes) -> str:
    """A line's text as it is seen, without colours."""
    return re.sub(r"\x1b\[[0-9;:]*m", "", draw(data, Colours()))


def draw(data: bytes, colours: Colours) -> str:
    """The line, and with it ``colours``, which go on in the next."""
    text = data.decode(errors="backslashreplace")
    before = colours.text()
    if _CONTROL.search(text) is None:
        drawn = before + text
    elif _EDITS.search(text.rstrip("\r")) is None:
        drawn = before + escape_all_but_colours(text, colours)
    else:
        return _Canvas(colours).draw(text)
    return drawn + "\x1b[0m" if colours.text() else drawn


def escape_all_but_colours(text: str, colours: Colours) -> str:
    def replace(found: re.Match[str]) -> str:
        if found[3] == "m" and not found[2] and _COLOUR.match(found[1]):
            colours.apply(found[1])
            return f"\x1b[{found[1]}m"
        return ""

    pieces = re.split(r"(\x1b\[[0-9;:]*m)", _SEQUENCE.sub(replace, text))
    return "".join(p if i % 2 else escape_controls(p) for i, p in enumerate(pieces))


class _Canvas:
    """A line of cells; each has its character and the colours that it was written in."""

    def __init__(self, colours: Colours) -> None:
        self._colours = colours
        self._style = colours.text()
        self._cells: list[tuple[str, str]] = []
        self._column = 0

    def draw(self, text: str) -> str:
        at = 0
        for found in _SEQUENCE.finditer(text):
            self._write(text[at : found.start()])
            at = found.end()
            if found[0] == "\r":
                self._column = 0
            elif found[0] == "\x08":
                self._column = max(0, self._column - 1)
            elif found[3] and not found[2]:
                self._csi(found[1], found[3])
        self._write(text[at:])
        return self._drawn()

    def _write(self, text: str) -> None:
        if not text:
            return
        self._reach(self._column)
        cells = [(character, self._style) for character in escape_controls(text)]
        self._cells[self._column : self._column + len(cells)] = cells
        self._column += len(cells)

    def _reach(self, column: int) -> None:
        if column > len(self._cells):
            self._cells += [(" ", "")] * (column - len(self._cells))

    def _csi(self, parameters: str, final: str) -> None:
        if final == "m":
            if _COLOUR.match(parameters):
                self._colours.apply(parameters)
                self._style = self._colours.text()
            return
        numbers = [
            min(int("0" + n[:9]), MAX_COLUMN)
            for n in parameters.split(";")
            if n[:9].isdecimal() or not n
        ]
        first = numbers[0] if numbers else 0
        count = max(1, first)
        cells, column = self._cells, self._column
        if final in "Ca":
            self._column = min(column + count, max(MAX_COLUMN, column))
        elif final == "D":
            self._column = max(0, column - count)
        elif final in "G`":
            self._column = min(count - 1, MAX_COLUMN)
        elif final in "EF":
            self._column = 0
        elif final in "Hf":
            self._column = min(max(1, numbers[1] if len(numbers) > 1 else 1) - 1, MAX_COLUMN)
        elif final in "JK":
            if first == 0:
                del cells[column:]
            elif first == 1:
                cells[: column + 1] = [(" ", "")] * min(column + 1, len(cells))
            else:
                cells.clear()
        elif final == "P":
            del cells[column : column + count]
        elif final == "X":
            reach = min(column + count, len(cells))
            cells[column:reach] = [(" ", "")] * (reach - column)
        elif final == "@" and column < len(cells):
            cells[column:column] = [(" ", "")] * min(count, MAX_COLUMN)

    def _drawn(self) -> str:
        out, style = [], ""
        for character, wanted in self._cells:
            if wanted != style:
                out.append(("\x1b[0m" if style else "") + wanted)
                style = wanted
            out.append(character)
        return "".join(out).rstrip(" ") + ("\x1b[0m" if style else "")
