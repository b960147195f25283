"""What a single run does to the watcher's terminal, and how to undo it.

Its bytes go to the screen as they are, with three exceptions. A sequence, or a character,
is written whole or not yet, so that a line of ours never comes in its middle. Questions to
the terminal (where is the cursor? which colours?) are left out: the answer would be typed
at the watcher's shell. And what was switched on stays noted, for nothing of it may be left
when the watcher goes.
"""

from __future__ import annotations

import re

from .control_sequences import SEQUENCE, remove_controls, to_seven_bit, whole

#: A sequence whose end does not come is let through at this length.
MAX_HELD = 64 * 1024
MAX_MODES = 100
#: No terminal keeps more.
MAX_DEPTH = 100

#: Private modes that are on when nobody touches them: auto-wrap, auto-repeat, the cursor.
_ON = {7: True, 8: True, 25: True}
#: And of the others: no local echo.
_ANSI_ON = {12: True}
ALTERNATE = (47, 1047, 1049)
#: Modes in which a terminal speaks without being asked: mouse, focus, colour scheme, size.
_SPEAKING = {9, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 2031, 2048}
#: Finals of CSI sequences that no terminal answers, but for forms that ask (see ``_asks``).
_SILENT = frozenset(b"@ABCDEFGHIJKLMPSTXZ`abdefghijlmqrstu")
_REPORTS = re.compile(rb"(?:1[1345689]|2[01])(?:;|\Z)")
#: Colours that a program may set, by OSC number, and what puts them back.
_COLOURS = {4: 104, 5: 105, **{n: n + 100 for n in range(10, 20)}}
#: Of OSC: title, colours, directory, link, progress, pointer, prompt marks; none is answered.
_SILENT_OSC = {0, 1, 2, 6, 7, 8, 9, 22, 133, 777, *_COLOURS, *_COLOURS.values()}


def _asks(parameters: bytes, between: bytes, final: bytes) -> bool:
    """Whether it is a CSI sequence that a terminal answers."""
    if final in b"cn":
        return between != b" "
    if between == b"$":
        return final in b"puw"
    if between:
        return (between, final) in ((b"*", b"y"), (b"&", b"u"), (b"'", b"|"), (b'"', b"v")) or (
            between == b"#" and final in b"RS|"
        )
    if final == b"t":
        return _REPORTS.match(parameters) is not None
    first = parameters[:1]
    if first == b"?":
        return final in b"umS"
    return final == b"x" or (first == b">" and final == b"q")


