"""The daemons and servers under test, of one profile: they outlive rounds, so that what
grows is seen to grow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path

from natsserver import Node
from pgserver import Postgres
from proc import end_all_of
from proxy import Proxy
from runctl.protocol.endpoint import ENDPOINT_FILE

from .client import Client
from .endpoint import Endpoint
from .gateway_process import GatewayProcess
from .parts import Executor, SmallDisk, clock_library, descendants, strike
from .plan import EXECUTORS, GATEWAY_KINDS, GATEWAYS, KINDS, SHARED

STARTS_WITHIN = 60.0
QUEUE = "[queue]\nmax_attempts = 100\nstop_grace = '300ms'\n"
TERMINAL = "[runners.terminal]\nkind = 'command'\ntty = true\nargs = true\n"
TAKEOVER = "[takeover]\nenabled = true\nafter = '2s'\n"
ROOM = 32 * 1024 * 1024


class Stage:
    def __init__(self, path: Path, profile: str, postgres: Postgres | None) -> None:
        self.path, self.profile = path, profile
        path.mkdir(parents=True)
        self.endpoint = Endpoint(path / "journal")
        self.executors: list[Executor] = []
        self.gateways: list[GatewayProcess] = []
        self.postgres = postgres if profile == SHARED else None
        self.nats: Node | None = None
        self.nats_lock, self.postgres_lock = asyncio.Lock(), asyncio.Lock()
        self.nats_proxies: list[Proxy] = []
        self.database_proxies: list[Proxy] = []
        self.client_proxy: Proxy | None = None
        self._letting_in: asyncio.Task[None] | None = None
        self._let_in = b""
        self.client_config = path / "client.toml"
        self.disk: SmallDisk | None = None
        self.starved: set[int] = set()
        #: When a paused executor's work may overlap with that of whoever took over.
        self.pauses: list[tuple[float, float]] = []
        #: Faults that this machine does not permit, and why.
        self.skipped: dict[str, str] = {}
        #: executor -> what a fresh one has: descriptors, threads, bytes resident.
        self.base: dict[str, tuple[int, int, int]] = {}
        self._small = 0
        self.outlive = 0.0
        self._database = ""

    @property
    def logs(self) -> list[Path]:
        """Of all daemons and gateways."""
        return [*(x.log for x in self.executors), *(x.log for x in self.gateways)]

    @property
    def kinds(self) -> set[str]:
        return {*KINDS[self.profile], *GATEWAY_KINDS} - set(self.skipped)

    async def open(self) -> None:
        if not clock_library():
            self.skipped["daemon restarted, clock wrong"] = "libfaketime is not installed"
        if self.postgres is not None:
            await self._open_shared(self.postgres)
        else:
            self._open_embedded()
        self._configure()
        for executor in self.executors:
            executor.start()
        await self.wait_ready()
        for n in range(GATEWAYS):
            gateway = GatewayProcess(self.client_config, self.path / f"gateway-{n}.log")
            gateway.start()
            self.gateways.append(gateway)

    def _open_embedded(self) -> None:
        where = self.path / "disk"
        try:
            self.disk = SmallDisk(where)
        except OSError as error:
            self.skipped["disk full"] = f"no small file system: {error}"
            where.mkdir(exist_ok=True)
        self.state = where / "a"
        self.executors = [
            Executor(self.path / "a.toml", self.path / "a.log", self.state, shared=False)
        ]
        self._letting_in = asyncio.create_task(self._keep_letting_in())

    async def _open_shared(self, postgres: Postgres) -> None:
        self._database = await asyncio.to_thread(postgres.database)
        folder = self.path / "nats"
        folder.mkdir()
        self.nats = Node(folder)
        await asyncio.to_thread(self.nats.start)
        for n in range(EXECUTORS[SHARED]):
            name = "abc"[n]
            self.nats_proxies.append(Proxy(self.nats.port))
            self.database_proxies.append(Proxy(postgres.port))
            config, log = self.path / f"{name}.toml", self.path / f"{name}.log"
            self.executors.append(Executor(config, log, self.path / name, shared=True))
        self.client_proxy = Proxy(self.nats.port)

    def _configure(self) -> None:
        runners = (
            f"[stream]\nmax_age = '168h'\nmax_bytes = {self._small or ROOM}\n"
            f"{QUEUE}outlive = '{round(self.outlive * 1000)}ms'\n{TERMINAL}"
            f'[runners.chat]\nkind = "chat"\nmodel = "m"\nbase_url = "{self.endpoint.url}"\n'
            'history = 10000\nhistory_bytes = "64MiB"\n'
        )
        if self.postgres is None:
            self.executors[0].config.write_text(f'state_dir = "{self.state}"\n{runners}')
            self.client_config.write_text(f'state_dir = "{self.path / "client"}"\n')
            return
        assert self.client_proxy is not None
        for executor, nats, database in zip(
            self.executors, self.nats_proxies, self.database_proxies, strict=True
        ):
            name = executor.config.stem
            url = self._database.replace(f":{self.postgres.port}/", f":{database.port}/")
            executor.config.write_text(
                f'executor_id = "{name}"\nstate_dir = "{self.path / name}"\n'
                f'[database]\nurl = "{url}"\n[nats]\nurl = "{nats.url}"\n{TAKEOVER}{runners}'
            )
        self.client_config.write_text(
            f'state_dir = "{self.path / "client"}"\nexecutor_id = "client"\n'
            f'[database]\nurl = "{self._database}"\n[nats]\nurl = "{self.client_proxy.url}"\n'
        )

    async def wait_ready(self) -> None:
        """Until all executors are. Raises TimeoutError."""
        async with asyncio.timeout(STARTS_WITHIN):
            for executor in self.executors:
                await executor.wait_ready()
        self._let_clients_in()

    def _let_clients_in(self) -> None:
        """Clients of the embedded server come through a proxy as well."""
        if self.postgres is not None:
            return
        written = (self.state / ENDPOINT_FILE).read_bytes()
        if written == self._let_in:
            return
        there = json.loads(written)
        port = int(there["url"].rpartition(":")[2])
        if self.client_proxy is None or self.client_proxy.target != port:
            if self.client_proxy is not None:
                self.client_proxy.close()
            self.client_proxy = Proxy(port)
        file = self.path / "client" / ENDPOINT_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(".new")
        made.write_text(json.dumps(there | {"url": self.client_proxy.url}))
        made.replace(file)
        self._let_in = written

    async def _keep_letting_in(self) -> None:
        """The server has another password at each start, and perhaps another port."""
        while True:
            with contextlib.suppress(OSError):  # there is none yet
                self._let_clients_in()
            await asyncio.sleep(0.02)

    def client(self) -> Client:
        return Client(self.client_config)

    async def set_up(self, small: int, outlive: float) -> None:
        """Restart the daemons, unless they are so already, with a stream of ``small`` bytes, 0:
        with room for all, and commands that go on for ``outlive`` seconds without them."""
        if (small, outlive) == (self._small, self.outlive):
            return
        self._small, self.outlive = small, outlive
        self._configure()
        await self.restart(self.executors)

    async def restart(self, executors: list[Executor]) -> None:
        for executor in executors:
            ended = executor.ended
            if executor.signal(signal.SIGTERM):
                async with asyncio.timeout(STARTS_WITHIN):
                    await ended.wait()
        await self.wait_ready()

    async def heal(self) -> None:
        """End whatever faults left behind; returns when all is up again."""
        if self.disk is not None:
            self.disk.empty()
        for pid in self.starved:
            Executor.feed(pid)
        self.starved.clear()
        for proxy in self.proxies():
            proxy.heal()
        for gateway in self.gateways:
            gateway.signal(signal.SIGCONT)
        for executor in self.executors:
            executor.signal(signal.SIGCONT)
            strike(executor.keeper(), signal.SIGCONT)
            strike(executor.broker(), signal.SIGCONT)
        if self.nats is not None:
            async with self.nats_lock:
                strike(self.nats.pid, signal.SIGCONT)
        if self.postgres is not None:
            async with self.postgres_lock:
                self.signal_postgres(signal.SIGCONT)
        wrong = [executor for executor in self.executors if executor.skew]
        for executor in wrong:
            executor.skew = 0
        await self.wait_ready()
        if wrong:
            await self.restart(wrong)

    def proxies(self) -> list[Proxy]:
        clients = [self.client_proxy] if self.client_proxy is not None else []
        return [*self.nats_proxies, *self.database_proxies, *clients]

    def signal_postgres(self, number: int) -> None:
        pid = self.postgres.pid if self.postgres is not None else None
        if pid is not None:
            for each in [pid, *descendants(pid)]:
                strike(each, number)

    def paused(self, since: float) -> None:
        if self.postgres is not None:
            self.pauses.append((since, time.monotonic()))

    def runs_alive(self, runs: set[str]) -> dict[int, str]:
        """pid -> run of each process that carries the mark of one of ``runs``."""
        marks = {f"RUNCTL_RUN={run}".encode(): run for run in runs}
        ours = f"RUNCTL_STATE={self.path}/".encode()  # other rounds may have runs of the same names
        found = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    environment = Path(f"/proc/{entry.name}/environ").read_bytes().split(b"\0")
                    here = any(held.startswith(ours) for held in environment)
                    for mark in marks.keys() & environment if here else ():
                        found[int(entry.name)] = marks[mark]
        return found

    def brokers_alive(self) -> int:
        """How many embedded servers there are for our state directory."""
        found = 0
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{entry.name}/cmdline").read_bytes()
                    found += str(self.path).encode() in line and b"nats-server" in line
        return found

    async def close(self) -> None:
        if self._letting_in is not None:
            self._letting_in.cancel()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(STARTS_WITHIN / 2):
                await self.heal()
        for gateway in self.gateways:
            await gateway.close()
        for executor in self.executors:
            await executor.close()
            end_all_of(executor.state)  # of one that was killed last
        for proxy in self.proxies():
            proxy.close()
        if self.nats is not None:
            self.nats.kill()
        self.endpoint.close()
        if self.disk is not None:
            self.disk.close()
