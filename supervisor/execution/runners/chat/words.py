"""What an endpoint says, as one line of a message of ours.

Its words are untrusted: they are shortened, stripped of control characters (they end on an
operator's terminal) and of our secrets (some servers echo the key)."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterable

MAX_WORDS = 64 * 1024
EXCERPT_CHARS = 200

#: Where error documents keep what they say, outermost first: {"error": {"message": "..."}},
#: {"detail": "..."}, {"base_resp": {"status_msg": "..."}}, or less of it.
_NAMES = ("error", "errors", "base_resp", "message", "detail", "error_msg", "error_message")
_INNER = ("msg", "status_msg", "text")


class Words:
    """``secrets`` are never shown."""

    def __init__(self, secrets: Iterable[str | None]) -> None:
        self._secrets = [secret for secret in secrets if secret]

    @property
    def longest_secret(self) -> int:
        return max((len(secret) for secret in self._secrets), default=0)

    def message(self, text: str) -> str:
        """The message inside an error document, else the text itself; clean."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return self.clean(text)
        said = _message(found)
        return self.clean(said if said is not None else text)

    def clean(self, text: str) -> str:
        """One short printable line without our secrets."""
        for secret in self._secrets:
            for form in (secret, json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe="")):
                text = text.replace(form, "[redacted]")
        text = text[:MAX_WORDS]  # not before: a secret must not be cut
        text = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).strip()
        return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 3] + "..."


def _message(found: object) -> str | None:
    for _ in range(4):
        if isinstance(found, list) and found:
            found = found[0]
        if not isinstance(found, dict):
            break
        for name in (*_NAMES, *_INNER):
            if isinstance(found.get(name), str | dict | list) and found[name]:
                found = found[name]
                break
        else:
            return None
    return found if isinstance(found, str) else None
