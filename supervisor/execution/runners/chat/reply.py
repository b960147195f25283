"""Events -> text, and whether they were a whole reply.

Nothing that was not understood is a success: a stream without text succeeds only when it says
itself that the model had nothing to say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from .body import Event
from .failures import CallFailed, refused
from .request import Target

#: Of ``finish_reason``, in lower case. Said by OpenAI, vLLM, llama.cpp, Ollama, TGI,
#: Anthropic, Gemini, Mistral, DeepSeek, Zhipu, OpenRouter and LiteLLM.
WHOLE = frozenset(
    [
        "stop",
        "eos",
        "eos_token",
        "end_turn",
        "stop_sequence",
        "complete",
        "completed",
        "done",
        "finished",
        "end",
        "finish_reason_stop",
    ]
)
TOOLS = frozenset(["tool_calls", "tool_call", "function_call", "tool_use"])
CUT = re.compile(r"length|max_\w*tokens|max_output|token_limit|truncated|context_window", re.I)
#: Also what none of them says today, if it sounds like it.
BROKEN = re.compile(
    r"error|abort|cancel|fail|filter|safety|block|prohibited|recitation|spii|malformed|refus"
    r"|insufficient|time_?out|interrupt|overload|incomplete|disconnect|exhaust|moderat|polic"
    r"|sensitive|guardrail|^other$|^language$",
    re.I,
)
_NONE = ("", "null", "none")
_MEDIA = ("audio", "images", "image", "video")
#: What a delta or a message may hold beside its content.
_BESIDE = (
    *("role", "content", "refusal", "tool_calls", "function_call", "name", "id", "index"),
    *("type", "annotations", "logprobs", "token_ids"),
)
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")


class Reply:
    """One reply, as it comes: ``take`` each event, then ``conclude``."""

    def __init__(self, target: Target, *, begun: bool = False) -> None:
        """``begun``: an earlier answer has its beginning, so that this one may hold no text."""
        self._target = target
        self._begun = begun
        self._pieces: list[str] = []
        self._held = ""  # the first half of a surrogate pair
        self._deltas = False
        self._index: object = None
        self._unknown: str | None = None
        self._choices = False
        self._refusal = ""
        self._found: set[str] = set()
        self._odd: set[str] = set()  # what is not known, and may have been the reply
        #: Whether there was any event, be it one that is not understood.
        self.heard = False
        self.done = False
        #: The last finish_reason, as it was written.
        self.finish: str | None = None
        #: Text came after a finish_reason, so that they mean nothing here.
        self._late = False
        self.replaced = False
        #: The endpoint broke the reply off, and how it said so.
        self.broken: str | None = None
        #: It has a name by now by which it can be asked for, that nobody has taken note of.
        self.named = False

    @property
    def complete(self) -> bool:
        """Whether the endpoint has said that this is all, as far as it can be believed."""
        return self.done or (self.finish is not None and not self._late)

    @property
    def holds(self) -> bool:
        """Whether something was held back for its second half."""
        return bool(self._held)

    @property
    def began(self) -> bool:
        return bool(self._pieces)

    def failed(self, reason: str, *, passing: bool = False) -> CallFailed:
        return CallFailed(f"{self._target.shown}: {reason}", passing=passing)

    def take(self, event: Event) -> tuple[str, bool]:
        """(its text, whether it is a part of a reply). Raises CallFailed."""
        if event.name == "error":
            self.heard = True
            raise self._reported(event.data)
        if not event.data.strip():
            return "", False
        self.heard = True
        if event.data.lstrip().startswith("[DONE]"):
            self.done = True
            return "", True
        value = self._parsed(event)
        if self._is_error(value):
            raise self._reported(event.data)
        choices = value.get("choices")
        if choices is None or choices == []:
            if self._unknown is None and "usage" not in value:
                self._unknown = event.data
            return "", "usage" in value
        if not isinstance(choices, list):
            raise self._malformed("choices is no list", event.data)
        text = ""
        for choice in choices:
            text += self._choice(choice, value.get("object"), event.data)
        return self._sound(text), True

    def rest(self) -> str:
        """What was held back for its second half, which has not come."""
        held, self._held = self._held, ""
        if held:
            self.replaced = True
            self._pieces.append("\ufffd")
        return "\ufffd" if held else ""

    def conclude(self, cut: str | None = None) -> list[str]:
        """What is to be said of the reply although it is one. ``cut``: why the answer ended
        early. Raises CallFailed, when it is none."""
        if cut is not None and not self.complete:
            what = "the stream was cut mid-way" if self.began else "no usable answer"
            raise self.failed(f"{what} ({cut})", passing=True)
        if self._refusal:
            raise self.failed(f"refused: {self._target.words.clean(self._refusal)}")
        limited = self.finish is not None and CUT.search(self.finish) is not None
        if not self._pieces and not (self._begun and self.complete):
            return [self._nothing(limited)]
        if not self.done and self.finish is None and self._deltas:
            what = "the stream was cut mid-way (it ended without [DONE] or finish_reason)"
            raise self.failed(what, passing=True)
        notes = []
        if limited:
            notes.append(f"the reply was cut at a length limit (finish_reason {self.finish})")
        elif self.finish is not None and self.finish.lower() not in WHOLE | TOOLS:
            said = self._target.words.clean(self.finish)
            notes.append(f"the reply ended for a reason that is not known: {said}")
        if "tool calls" in self._found:
            notes.append("the reply also holds tool calls, which chat runs cannot make")
        if others := sorted(self._found - {"tool calls", "reasoning"}):
            notes.append(f"the reply also holds {' and '.join(others)}, left out here")
        if self.replaced:
            notes.append("parts of the reply were no valid text and stand as U+FFFD")
        return notes

    def _nothing(self, limited: bool) -> str:
        """Of a reply without text: a note, or the failure."""
        if "tool calls" in self._found:
            raise self.failed("the reply holds tool calls, which chat runs cannot make")
        if "reasoning" in self._found:
            why = f", cut at a length limit (finish_reason {self.finish})" if limited else ""
            raise self.failed(f"the reply holds only reasoning, no text{why}")
        if self._found:
            raise self.failed(f"the reply holds only {' and '.join(sorted(self._found))}, no text")
        if limited:
            raise self.failed(
                f"the reply was cut at a length limit before its first word"
                f" (finish_reason {self.finish})"
            )
        if self._odd:
            said = self._target.words.clean(", ".join(sorted(self._odd)))
            raise self.failed(f"the reply holds no text, only what is not known: {said}")
        if self._choices and self.finish is not None:
            return "the reply is empty"
        if self._unknown is not None:
            said = self._target.words.clean(self._unknown)
            raise self.failed(f"the answer is no chat completion: {said}")
        if self.done and not self._choices:
            raise self.failed("the stream ended without a reply: it holds only its end, [DONE]")
        what = "text and finish_reason" if self._choices else "a reply"
        if self.done:
            raise self.failed(f"the stream ended without {what}")
        # As from a server that was ended before its first word.
        raise CallFailed(f"{self._target.shown}: the stream ended without {what}", doubtful=True)

    # ---- one event --------------------------------------------------------------

    def _parsed(self, event: Event) -> dict[str, Any]:
        try:
            value = json.loads(event.data)
        except (ValueError, RecursionError) as error:
            words = self._target.words.clean(str(error))
            if event.last and _is_cut(error, event.data):
                raise self.failed(f"the stream was cut mid-way, amid an event ({words})") from None
            raise self._malformed(words, event.data) from None
        if isinstance(value, list) and len(value) == 1:  # so Gemini sends its errors
            value = value[0]
        if not isinstance(value, dict):
            raise self._malformed("an object is expected", event.data)
        return value

    def _malformed(self, why: str, data: str) -> CallFailed:
        said = self._target.words.clean(data)
        return self.failed(f"malformed event in the stream ({why}): {said}")

    def _reported(self, data: str) -> CallFailed:
        words = self._target.words.message(data)
        text = f"{self._target.shown}: the endpoint reported an error: {words}"
        return refused(text, data)

    def _is_error(self, value: dict[str, Any]) -> bool:
        if value.get("error") or value.get("error_code") or value.get("errors"):
            return True
        if "error" in (value.get("object"), value.get("type")) or value.get("success") is False:
            return True
        base = value.get("base_resp")
        if isinstance(base, dict) and base.get("status_code"):
            return True
        if value.get("choices"):
            return False
        said = any(value.get(name) for name in ("message", "msg", "error_msg"))
        status = value.get("status")
        failed = value.get("code") not in (None, 0, "0", 200, "200", "") or (
            status in ("error", "failed", "failure") or _at_least(status, 400)
        )
        return bool(value.get("detail")) or bool(value.get("error_msg")) or (said and failed)

    def _choice(self, choice: object, kind: object, data: str) -> str:
        if not isinstance(choice, dict):
            raise self._malformed("a choice is no object", data)
        if choice.get("error"):
            raise self._reported(json.dumps(choice["error"]))
        index = choice.get("index") or 0
        if self._index is None:
            self._index = index
        if index != self._index:
            return ""
        self._choices = True
        delta, message = choice.get("delta"), choice.get("message")
        text = ""
        if delta is not None and not isinstance(delta, dict):
            raise self._malformed("delta is no object", data)
        if delta:
            text = self._content(delta, data)
            self._deltas = True
        elif isinstance(message, dict):
            text = self._whole(self._content(message, data), kind)
        elif isinstance(choice.get("text"), str):
            text = choice["text"]
            self._deltas = True
        elif delta is None and message is not None:
            raise self._malformed("message is no object", data)
        elif isinstance(choice.get("content"), str) and choice["content"]:
            self._odd.add("content outside of delta")
        finish = choice.get("finish_reason")
        if finish is not None and finish is not False:
            said = finish if isinstance(finish, str) else json.dumps(finish)
            if said.strip().lower() not in _NONE:
                self._finished(said.strip(), again=bool(text))
        if text and self.finish is not None and finish is None:
            self._late = True
        return text

    def _finished(self, said: str, *, again: bool) -> None:
        if self.finish is not None and again:
            self._late = True
        self.finish = said
        if BROKEN.search(said) and not CUT.search(said):
            self.broken = said
        if said.lower() in TOOLS:
            self._found.add("tool calls")

    def _whole(self, text: str, kind: object) -> str:
        """The text of a message where a delta is expected: all of the reply; what deltas
        have said already; or a piece of it, which is told from all only by the others."""
        so_far = "".join(self._pieces)
        if not so_far or not text:
            self._deltas = self._deltas or kind == "chat.completion.chunk"
            return text
        if text == so_far and self._deltas and kind != "chat.completion.chunk":
            return ""
        if kind == "chat.completion" or text.startswith(so_far):
            raise self.failed("the stream repeats its reply in a way that is not understood")
        self._deltas = True
        return text

    def _content(self, part: dict[str, Any], data: str) -> str:
        if isinstance(part.get("refusal"), str):
            self._refusal += part["refusal"]
        if part.get("tool_calls") or part.get("function_call"):
            self._found.add("tool calls")
        if any(part.get(name) for name in _REASONING):
            self._found.add("reasoning")
        self._found.update(name for name in _MEDIA if part.get(name))
        self._odd.update(k for k, v in part.items() if v and k not in _BESIDE)
        content = part.get("content")
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else [content]
        return "".join(self._part(p, data) for p in parts)

    def _part(self, part: object, data: str) -> str:
        """One of several parts of a content."""
        if isinstance(part, str):
            return part
        if not isinstance(part, dict):
            raise self._malformed("a part of the content is no object", data)
        kind, text = part.get("type"), part.get("text")
        if isinstance(text, dict):
            text = text.get("value")
        if isinstance(text, str) and kind in (None, "text", "output_text", "text_delta"):
            return text
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            self._refusal += part["refusal"]
        elif kind in ("thinking", "reasoning"):
            self._found.add("reasoning")
        elif kind in ("tool_use", "tool_call", "function"):
            self._found.add("tool calls")
        elif isinstance(kind, str):
            self._found.add(self._target.words.clean(kind))
        else:
            raise self._malformed("a part of the content has no type", data)
        return ""

    def _sound(self, text: str) -> str:
        """``text`` as it can be stored. JSON may escape a character beyond U+FFFF as two
        halves, and an endpoint may cut between them; half a character is none."""
        text = self._held + text
        self._held = ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._held = text[:-1], text[-1]
        if any("\ud800" <= c <= "\udfff" for c in _odd(text)):
            raw = text.encode("utf-16-le", "surrogatepass")
            sound = raw.decode("utf-16-le", "replace")
            self.replaced = self.replaced or sound.count("\ufffd") > text.count("\ufffd")
            text = sound
        if text:
            self._pieces.append(text)
        return text


def _odd(text: str) -> Iterable[str]:
    """Nothing of a text that can be encoded, which almost every one can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text
    return ""


def _is_cut(error: Exception, data: str) -> bool:
    """Whether ``data`` is the beginning of JSON."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated") or error.pos >= len(data.rstrip())


def _at_least(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least
