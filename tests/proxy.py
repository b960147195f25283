"""A TCP proxy on loopback that can be a bad network: slow, silent, half closed, cut."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable

from conftest import DEADLINE


class Proxy:
    """Listens on ``port`` and passes on to ``target``, a port of 127.0.0.1."""

    def __init__(self, target: int, *, messages: bool = False) -> None:
        """``messages``: what clients send is NATS's protocol, so that ``hold`` works."""
        self.target = target
        self._messages = messages
        self._word, self._most = b"", 0
        self._held: list[tuple[asyncio.StreamWriter, bytes]] = []
        self._pairs: set[_Pair] = set()
        self._delay = 0.0
        self._refusing = False
        self._loop = asyncio.SelectorEventLoop()  # whatever policy trio-asyncio has set
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = self._do(self._serve)
        self.url = f"nats://127.0.0.1:{self.port}"

    # ---- what the network does ---------------------------------------------------

    def partition(self) -> None:
        """Nothing arrives any more, and nobody is told: what is sent meanwhile waits, as
        in TCP's own buffers, and new connections get no answer."""
        self._do(self._flow.clear)

    def heal(self) -> None:
        self._refusing = False
        self._delay = 0.0
        self._do(self._flow.set)

    def forget(self) -> None:
        """The server gives up the clients that it does not hear: after a long partition,
        both ends find their connections dead."""
        self._do(lambda: self._each(_Pair.reset))

    def cut(self) -> None:
        """All connections are reset, and new ones too, until ``heal``."""
        self._refusing = True
        self.forget()

    def delay(self, seconds: float) -> None:
        """Every piece of data, in both directions, takes that long."""
        self._delay = seconds

    def hold(self, word: str, most: int = 1_000_000) -> None:
        """The next ``most`` messages of clients to subjects that hold ``word`` wait until
        ``release``; all others pass them by."""
        self._word, self._most = word.encode(), most

    @property
    def held(self) -> int:
        return len(self._held)

    def release(self) -> None:
        async def send() -> None:
            self._most = 0
            held, self._held = self._held, []
            for writer, message in held:
                writer.write(message)

        self._do(send)

    def half_close(self) -> None:
        """The clients' ends of the connections stay; the server sees them finished."""
        self._do(lambda: self._each(_Pair.finish_towards_server))

    def close(self) -> None:
        self._do(self._server.close)
        self.forget()
        asyncio.run_coroutine_threadsafe(self._quit(), self._loop).result(DEADLINE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- how ---------------------------------------------------------------------

    def _each(self, what: Callable[[_Pair], None]) -> None:
        for pair in list(self._pairs):
            what(pair)

    def _do(self, what: Callable[[], object]) -> int:
        async def run() -> int:
            done = what()
            if asyncio.iscoroutine(done):
                done = await done
            return done if isinstance(done, int) else 0

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(DEADLINE)

    async def _serve(self) -> int:
        self._flow = asyncio.Event()
        self._flow.set()
        self._server = await asyncio.start_server(self._session, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _quit(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _session(self, r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(w)
            return
        try:
            await self._flow.wait()
            back_r, back_w = await asyncio.open_connection("127.0.0.1", self.target)
        except (OSError, asyncio.CancelledError):
            _reset(w)
            return
        pair = _Pair(w, back_w)
        self._pairs.add(pair)
        try:
            back = self._pipe(back_r, w)
            there = self._pipe_messages if self._messages else self._pipe
            await asyncio.gather(there(r, back_w), back)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except RuntimeError as error:  # its end was half closed meanwhile, as a fault
            if "write_eof" not in str(error):
                raise
        finally:
            self._pairs.discard(pair)
            pair.reset()

    async def _pipe(self, r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
        while data := await r.read(65536):
            await self._flow.wait()
            if self._delay:
                await asyncio.sleep(self._delay)
            w.write(data)
            await w.drain()
        await self._flow.wait()
        if w.can_write_eof() and not w.is_closing():
            w.write_eof()

    async def _pipe_messages(self, r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
        while line := await r.readline():
            words = line.split()
            message = line
            if words and words[0].upper() in (b"PUB", b"HPUB"):
                message += await r.readexactly(int(words[-1]) + 2)
            if self._most and len(words) > 1 and self._word in words[1]:
                self._most -= 1
                self._held.append((w, message))
            else:
                w.write(message)
                await w.drain()
        if w.can_write_eof() and not w.is_closing():
            w.write_eof()


class _Pair:
    """The two connections of a session."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._client, self._server = client, server

    def reset(self) -> None:
        _reset(self._client)
        _reset(self._server)

    def finish_towards_server(self) -> None:
        if self._server.can_write_eof():
            self._server.write_eof()


def _reset(w: asyncio.StreamWriter) -> None:
    raw = w.get_extra_info("socket")
    if raw is not None and not w.is_closing():
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    w.transport.abort()
