"""Text of others at a terminal: shown, and nothing but shown.

What could steer the terminal, or show text in another order than it has, stands there as
its escape: ``\\x1b``, ``\\x9b``, ``\\u202e``.
"""

from __future__ import annotations

import codecs
import re

#: C0 but newline and tab, DEL, C1, separators of lines that are none to a terminal, and what
#: changes the direction of the text around it.
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escape_controls(text: str) -> str:
    """``text`` with its lines and tabs, and nothing else that a terminal acts on."""
    return _STEERS.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class Text:
    """UTF-8 that comes in pieces, cut anywhere. CR before a newline is left out."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
        self._return = False

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What to write now. ``last``: nothing more comes."""
        text = self._decode(data, last)
        if self._return:
            text = "\r" + text
        self._return = text.endswith("\r") and not last
        if self._return:
            text = text[:-1]
        return escape_controls(text.replace("\r\n", "\n")).encode()
