"""The ``chat`` runner: a streamed completion from an OpenAI-compatible endpoint.

Whatever goes wrong ends as a RunFailed that names the endpoint and the reason. The
endpoint's own words are untrusted: they are shortened, stripped of control characters
(they end on an operator's terminal) and of our secrets (some servers echo the key).
"""

from __future__ import annotations

import json
import math
import re
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

from ...config.schema import ChatRunner
from ..errors import RunFailed
from ..model import Outcome, RunSpec, Status
from ..windows import Window
from .protocol import Emit, Turn

if TYPE_CHECKING:
    import httpx

#: How much of an error body is read, and how much of it is quoted.
BODY_BYTES = 16 * 1024
MAX_WORDS = 64 * 1024
EXCERPT_CHARS = 200
#: Longest event, and longest reply: both are held in memory, and replies are stored.
MAX_EVENT_CHARS = 4 * 1024 * 1024
MAX_REPLY_BYTES = 16 * 1024 * 1024


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: Any = None


_T = TypeVar("_T")
_event_decoder = msgspec.json.Decoder(_Event)


class Chat:
    """Runs turns against one configured endpoint."""

    def __init__(self, config: ChatRunner) -> None:
        self._config = config

    async def run(
        self,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        history: Sequence[Turn],
        window: Window | None = None,
    ) -> Outcome:
        """Succeeds with the whole reply once the endpoint says that it is complete."""
        if not spec.prompt:
            raise RunFailed(
                f"runner {self._config.name!r} needs a prompt; submit one:"
                f" runctl submit THREAD --runner {self._config.name} PROMPT"
            )
        tls = await _tls()
        import httpx

        call = _Call(self._config, await self._key(), httpx)
        messages = _messages(self._config, spec.prompt, history)
        reply: list[str] = []
        size = 0
        with trio.CancelScope() as silence:
            silence.deadline = trio.current_time() + self._config.timeout
            async with aclosing(call.deltas(messages, tls)) as deltas:
                async for text in deltas:
                    # The endpoint is not to blame for the time that our stream takes.
                    silence.deadline = math.inf
                    if text:
                        data = text.encode()
                        size += len(data)
                        if size > MAX_REPLY_BYTES:
                            raise call.failed(
                                f"the reply is longer than {MAX_REPLY_BYTES // 1024**2} MiB;"
                                " limit it at the endpoint"
                            )
                        reply.append(text)
                        await emit("text", data)
                    silence.deadline = trio.current_time() + self._config.timeout
        if silence.cancelled_caught:
            raise call.failed(
                f"timed out: silent for {self._config.timeout:g} s"
                + (" in mid-reply" if reply else "")
            )
        return Outcome(Status.SUCCEEDED, reply="".join(reply))

    async def _key(self) -> str | None:
        """The API key, read anew so that it may be rotated."""
        file = self._config.api_key_file
        if self._config.api_key is not None or file is None:
            return _usable(self._config.api_key, "api_key")
        try:
            key = await trio.Path(file).read_text("utf-8")
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


def _messages(config: ChatRunner, prompt: str, history: Sequence[Turn]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": config.system}] if config.system else []
    for turn in history[-config.history :] if config.history > 0 else ():
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.reply})
    return [*messages, {"role": "user", "content": prompt}]


