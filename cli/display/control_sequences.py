"""The grammar of terminal control sequences, as far as what is shown is concerned
(ECMA-48; xterm's ctlseqs for what the private ones mean).

Sequences may be cut anywhere between two chunks: ``whole`` finds where one that is not
complete begins. C1 controls in UTF-8 (U+009B is CSI) mean the same as their forms with ESC;
``to_seven_bit`` turns them into those.
"""

from __future__ import annotations

import re

#: Terminals carry out C0 controls in the middle of a sequence, and go on with it.
_C0 = rb"\x00-\x17\x19\x1c-\x1f\x7f"
_CSI = rb"\x1b[" + _C0 + rb"]*\[([0-?" + _C0 + rb"]*)([ -/" + _C0 + rb"]*)([@-~])"
#: OSC, DCS, APC, PM, SOS.
_STRING = rb"\x1b([]P_^X])([^\x07\x1b\x18\x1a]*)(?:\x07|\x1b\\)"
_ESCAPE = rb"\x1b([ -/]*)([0-Z\\^_`a-~])"
#: Groups: parameters, intermediates, final of CSI; kind, content of a string; intermediates,
#: final of others; a single control that asks (ENQ) or shifts.
SEQUENCE = re.compile(_CSI + rb"|" + _STRING + rb"|" + _ESCAPE + rb"|([\x05\x0e\x0f])")
#: The beginning of a sequence that goes on behind the end of what came.
_OPEN = re.compile(
    rb"\x1b(?:[ -/" + _C0 + rb"]*|[" + _C0 + rb"]*\[[0-?" + _C0 + rb"]*[ -/" + _C0 + rb"]*"
    rb"|[]P_^X][^\x07\x1b\x18\x1a]*\x1b?)\Z"
)
_C1 = re.compile(rb"\xc2([\x80-\x9f])")
#: What may be the beginning of a character.
_HALF = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")
_CONTROLS = re.compile(rb"[" + _C0 + rb"]")


def to_seven_bit(data: bytes) -> bytes:
    if b"\xc2" not in data:
        return data
    return _C1.sub(lambda found: b"\x1b%c" % (found[1][0] - 0x40), data)


def whole(data: bytes) -> int:
    """Where an unfinished sequence or character begins, else the end."""
    last = data.rfind(b"\x1b")
    if last >= 0:
        if last == len(data) - 1:  # perhaps the first half of a string's terminator
            before = data.rfind(b"\x1b", 0, last)
            if before >= 0 and _OPEN.match(data, before):
                return before
        if _OPEN.match(data, last):
            return last
    half = _HALF.search(data, max(0, len(data) - 3))
    return len(data) if half is None else half.start()


def remove_controls(data: bytes) -> bytes:
    """``data`` without its C0 controls."""
    return _CONTROLS.sub(b"", data)
