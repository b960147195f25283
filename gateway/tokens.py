"""The file of tokens: what each may do, by its hash alone.

A table for each token, by a name that the log may show::

    [ci]
    sha256 = "…"                       # printf %s "$TOKEN" | sha256sum
    scopes = ["read", "submit"]        # or "operate": abort, purge
    threads = "ci-"                    # only threads whose names begin so; default: all
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import tomli

from ..config.files import MOST_TOML, read_bounded
from ..config.schema import ConfigError
from ..protocol.model import one_line
from .problems import HttpProblem

log = logging.getLogger("runctl.gateway")

Scope = Literal["read", "submit", "operate"]
SCOPES: tuple[Scope, ...] = ("read", "submit", "operate")
#: A change of the file holds after so long, seconds.
FRESH = 1.0


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    scopes: frozenset[Scope]
    threads: str = ""


class Caller(msgspec.Struct, frozen=True):
    """Who asks. ``name``: of a token, or of a proxy's user. ``threads``: what the names of threads
    that it may see begin with. ``proxied``: a proxy says so."""

    name: str
    scopes: frozenset[Scope] = frozenset(SCOPES)
    threads: str = ""
    proxied: bool = False

    def may_see(self, thread: str) -> bool:
        return thread.startswith(self.threads)


#: On loopback, without tokens: whoever may connect.
ANYBODY = Caller("")


def read_tokens(file: Path) -> dict[bytes, Caller]:
    """Who shows a token, by its SHA-256. Blocking. Raises ConfigError, which names the file."""
    try:
        tables = tomli.loads(read_bounded(file, MOST_TOML).decode("utf-8-sig"))
        named = msgspec.convert(tables, dict[str, Token])
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}): correct the path or its mode"
        ) from None
    except (ValueError, RecursionError) as error:  # TOML, UTF-8 and msgspec's are ValueErrors
        raise ConfigError(f"{file}: {one_line(str(error))}; see docs/http.md") from None
    found: dict[bytes, Caller] = {}
    for name, token in named.items():
        if not re.fullmatch("[0-9a-fA-F]{64}", token.sha256):
            raise ConfigError(f"{file}: [{one_line(name)}]: sha256 is not 64 hexadecimal digits")
        if not token.scopes:
            raise ConfigError(f"{file}: [{one_line(name)}]: scopes is empty: read, submit, operate")
        digest = bytes.fromhex(token.sha256)
        if digest in found:
            raise ConfigError(f"{file}: [{one_line(name)}] has the token of another table")
        found[digest] = Caller(name, token.scopes, token.threads)
    return found


class Tokens:
    """Those of ``file``. ``follow`` reads it again whenever it has changed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found = read_tokens(file)
        self._stamp = self._look()
        #: Why it cannot be read, as the log says already.
        self._problem: str | None = None

    def find(self, shown: bytes) -> Caller | None:
        """Whose token that is. Raises HttpProblem, when the file cannot be read."""
        if self._problem is not None:
            raise HttpProblem(
                503, "unavailable", "the file of tokens cannot be read: see the gateway's log"
            )
        return self._found.get(hashlib.sha256(shown).digest())

    def holds(self, caller: Caller) -> bool:
        """Whether it may still do what it did."""
        return caller in self._found.values()

    async def follow(self, notice: Callable[[], None]) -> None:
        """For ever; ``notice`` after each change."""
        while True:
            await asyncio.sleep(FRESH)
            if await asyncio.to_thread(self._refresh):
                notice()

    def _look(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self._file)
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _refresh(self) -> bool:
        """Whether it has changed."""
        stamp = self._look()
        if stamp == self._stamp and self._problem is None:
            return False
        self._stamp = stamp
        try:
            self._found, self._problem = read_tokens(self._file), None
        except ConfigError as error:
            if str(error) != self._problem:
                log.error("%s; until then nobody is let in", error)
            self._found, self._problem = {}, str(error)
        return True
