"""JSON of which only the beginning was read: a list of runs does not load their prompts and
replies, which may have megabytes."""

from __future__ import annotations

import json
import re
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]+|\\.)*(?P<closed>")?|[{}\[\],]', re.DOTALL)
_CLOSE = {"{": "}", "[": "]"}
#: Two escapes of six characters, of which one half each may be there.
_ESCAPES = 12


def parse_beginning(text: str) -> Any:
    """What ``text`` holds: the value of a JSON document, or of its beginning, where the string
    that was cut ends there and what came after it is missing. Raises ValueError on other text,
    when it was cut before its first value was whole, and when it is nested deeper than Python
    reads."""
    try:
        return _parse(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _parse(text: str) -> Any:
    """The same, but for what is nested too deep."""
    try:
        return json.loads(text)
    except ValueError as error:
        problem = error
    closing: list[str] = []
    whole = ""  # up to the last member that is complete, with what closes it
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in _CLOSE:
            closing.append(_CLOSE[mark])
        elif mark == ",":
            whole = text[: token.start()] + _close_all(closing)
        elif mark in ("}", "]"):
            if not closing or closing.pop() != mark:
                raise problem
        elif token["closed"] is None:
            for cut in range(_ESCAPES + 1):
                if len(text) - cut <= token.start():
                    break
                try:
                    return json.loads(text[: len(text) - cut] + '"' + _close_all(closing))
                except ValueError:
                    continue
            break
    if not whole:
        raise problem
    return json.loads(whole)


def _close_all(closing: list[str]) -> str:
    return "".join(reversed(closing))
