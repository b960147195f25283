"""Bytes from a terminal in cbreak mode to names of keys.

A key is its character, or one of: up down pageup pagedown home end enter escape
backspace. Sequences that mean nothing here are dropped whole.
"""

from __future__ import annotations

import codecs
import re

_CONTROL = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace"}
_SEQUENCES = {
    "A": "up",
    "B": "down",
    "H": "home",
    "F": "end",
    "1~": "home",
    "4~": "end",
    "5~": "pageup",
    "6~": "pagedown",
    "7~": "home",
    "8~": "end",
}
_SEQUENCE = re.compile(r"\x1b(?:\[|O)([0-9;:<=>?]*[ -/]*[@-~])")
_UNFINISHED = re.compile(r"\x1b(?:(?:\[|O)[0-9;:<=>?]*[ -/]*)?")


class Keys:
    """``feed`` what was read. When ``pending``, more should follow at once; if it does not,
    ``flush``: it was the escape key."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("ignore").decode
        self._text = ""

    @property
    def pending(self) -> bool:
        return bool(self._text)

    def feed(self, data: bytes) -> list[str]:
        text = self._text + self._decode(data)
        self._text = ""
        keys: list[str] = []
        while text:
            if text[0] != "\x1b":
                key = _CONTROL.get(text[0], text[0])
                if len(key) > 1 or key.isprintable():
                    keys.append(key)
                text = text[1:]
            elif found := _SEQUENCE.match(text):
                if name := _SEQUENCES.get(found[1]):
                    keys.append(name)
                text = text[found.end() :]
            elif _UNFINISHED.fullmatch(text):
                self._text, text = text, ""
            else:  # the escape key, and then another
                keys.append("escape")
                text = text[1:]
        return keys

    def flush(self) -> list[str]:
        was, self._text = self._text, ""
        return ["escape"] if was else []
