"""One HTTP request, and what may go wrong with it."""

from __future__ import annotations

import errno
import math
import os
import ssl
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import trio

from .....config.outgoing import proxy_problems
from ....host.failure_reasons import causes, tls_words, why
from ....host.http_trust import unusable
from .body import Body, TooLong, unwinding
from .failures import CallFailed, refused
from .reply import Reply
from .request import Ask, Target, shown

if TYPE_CHECKING:
    import httpx

EVENT_STREAM = "text/event-stream"
#: How much of an error body is read.
BODY_BYTES = 16 * 1024
#: Comments keep a connection alive, without an event, for so many time-outs.
COMMENTS = 10
#: After a finish_reason the rest of the answer is waited for so long, seconds: usage, [DONE].
#: Some endpoints say it in every event; some never close.
AFTER_FINISH = 15.0
#: And after [DONE], for the end of the answer.
AFTER_DONE = 1.0


class Silence:
    """How long the endpoint may say nothing: ``timeout`` seconds, any byte counting, and
    ``COMMENTS`` times that without an event. Use it as a context; ``over`` afterwards."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._scope = trio.CancelScope()
        self._most = math.inf
        self._after = math.inf
        self._events = trio.current_time() + COMMENTS * timeout
        self.heard()

    def __enter__(self) -> Silence:
        self._scope.__enter__()
        return self

    def __exit__(self, *why: Any) -> bool | None:
        return self._scope.__exit__(*why)

    @property
    def over(self) -> bool:
        return self._scope.cancelled_caught

    def heard(self) -> None:
        """Some bytes."""
        now = trio.current_time()
        self._scope.deadline = min(now + self._timeout, self._events, self._after)

    def event(self, complete: bool) -> None:
        """A part of a reply. ``complete``: and the last one, as it seems."""
        now = trio.current_time()
        self._events = now + COMMENTS * self._timeout
        self._after = now + AFTER_FINISH if complete else math.inf
        self.heard()

    def pause(self) -> None:
        """The endpoint is not to blame for the time that our own stream takes."""
        self._scope.deadline = math.inf


class Call:
    """One request. ``reply`` is what has come of its answer."""

    def __init__(self, target: Target, tls: ssl.SSLContext, silence: Silence, reply: Reply) -> None:
        self._target = target
        self._tls = tls
        self._silence = silence
        self.reply = reply
        #: Why the answer ended early.
        self.cut: str | None = None

    async def texts(self, ask: Ask) -> AsyncGenerator[str, None]:
        """The reply's pieces as they come, "" where there is something else to be stored of it;
        what ended an answer that had begun is in ``cut``.

        Raises: RunFailed, mostly CallFailed."""
        import httpx

        target = self._target
        answered = False
        try:
            # The caller's deadline covers every wait, back-pressure excepted.
            async with (
                _client(self._tls) as client,
                client.stream(
                    *(ask.method, ask.url),
                    json=ask.body,
                    **_identify(target),
                ) as response,
            ):
                self._silence.heard()
                await self._check(response)
                answered = True
                async with (
                    Body(response, self._silence.heard) as body,
                    aclosing(self._read(response, body)) as texts,
                ):
                    async for text in texts:
                        yield text
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # of a redirect, though not followed
            if not answered:
                raise self._unanswered(error) from None
            self.cut = target.words.clean(why(error))
        except (OSError, ValueError, OverflowError) as error:  # an address that is none
            none_left = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
            if answered or none_left:
                raise
            raise self._unanswered(error) from None

    async def _read(self, response: httpx.Response, body: Body) -> AsyncGenerator[str, None]:
        try:
            what = await body.look()
            kind = self._kind(response)
            if what == "other" and (kind != EVENT_STREAM or body.head.lstrip().startswith("<")):
                said = self._target.words.message(body.head)
                raise self._failed(f"{self._unexpected(response)}: {said}")
            reply = self.reply
            async with aclosing(body.documents() if what == "json" else body.events()) as events:
                async for event in events:
                    text, part = reply.take(event)
                    reply.replaced = reply.replaced or body.replaced
                    if part:
                        self._silence.event(reply.complete)
                    if text or reply.named:
                        yield text
                    if reply.broken is not None:
                        said = self._target.words.clean(reply.broken)
                        raise self._failed(f"the endpoint ended the reply: {said}")
                    if reply.done:
                        # Closed earlier, gateways would take us for a client that went away.
                        with trio.move_on_after(AFTER_DONE), suppress(Exception):
                            async for _ in events:
                                pass
                        break
            if not reply.heard and body.head.strip():
                raise self._failed(f"no event of a chat: {self._target.words.message(body.head)}")
        except TooLong as error:
            raise self._failed(str(error)) from None

    def _failed(self, reason: str) -> CallFailed:
        return self.reply.failed(reason)

    async def _check(self, response: httpx.Response) -> None:
        """Raises CallFailed unless there is an answer to be read."""
        words = self._target.words
        status = f"answered {response.status_code} {words.clean(response.reason_phrase)}".rstrip()
        if response.is_redirect:
            raise self._failed(
                f"{status}, a redirect to {words.clean(_redirected(response))}; redirects are not"
                " followed: set base_url to where the endpoint is"
            )
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        plain = coding in ("", "identity")
        if response.is_success and not plain:
            raise self._failed(
                f"{status}, but compressed ({words.clean(coding)}), which was not asked for:"
                " switch compression off at the endpoint"
            )
        if response.is_success:
            return
        said = await self._excerpt(response) if plain else ""
        excerpt = words.message(said)
        raise refused(
            f"{self._target.shown}: {status}" + (f": {excerpt}" if excerpt else ""),
            said,
            response.status_code,
            response.headers,
        )

    def _unexpected(self, response: httpx.Response) -> str:
        kind = self._target.words.clean(self._kind(response)) or "no content type"
        if kind == EVENT_STREAM:
            return "the answer is no event stream"
        return f"answered with {kind}, where {EVENT_STREAM} is expected"

    def _kind(self, response: httpx.Response) -> str:
        said: str = response.headers.get("content-type", "")
        return said.partition(";")[0].strip().lower()

    async def _excerpt(self, response: httpx.Response) -> str:
        """The beginning of an error body, bounded in size and, as the rest, in time."""
        import httpx

        found = b""
        async with unwinding(response.aiter_bytes()) as parts:
            with suppress(httpx.HTTPError):  # what was said until then says enough
                async for part in parts:
                    self._silence.heard()
                    found += part
                    if len(found) >= BODY_BYTES:
                        # The cut may have gone through an echoed key: drop that much.
                        found = found[: BODY_BYTES - 3 * self._target.words.longest_secret]
                        break
        return found.decode("utf-8", "replace")

    def _unanswered(self, error: Exception) -> CallFailed:
        """There was no answer."""
        import httpx

        shown, said = self._target.shown, self._target.words.clean(why(error))
        failure = next((e for e in causes(error) if isinstance(e, ssl.SSLError)), None)
        cut = ssl.SSLEOFError | ssl.SSLZeroReturnError
        if failure is not None and not isinstance(failure, cut):
            return CallFailed(f"{shown}: cannot connect: {_distrusted(failure)}")
        if isinstance(error, httpx.ProxyError):
            passing = said[:3] in ("429", "502", "503", "504")
            return CallFailed(
                f"{shown}: the proxy that runctld's environment names does not connect ({said})",
                passing=passing,
            )
        if isinstance(error, httpx.ConnectError):
            return CallFailed(
                f"{shown}: cannot connect ({said}); is the server up, and base_url right?",
                passing=True,
            )
        if isinstance(error, httpx.HTTPError):
            garbled = isinstance(error, httpx.RemoteProtocolError) and "disconnect" not in said
            passing = isinstance(error, httpx.TransportError) and not garbled
            passing = passing and not isinstance(error, httpx.UnsupportedProtocol)
            return CallFailed(f"{shown}: no usable answer ({said})", passing=passing)
        return CallFailed(f"{shown}: cannot connect ({said}); is base_url right?")


def _redirected(response: httpx.Response) -> str:
    import httpx

    try:
        return shown(response.url.join(response.headers["location"]))
    except (KeyError, httpx.InvalidURL):
        return "nowhere"


def _distrusted(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"{tls_words(error)}; name the CA's certificate in SSL_CERT_FILE in runctld's"
            " environment, or mend the endpoint's"
        )
    said = tls_words(error)
    return f"{said}; does base_url begin with the right one of http:// and https://?"


def _client(tls: ssl.SSLContext) -> httpx.AsyncClient:
    """Raises RunFailed, when the environment names a proxy that cannot be used."""
    import httpx

    try:
        return httpx.AsyncClient(verify=tls, timeout=None, follow_redirects=False)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise unusable(proxy_problems(os.environ), "proxies", error) from None


async def post(target: Target, tls: ssl.SSLContext, url: httpx.URL) -> str | None:
    """A request without a body, whose answer does not matter: None, or why it was refused."""
    import httpx

    try:
        async with _client(tls) as client:
            answer = await client.post(url, **_identify(target))
    except (httpx.HTTPError, OSError) as error:
        return target.words.clean(why(error))
    said = f"{answer.status_code} {target.words.clean(answer.reason_phrase)}"
    return None if answer.is_success else f"answered {said}".rstrip()


def _identify(target: Target) -> dict[str, Any]:
    import httpx

    # Without this, credentials in the URL would replace the key.
    auth = _keep_headers if target.key is not None else httpx.USE_CLIENT_DEFAULT
    return {"headers": target.headers, "auth": auth}


def _keep_headers(request: httpx.Request) -> httpx.Request:
    return request
