"""JSON that stays one line, and text, whoever reads it.

Not everything that JSON allows in a string is safe there: many a reader splits lines at
U+2028, U+2029 and U+0085 as well (Python's ``str.splitlines``, JavaScript's ``^`` and ``$``),
terminals act on C1 controls, and show text behind a bidirectional override in another
order. They are written as escapes, which mean the same.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

_encoder = msgspec.json.Encoder()
#: In UTF-8: U+007F to U+009F, U+2028 to U+202E, U+2066 to U+2069.
_UNSAFE = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]")


def encode(value: Any) -> bytes:
    """``value`` as one line of JSON. What is no character (half a surrogate pair, or a byte of
    a file's name) becomes U+FFFD: no reader has to take such a string."""
    try:
        data = _encoder.encode(value)
    except UnicodeEncodeError:
        data = _encoder.encode(_mended(msgspec.to_builtins(value)))
    return _UNSAFE.sub(_escaped, data)


def _escaped(found: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(found[0].decode())


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mended(item) for item in value]
    return value