class _Call:
    """One request: its target, its secrets, and the words for what went wrong."""

    def __init__(self, config: ChatRunner, key: str | None, httpx: Any) -> None:
        self._config = config
        self._key = key
        self._httpx = httpx
        try:
            base = httpx.URL(config.base_url)
            if base.scheme not in ("http", "https") or not base.host:
                raise ValueError
        except (httpx.InvalidURL, ValueError):
            raise RunFailed(
                f"base_url of runner {config.name!r} is not an http:// or https:// URL"
            ) from None
        self._url = base.copy_with(path=base.path.rstrip("/") + "/chat/completions")
        # Credentials and keys travel in the user part and in the query.
        self._shown = _shown(self._url)
        secrets = {key, base.password or None, *(v for _, v in base.params.multi_items())}
        self._secrets = [s for s in secrets if s]

    def failed(self, reason: str) -> RunFailed:
        return RunFailed(f"{self._shown}: {reason}")

    async def deltas(
        self, messages: list[dict[str, str]], tls: ssl.SSLContext
    ) -> AsyncGenerator[str, None]:
        """The reply's pieces, "" for an event without text; ends when it is complete.

        Raises: RunFailed."""
        import httpx

        began = False
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",  # a compressed answer has no bound that we can see
            "Cache-Control": "no-store",
        }
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            # The caller's deadline covers every wait, back-pressure excepted.
            async with (
                httpx.AsyncClient(verify=tls, timeout=None, follow_redirects=False) as client,
                client.stream(
                    "POST",
                    self._url,
                    json={"model": self._config.model, "messages": messages, "stream": True},
                    headers=headers,
                    # Without this, credentials in the URL would replace the key.
                    auth=_keep_headers if self._key is not None else httpx.USE_CLIENT_DEFAULT,
                ) as response,
            ):
                await self._check(response)
                async with aclosing(self._events(response)) as events:
                    async for text in events:
                        began = True
                        yield text
        except httpx.ConnectError as error:
            raise self.failed(
                f"cannot connect ({self._clean(str(error))}); is the server up, and base_url right?"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # of a redirect, though not followed
            reason = self._clean(str(error)) or type(error).__name__
            if began:
                raise self.failed(f"the stream was cut mid-way ({reason})") from None
            raise self.failed(f"no usable answer ({reason})") from None

    async def _check(self, response: httpx.Response) -> None:
        """Raises RunFailed unless the answer is an event stream."""
        status = f"answered {response.status_code} {self._clean(response.reason_phrase)}".rstrip()
        if response.is_redirect:
            try:
                target = _shown(response.url.join(response.headers["location"]))
            except (KeyError, self._httpx.InvalidURL):
                target = "nowhere"
            raise self.failed(
                f"{status}, a redirect to {self._clean(target)}; redirects are not followed:"
                " set base_url to where the endpoint is"
            )
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        plain = coding in ("", "identity")
        if response.is_success and not plain:
            raise self.failed(
                f"{status}, but compressed ({self._clean(coding)}), which was not asked for:"
                " switch compression off at the endpoint"
            )
        if response.is_success and kind == "text/event-stream":
            return
        if response.is_success:
            found = self._clean(kind) or "no content type"
            status = f"answered with {found}, where text/event-stream is expected"
        excerpt = await self._excerpt(response) if plain else ""
        raise self.failed(f"{status}: {excerpt}" if excerpt else status)

    async def _events(self, response: httpx.Response) -> AsyncGenerator[str, None]:
        from httpx_sse import EventSource, ServerSentEvent

        response.encoding = "utf-8"  # an event stream is, whatever the header says
        sse: ServerSentEvent
        source: Any = _Bounded(response, self)
        async with _unwinding(EventSource(source).aiter_sse()) as events:
            async for sse in events:
                if sse.data.strip() == "[DONE]":
                    return
                if sse.event == "error":
                    raise self.failed(f"the endpoint reported an error: {self._words(sse.data)}")
                if not sse.data:
                    continue
                text, finish = self._read(sse.data)
                yield text
                if finish:
                    return
        raise self.failed("the stream was cut mid-way (it ended without [DONE] or finish_reason)")

    def _read(self, data: str) -> tuple[str, bool]:
        """(text, whether the reply is complete) of one event. Raises RunFailed."""
        try:
            event = _event_decoder.decode(data)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise self.failed(
                f"malformed event in the stream ({self._clean(str(error))}): {self._clean(data)}"
            ) from None
        if event.error:
            raise self.failed(f"the endpoint reported an error: {self._words(data)}")
        if not event.choices:
            return "", False
        choice = event.choices[0]
        # "length" is a complete answer under the endpoint's own limit.
        if choice.finish_reason in ("content_filter", "error"):
            raise self.failed(f"the endpoint ended the reply: {choice.finish_reason}")
        return (choice.delta.content or "" if choice.delta else ""), bool(choice.finish_reason)

    async def _excerpt(self, response: httpx.Response) -> str:
        """What an error body says, bounded in size and, as the rest, in time."""
        body = b""
        async with _unwinding(response.aiter_bytes()) as parts:
            async for part in parts:
                body += part
                if len(body) >= BODY_BYTES:
                    # The cut may have gone through an echoed key: drop that much.
                    longest = max((len(s) for s in self._secrets), default=0)
                    body = body[: BODY_BYTES - 3 * longest]
                    break
        return self._words(body.decode("utf-8", "replace"))

    def _words(self, text: str) -> str:
        """The message inside an error document, else the text itself; cleaned."""
        try:
            found = msgspec.json.decode(text)
            for _ in range(2):  # {"error": {"message": "..."}}, or less of it
                for name in ("error", "message", "detail"):
                    if isinstance(found, dict) and isinstance(found.get(name), str | dict):
                        found = found[name]
                        break
            if isinstance(found, str):
                text = found
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            pass
        return self._clean(text)

    def _clean(self, text: str) -> str:
        """One short printable line without our secrets."""
        for secret in self._secrets:
            for form in (secret, json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe="")):
                text = text.replace(form, "[redacted]")
        text = text[:MAX_WORDS]  # not before: a secret must not be cut
        text = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).strip()
        return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 3] + "..."


class _Bounded:
    """A response as httpx-sse reads it, which fails once an event grows too long: neither
    lines nor events have a limit there."""

    def __init__(self, response: httpx.Response, call: _Call) -> None:
        self.headers = response.headers
        self._response = response
        self._call = call

    async def aiter_text(self) -> AsyncIterator[str]:
        size, end = 0, ""
        async with _unwinding(self._response.aiter_text()) as parts:
            async for part in parts:
                # An event ends with an empty line, which may be cut anywhere.
                seen = end + part
                last = max(seen.rfind(mark) for mark in ("\n\n", "\r\r", "\n\r\n"))
                size = size + len(part) if last < 0 else len(seen) - last
                if size > MAX_EVENT_CHARS:
                    raise self._call.failed(
                        f"an event of the stream is longer than {MAX_EVENT_CHARS // 1024**2} MiB"
                    )
                yield part
                end = seen[-2:]


@asynccontextmanager
async def _unwinding(body: AsyncIterator[_T]) -> AsyncIterator[AsyncIterator[_T]]:
    """Leaves nothing of ``body`` suspended. It is a chain of generators that httpx does
    not close from the outside in (aclose() reaches the outermost only, and trio warns of
    the others): a cancelled read ends them all from the inside out."""
    try:
        yield body
    finally:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                async for _ in body:
                    pass
            except Exception:
                pass  # what the rest of the body held no longer matters


def _shown(url: httpx.URL) -> str:
    """The URL without what may be secret in it."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


def _keep_headers(request: httpx.Request) -> httpx.Request:
    return request


_context: ssl.SSLContext | None = None


async def _tls() -> ssl.SSLContext:
    """The TLS context of all calls. The first one imports httpx and reads the system's
    certificates: 0.1 s, off the event loop, and not at the daemon's start."""
    global _context
    if _context is None:
        _context = await trio.to_thread.run_sync(_load_tls)
    return _context


def _load_tls() -> ssl.SSLContext:
    import httpx
    import httpx_sse  # noqa: F401

    return httpx.create_ssl_context()
