"""What ``doctor`` found at one place."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """``fix``: what to do about it; None when it is in order."""

    check: str
    state: State
    said: str
    fix: str | None = None


def ok(check: str, said: str) -> Finding:
    return Finding(check, "ok", said)


def warn(check: str, said: str, fix: str) -> Finding:
    return Finding(check, "warn", said, fix)


def fail(check: str, said: str, fix: str) -> Finding:
    return Finding(check, "fail", said, fix)


def split(check: str, state: State, text: str) -> Finding:
    """Of one of our error lines: what is wrong, then what to do."""
    for mark in ("; ", ": "):
        said, found, fix = text.rpartition(mark)
        if found:
            return Finding(check, state, said, fix)
    return Finding(check, state, text, "fix it, then run doctor again")
