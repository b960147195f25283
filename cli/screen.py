"""What a program on a terminal does to the watcher's terminal, and how to undo it.

The program's bytes go to the screen as they are, with three exceptions. An escape
sequence is written whole or not yet, so that a line of ours never comes in its middle.
Questions to the terminal (where is the cursor? which colours?) are left out: the answer
would be typed at the watcher's shell. And what was switched on stays noted, for nothing
of it may be left when the watcher goes.
"""

from __future__ import annotations

import re

#: A sequence whose end does not come is let through at this length.
MAX_HELD = 64 * 1024
MAX_MODES = 100

_CSI = rb"\x1b\[[0-?]*[ -/]*[@-~]"
_STRING = rb"\x1b[]P_^X][^\x07\x1b\x18\x1a]*(?:\x07|\x1b\\)"  # OSC, DCS, APC, PM, SOS
_SEQUENCE = re.compile(_CSI + rb"|" + _STRING + rb"|\x1b[ -/]*[0-Z\\^_`a-~]")
#: The beginning of a sequence that goes on behind the end of what came.
_OPEN = re.compile(rb"\x1b(?:[ -/]*|\[[0-?]*[ -/]*|[]P_^X][^\x07\x1b\x18\x1a]*\x1b?)\Z")
_MODE = re.compile(rb"\x1b\[\?([0-9;]{1,40})([hl])")
_REGION = re.compile(rb"\x1b\[[0-9;]+r")
_PUSH = re.compile(rb"\x1b\[>[0-9;]*u")
_POP = re.compile(rb"\x1b\[<([0-9]{0,3})u")
#: Cursor and status reports, device attributes, modes, kitty's keys, size; colours, DCS
#: queries (terminfo, settings).
_QUESTION = re.compile(
    rb"\x1b\[[?>=]?[0-9;]*[cn]|\x1b\[[?>]?[0-9;]*\$p|\x1b\[\?u|\x1b\[>[0-9]*q"
    rb"|\x1b\[(?:1[1345689]|2[01])(?:;[0-9]+)?t"
    rb"|\x1b\][0-9a-z;]*;\?(?:\x07|\x1b\\)|\x1bP[+$]q[^\x07\x1b]*(?:\x07|\x1b\\)|\x1bZ"
)
#: Modes that are on when nobody touches them: auto-wrap, auto-repeat, the cursor.
_ON = {7: True, 8: True, 25: True}
ALTERNATE = (47, 1047, 1049)


class Screen:
    """One run's way to our terminal. ``questions``: let them through."""

    def __init__(self, questions: bool = False) -> None:
        self._questions = questions
        self._forget()

    def _forget(self) -> None:
        self._used = False
        self._held = b""
        self._modes: dict[int, bool] = {}
        self._region = False
        self._keypad = False
        self._other_keys = False
        self._pushed = 0

    @property
    def alternate(self) -> bool:
        """Whether the program has the alternate screen, all of which is its own."""
        return any(self._modes.get(mode, False) for mode in ALTERNATE)

    def feed(self, data: bytes) -> bytes:
        """What to write now."""
        self._used = True
        data = self._held + data
        self._held = b""
        if b"\x1b" not in data:
            return data
        end = _whole(data)
        if len(data) - end <= MAX_HELD:
            data, self._held = data[:end], data[end:]
        for found in _MODE.finditer(data):
            self._note(found[1], found[2] == b"h")
        self._region = self._region or _REGION.search(data) is not None
        self._keypad = self._keypad or b"\x1b=" in data
        if b"\x1b[>" in data:
            self._other_keys = self._other_keys or b"\x1b[>4" in data
            self._pushed += len(_PUSH.findall(data))
        if b"\x1b[<" in data:
            self._pushed -= sum(int(n or 1) for n in _POP.findall(data))
        return data if self._questions else _QUESTION.sub(b"", data)

    def _note(self, numbers: bytes, on: bool) -> None:
        for number in numbers.split(b";"):
            if number:
                mode = int(number)
                if on == _ON.get(mode, False):
                    self._modes.pop(mode, None)
                elif len(self._modes) < MAX_MODES:
                    self._modes[mode] = on

    def leave(self) -> bytes:
        """What makes the terminal as it was; nothing, if nothing was shown since."""
        out = self.undo()
        self._forget()
        return out

    def redo(self) -> bytes:
        """What takes an ``undo`` back, but for colours and what stood on the screen."""
        out = b"\x1b=" if self._keypad else b""
        for mode, on in self._modes.items():
            out += b"\x1b[?%d%c" % (mode, b"h" if on else b"l")
        return out

    def undo(self) -> bytes:
        """What ``leave`` gives, for a while."""
        if not self._used:
            return b""
        # A write may have been cut in a sequence: ST ends any, and is nothing outside.
        out = b"\x1b\\"
        if self._region:
            out += b"\x1b7\x1b[r\x1b8"  # all of the screen scrolls; alone it moves the cursor
        if self._pushed > 0:
            out += b"\x1b[<%du" % self._pushed
        if self._other_keys:
            out += b"\x1b[>4m"
        if self._keypad:
            out += b"\x1b>"
        for mode, on in self._modes.items():
            out += b"\x1b[?%d%c" % (mode, b"l" if on else b"h")
        return out + b"\x1b[?25h\x1b(B\x0f\x1b[0m"


def _whole(data: bytes) -> int:
    """Where an unfinished sequence begins, else the end."""
    last = data.rfind(b"\x1b")
    if last == len(data) - 1:  # perhaps the first half of a string's terminator
        before = data.rfind(b"\x1b", 0, last)
        if before >= 0 and _OPEN.match(data, before):
            return before
    return last if _OPEN.match(data, last) else len(data)


def plain(data: bytes) -> bytes:
    """``data`` without its escape sequences."""
    return _SEQUENCE.sub(b"", data)
