"""A turn: its calls, until one of them is a reply."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import trio

from .....config.schema import ChatRunner
from .....protocol.errors import RunFailed
from .....protocol.model import Outcome, RunSpec, Status
from ....host.http_trust import tls_context
from ..protocol import ALONE, Emit, Surroundings, Turn
from . import request
from .call import Call, Silence
from .failures import CallFailed
from .retries import Patience

log = logging.getLogger("runctld.chat")

#: The longest reply: it is held in memory, and stored.
MAX_REPLY_BYTES = 16 * 1024 * 1024
#: Reads of a runner's key file at once. One that hangs keeps its thread for good, and what other
#: parts of the daemon do in threads must not wait for that.
KEY_READS = 4


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
        turns = sent = request.newest(config, history)
        patience = Patience(config.retry)
        said = ""
        while True:
            try:
                reply, notes = await self._call(
                    target, tls, request.body(config, spec.prompt, turns), emit
                )
                break
            except CallFailed as failure:
                if failure.full and turns:
                    turns = request.halved(turns)
                    log.warning("%s; sent again with %d earlier turns", failure, len(turns))
                    await _say(emit, f"{failure}; sent again with {len(turns)} earlier turns")
                    continue
                wait = patience.wait(failure)
                if str(failure) != said:  # not each time: watchers get every line
                    said = str(failure)
                    log.warning("%s; tried again for up to %g s", failure, patience.most)
                    await _say(emit, f"{failure}; trying again for up to {patience.most:g} s")
            await trio.sleep(wait)
        if len(turns) < len(sent):
            notes.append(
                f"the endpoint's context was full: {len(sent) - len(turns)} of {len(sent)} earlier"
                " turns were left out"
            )
        return Outcome(Status.SUCCEEDED, reply=reply, note="; ".join(notes) or None)

    async def _call(
        self, target: request.Target, tls: ssl.SSLContext, body: dict[str, Any], emit: Emit
    ) -> tuple[str, list[str]]:
        """One call's reply, and what is to be said of it. Raises CallFailed as long as
        nothing of a reply was emitted, RunFailed from then on."""
        timeout = self._config.timeout
        reply: list[str] = []
        size = 0
        with Silence(timeout) as silence:
            call = Call(target, tls, silence)

            async def give(text: str) -> None:
                nonlocal size
                silence.pause()
                data = text.encode()
                size += len(data)
                if size > MAX_REPLY_BYTES:
                    raise call.reply.failed(
                        f"the reply is longer than {MAX_REPLY_BYTES // 1024**2} MiB;"
                        " limit it at the endpoint"
                    )
                reply.append(text)
                await emit("text", data)
                silence.event(call.reply.complete)

            try:
                async with aclosing(call.texts(body)) as texts:
                    async for text in texts:
                        await give(text)
            except CallFailed as failure:
                if reply:
                    raise RunFailed(str(failure)) from None
                raise
        try:
            if silence.over and not call.reply.complete:
                raise call.reply.failed(
                    f"timed out: silent for {timeout:g} s" + (" in mid-reply" if reply else "")
                )
            if rest := call.reply.rest():
                reply.append(rest)
                await emit("text", rest.encode())
            notes = call.reply.conclude(call.cut)
        except CallFailed as failure:
            if reply:
                raise RunFailed(str(failure)) from None
            raise
        return "".join(reply), notes


async def _say(emit: Emit, text: str) -> None:
    await emit("stderr", f"runctl: {text}\n".encode(errors="replace"))
