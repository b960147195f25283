"""A turn: its calls, until one of them is a reply."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from contextlib import aclosing

import trio

from .....config.schema import ChatRunner
from .....protocol.errors import RunFailed
from .....protocol.model import Outcome, RunSpec, Status
from ....host.http_trust import tls_context
from ..protocol import ALONE, Emit, Surroundings, Turn
from . import request
from .call import Call, Silence
from .exchange import Background, Exchange, begin, read_state
from .failures import CallFailed
from .reply import Reply
from .retries import Patience

log = logging.getLogger("runctld.chat")

#: The longest reply: it is held in memory, and stored.
MAX_REPLY_BYTES = 16 * 1024 * 1024
#: Reads of a runner's key file at once. One that hangs keeps its thread for good, and what other
#: parts of the daemon do in threads must not wait for that.
KEY_READS = 4
#: For telling the endpoint to stop, seconds.
CANCEL_LIMIT = 5.0


class Chat:
    """Runs turns against one configured endpoint. What is to be said beside the reply goes
    to the stream "stderr", so that "text" is the reply and nothing else."""

    def __init__(self, config: ChatRunner) -> None:
        self._config = config
        self._key_reads = trio.CapacityLimiter(KEY_READS)

    async def run(
        self,
        spec: RunSpec,
        attempt: int,
        emit: Emit,
        history: Sequence[Turn],
        around: Surroundings = ALONE,
    ) -> Outcome:
        """Succeeds with the whole reply once the endpoint says that it is complete."""
        config = self._config
        if not spec.prompt:
            raise RunFailed(
                f"runner {config.name!r} needs a prompt; submit one:"
                f" runctl submit THREAD --runner {config.name} PROMPT"
            )
        tls = await tls_context()
        target = request.Target(config, await request.read_key(config, self._key_reads))
        exchange = await begin(config, target, spec.prompt, around.resumption)
        try:
            notes = await self._converse(target, tls, exchange, emit, history, around)
        except BaseException as error:
            # Not where it is left to a replay, which asks for the same response.
            if isinstance(error, RunFailed) or around.is_aborted():
                with trio.CancelScope(shield=True):
                    await _cancel(exchange, tls)
            raise
        reply = "".join(exchange.shown)
        return Outcome(Status.SUCCEEDED, reply=reply, note="; ".join(notes) or None)

    async def give_up(self, checkpoint: bytes) -> None:
        """Have the endpoint end what an attempt that is dead has begun, and stored so."""
        config, state = self._config, read_state(checkpoint)
        if not config.background or state is None:
            return
        try:
            tls = await tls_context()
            target = request.Target(config, await request.read_key(config, self._key_reads))
            await _cancel(Background(config, target, "", "", state), tls)
        except RunFailed as error:
            log.warning("the endpoint was not told to stop: %s", error)

    async def _converse(
        self,
        target: request.Target,
        tls: ssl.SSLContext,
        exchange: Exchange,
        emit: Emit,
        history: Sequence[Turn],
        around: Surroundings,
    ) -> list[str]:
        """Calls, until one is the reply, or the rest of it: what is to be said of it."""
        config = self._config
        turns = sent = request.newest(config, history)
        patience = Patience(config.retry)
        said, more = "", []
        while True:
            there = len(exchange.shown)
            try:
                notes = await self._call(target, tls, exchange, turns, emit, around)
                break
            except CallFailed as failure:
                if failure.full and turns:
                    turns = request.halved(turns)
                    log.warning("%s; sent again with %d earlier turns", failure, len(turns))
                    await _say(emit, f"{failure}; sent again with {len(turns)} earlier turns")
                    continue
                if (failure.cannot or failure.full) and exchange.begin_anew():
                    log.warning("%s; asked anew", failure)
                    more = [f"the endpoint did not go on where it was interrupted: {failure}"]
                    continue
                if len(exchange.shown) > there:
                    patience, said = Patience(config.retry), ""
                wait = patience.wait(failure)
                if str(failure) != said:  # not each time: watchers get every line
                    said = str(failure)
                    log.warning("%s; tried again for up to %g s", failure, patience.most)
                    await _say(emit, f"{failure}; trying again for up to {patience.most:g} s")
            await trio.sleep(wait)
        if len(turns) < len(sent):
            more.append(
                f"the endpoint's context was full: {len(sent) - len(turns)} of {len(sent)} earlier"
                " turns were left out"
            )
        return notes + more

    async def _call(
        self,
        target: request.Target,
        tls: ssl.SSLContext,
        exchange: Exchange,
        turns: list[Turn],
        emit: Emit,
        around: Surroundings,
    ) -> list[str]:
        """One call, and what is to be said of its reply. Raises CallFailed as long as nothing of
        the reply was emitted, or it can go on; else RunFailed."""
        timeout = self._config.timeout
        given = Given(exchange, emit, around)
        with Silence(timeout) as silence:
            ask = exchange.ask(turns)
            call = Call(target, tls, silence, exchange.expect())
            try:
                async with aclosing(call.texts(ask)) as texts:
                    async for text in texts:
                        silence.pause()
                        await given.give(call.reply, exchange.sift(text))
                        silence.event(call.reply.complete)
            except CallFailed as failure:
                raise given.weigh(call.reply, failure) from None
        try:
            if silence.over and not call.reply.complete:
                what = f"timed out: silent for {timeout:g} s" + (" in mid-reply" if given else "")
                raise call.reply.failed(what, passing=exchange.waits)
            rest = exchange.sift(call.reply.rest())
            notes = call.reply.conclude(call.cut)
        except CallFailed as failure:
            raise given.weigh(call.reply, failure) from None
        await given.end(call.reply, rest + exchange.rest())
        return notes


class Given:
    """What one call gives away of the reply. True, once that is something."""

    def __init__(self, exchange: Exchange, emit: Emit, around: Surroundings) -> None:
        self._exchange = exchange
        self._emit = emit
        self._around = around
        self._size = sum(len(text.encode()) for text in exchange.shown)
        self._any = False

    def __bool__(self) -> bool:
        return self._any

    async def give(self, reply: Reply, text: str) -> None:
        """Emit what is new. Raises CallFailed, when the reply is too long."""
        data = text.encode()
        if (text or reply.named) and self._exchange.void:
            self._start_over()
        self._size += len(data)
        if self._size > MAX_REPLY_BYTES:
            raise reply.failed(
                f"the reply is longer than {MAX_REPLY_BYTES // 1024**2} MiB;"
                " limit it at the endpoint"
            )
        state = self._exchange.find_state(reply)
        if reply.named:
            reply.named = False
            if state is not None:
                await self._around.checkpoint(state)
        if not text:
            return
        self._exchange.shown.append(text)
        self._any = True
        if state is None:
            await self._emit("text", data)
        else:
            await self._around.emit_with("text", data, state)

    async def end(self, reply: Reply, rest: str) -> None:
        if self._exchange.void:
            self._start_over()
        await self.give(reply, rest)

    def weigh(self, reply: Reply, failure: CallFailed) -> RunFailed:
        """What the failure of the call is for the turn."""
        self._exchange.find_state(reply)
        if not self._any or (self._exchange.goes_on and not failure.full):
            return failure
        return RunFailed(str(failure))

    def _start_over(self) -> None:
        if self._exchange.shown:
            self._around.start_over()
        self._exchange.shown.clear()
        self._exchange.void, self._size = False, 0


async def _cancel(exchange: Exchange, tls: ssl.SSLContext) -> None:
    why: str | None = f"it has not answered for {CANCEL_LIMIT:g} s"
    with trio.move_on_after(CANCEL_LIMIT):
        why = await exchange.cancel(tls)
    if why is not None:
        log.warning("the endpoint was not told to stop: %s", why)


async def _say(emit: Emit, text: str) -> None:
    await emit("stderr", f"runctl: {text}\n".encode(errors="replace"))
