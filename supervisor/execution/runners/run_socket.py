"""What a command asks of us while it runs: one request a line, one answer a line.

``CHECKPOINT <base64>`` is answered by ``OK`` once that state, and all output before it, is
durable, ``SESSION <name>`` once that is the session of the run's thread, ``STATUS <text>`` and
``USAGE <name=number ...>`` once what is said is. What cannot be done is answered by ``ERROR``
and why.
"""

from __future__ import annotations

import base64
import binascii
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

import trio

from ....protocol.errors import BadRequest, Unavailable
from ....protocol.model import MAX_CHECKPOINT_BYTES, one_line

log = logging.getLogger("runctld.command")

#: Of a request: its data in base64, and a word.
LONGEST_LINE = MAX_CHECKPOINT_BYTES * 4 // 3 + 64
#: Of one run at once.
MOST_CONNECTIONS = 16

Answer = Callable[[str], Awaitable[None]]


class RunSocket:
    """``serve`` in a nursery, until cancelled. ``verbs``: who does what, given the rest of the
    line; each raises BadRequest with what is wrong."""

    def __init__(self, listener: socket.socket, verbs: Mapping[str, Answer]) -> None:
        self._listener = listener
        self._verbs = verbs
        self._room = trio.CapacityLimiter(MOST_CONNECTIONS)

    async def serve(self) -> None:
        with trio.socket.from_stdlib_socket(self._listener) as listener:
            async with trio.open_nursery() as nursery:
                while True:
                    token = object()
                    await self._room.acquire_on_behalf_of(token)
                    try:
                        connection, _ = await listener.accept()
                    except OSError as error:  # whoever called has gone, or no descriptor is left
                        log.debug("RUNCTL_SOCKET: %s", error)
                        self._room.release_on_behalf_of(token)
                        await trio.sleep(0.05)
                        continue
                    nursery.start_soon(self._talk, trio.SocketStream(connection), token)

    async def _talk(self, stream: trio.SocketStream, token: object) -> None:
        try:
            async with stream:
                rest = b""
                while True:
                    while b"\n" not in rest:
                        if len(rest) > LONGEST_LINE:
                            await stream.send_all(b"ERROR the line is too long\n")
                            return
                        more = await stream.receive_some(64 * 1024)
                        if not more:
                            return
                        rest += more
                    line, _, rest = rest.partition(b"\n")
                    await stream.send_all(await self._answer(line) + b"\n")
        except trio.BrokenResourceError:
            pass  # it does not want to know
        finally:
            self._room.release_on_behalf_of(token)

    async def _answer(self, line: bytes) -> bytes:
        try:
            verb, _, rest = line.decode().strip().partition(" ")
        except UnicodeDecodeError:
            return b"ERROR the request is not UTF-8"
        do = self._verbs.get(verb)
        if do is None:
            return f"ERROR no request {verb[:40]!a}; one of: {', '.join(self._verbs)}".encode()
        try:
            await do(rest.strip())
        except (BadRequest, Unavailable) as error:
            return f"ERROR {one_line(str(error))}".encode()
        return b"OK"


def read_data(text: str) -> bytes:
    """The data of a CHECKPOINT. Raises BadRequest."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest("the data is not base64") from None
    if len(data) > MAX_CHECKPOINT_BYTES:
        raise BadRequest(f"the data has {len(data)} bytes; at most {MAX_CHECKPOINT_BYTES}")
    return data
