"""A turn's requests: what each asks for, and whether the next can go on where one was cut."""

from __future__ import annotations

import ssl
import urllib.parse

import msgspec

from .....config.schema import ChatRunner
from ..protocol import Resumption, Turn
from . import request
from .call import post
from .prefill import Repetition
from .reply import Reply
from .request import Ask, Target
from .response import Response


class Exchange:
    """Of an endpoint that cannot go on. ``shown``: the pieces of the reply that were given away.
    ``void``: they are no part of it any more, once something else is given."""

    def __init__(self, config: ChatRunner, target: Target, prompt: str, shown: str) -> None:
        self._config = config
        self._target = target
        self._prompt = prompt
        self.shown = [shown] if shown else []
        self.void = False

    @property
    def begun(self) -> str:
        return "" if self.void else "".join(self.shown)

    @property
    def goes_on(self) -> bool:
        """Whether a call that was cut, after some text, can be made again."""
        return False

    @property
    def waits(self) -> bool:
        """Whether an answer that fell silent can be listened to again."""
        return False

    def ask(self, turns: list[Turn]) -> Ask:
        body = request.body(self._config, self._prompt, turns, self.begun)
        return Ask("POST", self._target.url, body)

    def expect(self) -> Reply:
        """What reads the answer to ``ask``."""
        if self._config.api == "responses":
            return Response(self._target, lambda: self.begun)
        return Reply(self._target)

    def sift(self, text: str) -> str:
        """What of a piece of the answer is new."""
        return text

    def rest(self) -> str:
        """What was held back of a whole answer, and is new."""
        return ""

    def find_state(self, reply: Reply) -> bytes | None:
        """What the next attempt needs to go on behind what was given away."""
        return None

    def begin_anew(self) -> bool:
        """Whether the next call asks for another reply, where the endpoint does not go on."""
        return False

    def lose(self) -> None:
        """Some of what was given away is not stored any more."""
        self.void = True

    async def cancel(self, tls: ssl.SSLContext) -> str | None:
        """Have the endpoint end what it still does: None, or why that was not to be."""
        return None


class Prefilled(Exchange):
    """What was given away is sent as the beginning of the answer."""

    def __init__(self, config: ChatRunner, target: Target, prompt: str, shown: str) -> None:
        super().__init__(config, target, prompt, shown)
        self._repetition = Repetition("", "")
        self._refused = False

    @property
    def goes_on(self) -> bool:
        return not self._refused

    def expect(self) -> Reply:
        begun = self.begun
        self._repetition = Repetition(self._config.prefill or "", begun)
        return Reply(self._target, begun=bool(begun))

    def sift(self, text: str) -> str:
        return self._repetition.take(text)

    def rest(self) -> str:
        return self._repetition.rest()

    def begin_anew(self) -> bool:
        begun = bool(self.begun)
        self.void = self._refused = True
        return begun


class State(msgspec.Struct, frozen=True):
    """Of a checkpoint: the response's id, and the number of the last event of it that is stored."""

    response: str
    after: int


class Background(Exchange):
    """The endpoint goes on with a response while nobody listens: it is asked for again by its id,
    from the event on behind the last one that is stored."""

    def __init__(
        self, config: ChatRunner, target: Target, prompt: str, shown: str, state: State | None
    ) -> None:
        super().__init__(config, target, prompt, shown)
        self._state = state
        self._over = False
        self.void = state is None  # nobody knows what it was part of

    @property
    def goes_on(self) -> bool:
        return self._state is not None and not self._over

    @property
    def waits(self) -> bool:
        return self.goes_on

    def ask(self, turns: list[Turn]) -> Ask:
        if self._over:
            self.begin_anew()
        if self._state is None:
            return super().ask(turns)
        params = {"stream": "true"}
        if self._state.after >= 0:
            params["starting_after"] = str(self._state.after)
        return Ask("GET", self._target.at(self._path(), **params), None)

    def expect(self) -> Reply:
        after = None if self._state is None else self._state.after
        return Response(self._target, lambda: self.begun, after)

    def find_state(self, reply: Reply) -> bytes | None:
        assert isinstance(reply, Response)
        if reply.holds:  # half a character, which is lost with the next attempt
            return None
        self._over = reply.status is not None
        if reply.id is not None and reply.number is not None:
            self._state = State(reply.id, reply.number)
        elif self._state is not None and reply.number is not None:
            self._state = State(self._state.response, reply.number)
        return None if self._state is None else msgspec.json.encode(self._state)

    def begin_anew(self) -> bool:
        asked, self._state, self._over = self._state is not None, None, False
        self.void = self.void or bool(self.shown)
        return asked

    def lose(self) -> None:
        super().lose()
        if self._state is not None:  # all of its events come again
            self._state = State(self._state.response, -1)

    async def cancel(self, tls: ssl.SSLContext) -> str | None:
        if not self.goes_on:
            return None
        return await post(self._target, tls, self._target.at(f"{self._path()}/cancel"))

    def _path(self) -> str:
        assert self._state is not None
        return f"responses/{urllib.parse.quote(self._state.response, safe='')}"


async def begin(
    config: ChatRunner, target: Target, prompt: str, resumption: Resumption | None
) -> Exchange:
    """``resumption``: what an earlier attempt has stored, that the endpoint is to go on with."""
    shown, checkpoint, whole = "", None, True
    if resumption is not None:
        checkpoint = resumption.checkpoint
        shown, whole = await _read_shown(resumption)
    exchange: Exchange
    if config.background:
        exchange = Background(config, target, prompt, shown, read_state(checkpoint))
    elif config.prefill is not None:
        exchange = Prefilled(config, target, prompt, shown)
    else:
        exchange = Exchange(config, target, prompt, shown)
    if not whole:
        exchange.lose()
    return exchange


def read_state(checkpoint: bytes | None) -> State | None:
    try:
        return None if checkpoint is None else msgspec.json.decode(checkpoint, type=State)
    except (ValueError, RecursionError):  # another runner's
        return None


async def _read_shown(resumption: Resumption) -> tuple[str, bool]:
    """What is stored of the reply, and whether that is all of it: it may have been purged, or had
    to make room in the stream."""
    found, size = [], 0
    async for chunks in resumption.read_output():
        size += sum(len(chunk.data) for chunk in chunks)
        found += [chunk.data for chunk in chunks if chunk.stream == "text"]
    return b"".join(found).decode(errors="replace"), size == resumption.total
