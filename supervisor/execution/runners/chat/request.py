"""A request: its address, its key, its messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import trio

from .....config.files import MOST_SECRET, read_bounded
from .....config.schema import ChatRunner
from .....protocol.errors import RunFailed
from ..protocol import Turn
from .prefill import prefilled
from .words import Words

if TYPE_CHECKING:
    import httpx


class Ask(NamedTuple):
    """An HTTP request. ``body``: JSON, None for none."""

    method: Literal["GET", "POST"]
    url: httpx.URL
    body: dict[str, Any] | None


class Target:
    """Where a runner's requests go, with which key, and the words for it."""

    def __init__(self, config: ChatRunner, key: str | None) -> None:
        """Raises RunFailed."""
        import httpx

        self.key = key
        try:
            base = httpx.URL(config.base_url)
            if base.scheme not in ("http", "https") or not base.host:
                raise ValueError
        except (httpx.InvalidURL, ValueError):
            raise RunFailed(
                f"base_url of runner {config.name!r} is not an http:// or https:// URL"
            ) from None
        self._base = base
        self.url = self.at("responses" if config.api == "responses" else "chat/completions")
        # Credentials and keys travel in the user part and in the query.
        self.shown = shown(self.url)
        self.words = Words([key, base.password, *(v for _, v in base.params.multi_items())])

    def at(self, path: str, **params: str) -> httpx.URL:
        """An address below base_url, whose own parameters stay."""
        url = self._base.copy_with(path=f"{self._base.path.rstrip('/')}/{path}")
        return url.copy_merge_params(params) if params else url

    @property
    def headers(self) -> dict[str, str]:
        found = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",  # a compressed answer has no bound that we can see
            "Cache-Control": "no-store",
        }
        if self.key is not None:
            found["Authorization"] = f"Bearer {self.key}"
        return found


def shown(url: httpx.URL) -> str:
    """The URL without what may be secret in it."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


async def read_key(config: ChatRunner, limiter: trio.CapacityLimiter) -> str | None:
    """The API key, read anew so that it may be rotated; ``limiter``: how often at once. A read
    that hangs keeps its thread for good. Raises RunFailed."""
    file = config.api_key_file
    if config.api_key is not None or file is None:
        return _usable(config.api_key, "api_key")
    try:
        with trio.fail_after(config.timeout):
            data = await trio.to_thread.run_sync(
                read_bounded, file, MOST_SECRET, abandon_on_cancel=True, limiter=limiter
            )
        key = data.decode()
    except trio.TooSlowError:
        raise RunFailed(
            f"api_key_file {file} cannot be read: its file system has not answered for"
            f" {config.timeout:g} s"
        ) from None
    except OSError as error:
        raise RunFailed(
            f"api_key_file {file} cannot be read: {error.strerror}; make it readable for"
            " the user that runs runctld"
        ) from None
    except UnicodeDecodeError:
        raise _bad_key(f"api_key_file {file}") from None
    if not key.strip():
        raise RunFailed(f"api_key_file {file} is empty; write the API key into it")
    return _usable(key, f"api_key_file {file}")


def _usable(key: str | None, where: str) -> str | None:
    """The key without white space around it, if it can stand in a header."""
    key = (key or "").strip()
    if not key:
        return None
    # httpx would quote the whole header in its error.
    if not (key.isascii() and key.isprintable()):
        raise _bad_key(where)
    return key


def _bad_key(where: str) -> RunFailed:
    return RunFailed(f"{where} does not hold a usable API key: one line of plain ASCII is expected")


def newest(config: ChatRunner, history: Sequence[Turn]) -> list[Turn]:
    """The turns that are sent along: the newest, as many as ``history`` messages and
    ``history_bytes`` allow. A turn without a reply would be refused by strict endpoints."""
    whole = [turn for turn in history if turn.prompt.strip() and turn.reply.strip()]
    turns = config.history // 2
    return within(whole[-turns:] if turns else [], config.history_bytes)


def within(turns: Sequence[Turn], most: int) -> list[Turn]:
    """The newest of ``turns`` that have at most ``most`` bytes together."""
    first, size = len(turns), 0
    while first and size + turn_bytes(turns[first - 1]) <= most:
        first -= 1
        size += turn_bytes(turns[first])
    return list(turns[first:])


def halved(turns: Sequence[Turn]) -> list[Turn]:
    """The newest turns, about half of the bytes: fewer than before in any case."""
    return within(turns[1:], sum(map(turn_bytes, turns)) // 2)


def turn_bytes(turn: Turn) -> int:
    return len(turn.prompt.encode(errors="replace")) + len(turn.reply.encode(errors="replace"))


def body(config: ChatRunner, prompt: str, turns: Sequence[Turn], begun: str = "") -> dict[str, Any]:
    """``begun``: what the endpoint is to go on with, of a runner with ``prefill``."""
    messages = [{"role": "system", "content": config.system}] if config.system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.reply})
    messages.append({"role": "user", "content": prompt})
    asked = {"model": config.model, "stream": True}
    if config.api == "responses":
        stored = {"background": True, "store": True} if config.background else {}
        return {**asked, "input": messages, **stored}
    if begun and config.prefill is not None:
        return {**asked, **prefilled(config.prefill, messages, begun)}
    return {**asked, "messages": messages}
