"""Durations (seconds, float) and sizes (bytes, int) as people write them.

``format_*`` gives the shortest exact form: ``parse_*(format_*(x)) == x``.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

_DURATION_UNITS = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
_SIZE_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _SIZE_UNITS[f"{_letter}iB"] = 1024**_power
    _SIZE_UNITS[f"{_letter}B"] = 1000**_power
_SIZE_UNITS_FOLDED = {unit.lower(): scale for unit, scale in _SIZE_UNITS.items()}

_QUANTITY = r"([0-9]{1,25}(?:\.[0-9]{1,400})?)\s*([A-Za-z]*)"

DURATION_FORMS = 'a duration such as "500ms", "5s", "2m", "24h" or "7d", or a number of seconds'
SIZE_FORMS = 'a size such as "4GiB" or "512MB", or a whole number of bytes'


def parse_duration(text: str) -> float:
    """Seconds in ``text``; a bare number is seconds. ValueError says what is accepted."""
    number, unit = _split(text, DURATION_FORMS)
    scale = _DURATION_UNITS.get(unit or "s")
    if scale is None:
        raise ValueError(f"expected {DURATION_FORMS}")
    return float(number * scale)


def parse_size(text: str) -> int:
    """Bytes in ``text``; a bare number is bytes. ValueError says what is accepted."""
    number, unit = _split(text, SIZE_FORMS)
    scale = _SIZE_UNITS_FOLDED.get((unit or "B").lower())
    if scale is None:
        raise ValueError(f"expected {SIZE_FORMS}")
    size = number * scale
    if size != int(size):
        raise ValueError("expected a whole number of bytes")
    return int(size)


def _split(text: str, forms: str) -> tuple[Decimal, str]:
    match = re.fullmatch(_QUANTITY, text.strip())
    if match is None:
        raise ValueError(f"expected {forms}")
    return Decimal(match[1]), match[2]


def format_duration(seconds: float) -> str:
    """``seconds`` (finite, not negative) in the largest unit that holds it exactly."""
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"not a duration: {seconds}")
    if seconds == 0:
        return "0s"
    exact = Decimal(repr(float(seconds)))
    for unit, scale in reversed(_DURATION_UNITS.items()):
        if exact % scale == 0:
            return f"{int(exact / scale)}{unit}"
    return f"{exact:f}s"


def readable(size: int) -> str:
    """``format_size`` with a space before the unit, as in a sentence."""
    return re.sub(r"(?<=[0-9])(?=[A-Za-z])", " ", format_size(size))


def format_size(size: int) -> str:
    """``size`` bytes (not negative) in the unit that needs the smallest number."""
    if size < 0:
        raise ValueError(f"not a size: {size}")
    exact = [(size // scale, unit) for unit, scale in _SIZE_UNITS.items() if size % scale == 0]
    number, unit = min(exact, key=lambda form: form[0])
    return f"{number}{unit}"