class Screen:
    """One run's way to our terminal. ``questions``: let them, and every byte, through as it is."""

    def __init__(self, questions: bool = False) -> None:
        self._raw = questions
        self._held: dict[str, bytes] = {}
        #: Whether the terminal may send something that nobody has typed.
        self.answered = False
        #: What is to be written before what ``feed`` gave last.
        self.before = b""
        self._forget()

    def _forget(self) -> None:
        self._touched = False
        self._modes: dict[int, bool] = {}
        self._ansi: dict[int, bool] = {}
        self._sets: set[bytes] = set()
        self._colours: set[int] = set()
        self._region = False
        self._keypad = False
        self._key_options: set[int] = set()
        self._kitty = False
        self._pushed = 0
        self._titles = 0
        self._shape = False
        self._protected = False
        self._link = False
        self._progress = False
        self._pointer = False
        self._printing = False
        self._tabs = False
        self._bytes = False

    @property
    def alternate(self) -> bool:
        """Whether the program has the alternate screen, all of which is its own."""
        return any(self._modes.get(mode, False) for mode in ALTERNATE)

    @property
    def moved(self) -> bool:
        """Whether more than text was written, so that the cursor may be anywhere."""
        return self._touched

    def feed(self, data: bytes, stream: str = "stdout") -> bytes:
        """What to write now. ``stream``: whose bytes they are; each is cut by itself."""
        came, self.before = data, b""
        held = self._held.pop(stream, b"")
        data = to_seven_bit(held + data if held else data)
        end = whole(data)
        if end < len(data) <= end + MAX_HELD:
            data, self._held[stream] = data[:end], data[end:]
        if SEQUENCE.search(data) is not None:
            self._touched = True
            data = SEQUENCE.sub(self._sequence, data)
        return came if self._raw else data

    def rest(self, stream: str = "stdout") -> bytes:
        """What was held back and never became whole, when nothing more comes."""
        held = self._held.pop(stream, b"")
        return b"" if self._raw or b"\x1b" in held else held

    def _sequence(self, found: re.Match[bytes]) -> bytes:
        """What to write in place of a sequence, which is noted."""
        if found[3]:
            parameters = remove_controls(found[1])
            between = remove_controls(found[2])
            if _asks(parameters, between, found[3]):
                return self._question(found[0])
            self._csi(parameters, between, found[3])
            return found[0]
        if found[4]:
            return self._string(found[4], found[5], found[0])
        if found[8]:
            if found[8] == b"\x05":
                return self._question(found[0])
            return found[0]
        if found[7] == b"Z" and not found[6]:
            return self._question(found[0])
        self._escape(found[6], found[7])
        return found[0]

    def _question(self, data: bytes) -> bytes:
        if not self._raw:
            return b""
        self.answered = True
        return data

    def _csi(self, parameters: bytes, between: bytes, final: bytes) -> None:
        first, numbers = parameters[:1], _numbers(parameters)
        if final in b"hl" and not between:
            if first == b"?":
                _note(self._modes, _ON, numbers, final == b"h")
                self.answered = self.answered or not _SPEAKING.isdisjoint(numbers)
            elif first not in (b"<", b"=", b">"):
                _note(self._ansi, _ANSI_ON, numbers, final == b"h")
        elif final == b"r" and not between and first != b"?":
            self._region = bool(numbers)
        elif final == b"u" and not between and first in (b">", b"<", b"="):
            self._keys(first, numbers)
        elif final == b"m" and first == b">":
            if len(self._key_options) < MAX_MODES:
                self._key_options.update(numbers[:1])
        elif final == b"q" and between == b" ":
            self._shape = True
        elif final == b"q" and between == b'"':
            self._protected = True
        elif final in b"gW" and not between:
            self._tabs = True
        elif final == b"i":
            self._printing = self._printing or 5 in numbers
        elif final == b"t" and not between and numbers[:1] == [22]:
            self._titles = min(self._titles + 1, MAX_DEPTH)
        elif final == b"t" and not between and numbers[:1] == [23]:
            self._titles = max(self._titles - 1, 0)
        elif final == b"p" and between == b"!":
            self._modes.clear()
        elif between or final[0] not in _SILENT:
            self.answered = True  # who knows

    def _keys(self, how: bytes, numbers: list[int]) -> None:
        if how == b">":
            self._pushed = min(self._pushed + 1, MAX_DEPTH)
        elif how == b"<":
            self._pushed -= min(self._pushed, max(1, *numbers, 1))
        else:
            self._kitty = True

    def _title(self) -> None:
        """Have the terminal remember the title that it had before."""
        if not self._titles and not self._raw:
            self._titles = 1
            self.before = b"\x1b[22;0t"

    def _string(self, kind: bytes, content: bytes, data: bytes) -> bytes:
        if kind == b"P":
            if content[:2] in (b"+q", b"$q"):
                return self._question(data)
            self.answered = self.answered or b"q" not in content[:20]  # all but pictures
            return data
        if kind != b"]":
            if kind == b"_" and content[:1] == b"G" and b"a=q" in content[:200]:
                return self._question(data)
            self.answered = True
            return data
        number, _, text = content.partition(b";")
        code = int(number) if number.isdigit() and len(number) < 6 else -1
        if b"?" in text.split(b";") or text.startswith(b"Report"):
            return self._question(data)
        if code in (0, 1, 2):
            self._title()
            return data
        if code in _COLOURS:
            self._colours.add(code)
        elif code == 8:
            self._link = True
        elif code == 9:
            self._progress = self._progress or text.startswith(b"4;")
        elif code == 22:
            self._pointer = True
        self.answered = self.answered or code not in _SILENT_OSC
        return data

    def _escape(self, between: bytes, final: bytes) -> None:
        if not between and final in b"=>":
            self._keypad = final == b"="
        elif not between and final == b"H":
            self._tabs = True
        elif not between and final == b"c":
            held, answered = self._titles, self.answered
            self._forget()
            self._touched, self._titles, self.answered = True, held, answered
        elif between in (b")", b"*", b"+", b"-", b".", b"/"):
            self._sets.add(between)
        elif between == b"%":
            self._bytes = final != b"G"

    def leave(self) -> bytes:
        """What makes the terminal as it was; nothing, if nothing was done to it since."""
        out = self.undo()
        self._held.clear()
        self._forget()
        return out

    def redo(self) -> bytes:
        """What takes an ``undo`` back, but for colours and what stood on the screen."""
        self._pushed = self._titles = 0  # taken off what the terminal remembers
        out = b"\x1b=" if self._keypad else b""
        for mode, on in self._ansi.items():
            out += b"\x1b[%d%c" % (mode, b"h" if on else b"l")
        for mode, on in self._modes.items():
            out += b"\x1b[?%d%c" % (mode, b"h" if on else b"l")
        return out

    def undo(self) -> bytes:
        """What ``leave`` gives, for a while."""
        if not self._touched:
            return b""
        # A write may have been cut in a sequence: ST ends any, and is nothing outside.
        out = b"\x1b\\"
        if self._printing:
            out += b"\x1b[4i\x1b[?4i"
        if self._bytes:
            out += b"\x1b%G"
        if self._region:
            out += b"\x1b7\x1b[r\x1b8"  # all of the screen scrolls; alone it moves the cursor
        if self._tabs:
            out += b"\x1b7\r\x1b[3g" + b"\x1b[8C\x1bH" * 60 + b"\x1b8"
        if self._kitty:
            out += b"\x1b[=0u"
        if self._pushed > 0:
            out += b"\x1b[<%du" % self._pushed
        for option in sorted(self._key_options):
            out += b"\x1b[>%dm" % option
        if self._keypad:
            out += b"\x1b>"
        for mode, on in self._ansi.items():
            out += b"\x1b[%d%c" % (mode, b"l" if on else b"h")
        for mode, on in self._modes.items():
            out += b"\x1b[?%d%c" % (mode, b"l" if on else b"h")
        if self._link:
            out += b"\x1b]8;;\x1b\\"
        for colour in sorted(self._colours):
            out += b"\x1b]%d\x1b\\" % _COLOURS[colour]
        if self._progress:
            out += b"\x1b]9;4;0\x1b\\"
        if self._pointer:
            out += b"\x1b]22;default\x1b\\"
        if self._shape:
            out += b"\x1b[0 q"
        if self._protected:
            out += b'\x1b[0"q'
        out += b"\x1b[23;0t" * self._titles
        for which in sorted(self._sets & {b")", b"*", b"+"}):
            out += b"\x1b" + which + b"B"
        return out + b"\x1b[?25h\x1b(B\x0f\x1b[0m"


def _numbers(parameters: bytes) -> list[int]:
    return [
        int(part)
        for part in parameters.lstrip(b"?<=>").split(b";")
        if part.isdigit() and len(part) < 6
    ]


def _note(modes: dict[int, bool], default: dict[int, bool], numbers: list[int], on: bool) -> None:
    for mode in numbers:
        if on == default.get(mode, False):
            modes.pop(mode, None)
        elif len(modes) < MAX_MODES:
            modes[mode] = on


def plain(data: bytes) -> bytes:
    """``data`` without its sequences."""
    return SEQUENCE.sub(b"", to_seven_bit(data))
