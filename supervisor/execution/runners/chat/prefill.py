"""The beginning of a reply, as the endpoint is told to go on with it, and what it repeats of that.

vLLM and SGLang continue the last message when they are asked to; Mistral and DeepSeek when that
message says that it is a prefix; llama.cpp always, when the last message is the assistant's.
"""

from __future__ import annotations

from typing import Any

#: Of the message, and of the request, for each style.
_IN_MESSAGE: dict[str, dict[str, Any]] = {
    "mistral": {"prefix": True},
    "deepseek": {"prefix": True},
}
_IN_REQUEST: dict[str, dict[str, Any]] = {
    "vllm": {"add_generation_prompt": False, "continue_final_message": True, "echo": False},
}
#: An answer that begins with so many characters of what was sent repeats it. Fewer may be its own:
#: "ha" goes on with "ha". Mistral repeats what it was sent, however short.
_LEAST = {"mistral": 1}
LEAST = 32


def prefilled(style: str, messages: list[dict[str, Any]], begun: str) -> dict[str, Any]:
    """``messages`` and what else a request holds. White space at the end is not sent: templates
    drop it, or refuse it."""
    last = {"role": "assistant", "content": begun.rstrip(), **_IN_MESSAGE.get(style, {})}
    return {"messages": [*messages, last], **_IN_REQUEST.get(style, {})}


class Repetition:
    """Takes away from the beginning of an answer what it repeats of ``begun``: ``take`` each
    piece, then ``rest``."""

    def __init__(self, style: str, begun: str) -> None:
        sent = begun.rstrip()
        self._sent = sent if len(sent) >= _LEAST.get(style, LEAST) else ""
        self._white = begun[len(sent) :]
        self._held = ""

    def take(self, text: str) -> str:
        """What of it, and of what was held back, is new."""
        text, self._held = self._held + text, ""
        if self._sent:
            if self._sent.startswith(text) and text != self._sent:
                self._held = text
                return ""
            text = text.removeprefix(self._sent)
            self._sent = ""
        while text and self._white:
            if text[0] != self._white[0]:
                self._white = ""
                break
            text, self._white = text[1:], self._white[1:]
        return text

    def rest(self) -> str:
        """What was held back in vain, of an answer that is over: it repeats nothing as a whole."""
        text, self._held, self._sent = self._held, "", ""
        return self.take(text)
