"""Why a call failed, and whether another may do better.

The words are those of OpenAI, Azure, Anthropic, Gemini, Mistral, Groq, xAI, DeepSeek, Cohere,
Bedrock, OpenRouter, LiteLLM, vLLM, SGLang, TGI, llama.cpp, Ollama, LM Studio and TabbyAPI."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping

from .....protocol.errors import RunFailed

#: A server that starts, is overloaded or is being replaced says one of these, or a proxy
#: before it does: 520 to 530 are Cloudflare's, 529 is Anthropic's.
PASSING = frozenset({408, 425, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529, 530})
#: These may be the request's own doing as well: tried again a few times only, as the
#: ``openai`` package does.
DOUBTFUL = frozenset({409, 500})
FEW = 2
#: Of a request to go on: there is nothing to go on with, or the endpoint does no such thing.
CANNOT = frozenset({400, 404, 405, 410, 422, 501})

_PASSING = re.compile(
    r"overloaded|rate.?limit|too.?many.?requests|unavailable|loading.?model|model is loading"
    r"|server_is_busy|at capacity",
    re.I,
)
_NEVER = re.compile(
    r"insufficient_quota|current quota|insufficient (balance|credit|fund)|credit balance|billing",
    re.I,
)
#: Whatever the status is.
_FULL = re.compile(
    r"context_length_exceeded|exceed_context_size|context_?window_?exceeded|prompt_too_long"
    r"|string_above_max_length|context (length|window|size)|request_too_large|request too large"
    r"|too many (input |prompt |total )?tokens|(input|prompt) token count",
    re.I,
)
#: Of a request that was refused for what it holds.
_REFUSED = frozenset({200, 400, 413, 422, 500})
_PERHAPS_FULL = re.compile(
    r"(prompt|inputs?|messages?|conversation)\b.{0,100}\b(too (long|large)|exceed(s|ed)?\b"
    r"|longer than|greater than|must have less than|must be <=)"
    r"|maximum (prompt|input) length|max_seq_len|reduce the length|range of input length"
    r"|tokens?\b.{0,60}\bexceed",
    re.I | re.S,
)
#: A limit of what is asked for, not of what is sent along.
_NOT_FULL = re.compile(r"max_tokens is too large", re.I)
_TOO_LARGE = 413


class CallFailed(RunFailed):
    """``passing``: it may heal by itself; ``doubtful``: perhaps. ``after``: seconds that the
    endpoint asks to be left alone. ``full``: the endpoint's context is. ``cannot``: it does not
    know what is asked of it, or not that it ever was."""

    def __init__(
        self,
        message: str,
        *,
        passing: bool = False,
        doubtful: bool = False,
        after: float | None = None,
        full: bool = False,
        cannot: bool = False,
    ) -> None:
        super().__init__(message)
        self.passing = passing
        self.doubtful = doubtful
        self.after = after
        self.full = full
        self.cannot = cannot


def refused(
    message: str, said: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> CallFailed:
    """``said``: all that the endpoint said, to be looked at only. ``status`` 200: it said it in
    the answer's body."""
    headers = headers or {}
    never = bool(_NEVER.search(said)) or headers.get("x-should-retry") == "false"
    passing = status in PASSING or headers.get("x-should-retry") == "true"
    if status == 200:
        passing = bool(_PASSING.search(said)) or any(
            re.search(rf'"(code|status|status_code|error_code)"\s*:\s*"?{code}\b', said)
            for code in PASSING
        )
    full = status == _TOO_LARGE or (status not in (401, 403, 404) and bool(_FULL.search(said)))
    if not (full or passing) and status in _REFUSED:
        full = bool(_PERHAPS_FULL.search(said))
    full = full and not _NOT_FULL.search(said)
    may = not never and not full
    return CallFailed(
        message,
        passing=may and passing,
        doubtful=may and status in DOUBTFUL,
        after=retry_after(headers),
        full=full,
        cannot=may and status in CANNOT,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, of Retry-After (seconds or a date) or OpenAI's retry-after-ms; None when it is
    not said, or in no way that can be read."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None
