"""Several executors that share a PostgreSQL and a NATS: real servers, real SIGKILL."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Box, Watch, alive, wait_until
from pgserver import Postgres, TlsFront, free_port
from runctl.supervisor.broker import server_binary

TEN = """
import time
for i in range(1, 11):
    print(f"chunk-{i} {time.time():.3f}", flush=True)
    time.sleep(%s)
"""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a shared NATS server with JetStream."""
    path = tmp_path_factory.mktemp("nats")
    port = free_port()
    with (path / "log").open("wb") as log:
        server = subprocess.Popen(
            [server_binary(), "-js", "-a", "127.0.0.1", "-p", str(port), "-sd", str(path)],
            stderr=log,
        )
    try:
        wait_until(lambda: "Server is ready" in (path / "log").read_text(), "NATS is up")
        yield f"nats://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


class House:
    """Executors that share a database and a NATS server. ``box(name)`` makes one."""

    def __init__(self, path: Path, postgres: Postgres, nats: str) -> None:
        self.path, self.postgres, self.nats = path, postgres, nats
        self.url = postgres.database()
        self.boxes: list[Box] = []

    def box(self, name: str, more: str = "", *, url: str = "", start: bool = True) -> Box:
        path = self.path / f"{name}-{len(self.boxes)}"
        path.mkdir()
        box = Box(path)
        self.boxes.append(box)
        box.configure(
            f'executor_id = "{name}"\n'
            f'[database]\nurl = "{url or self.url}"\n[nats]\nurl = "{self.nats}"\n{more}'
        )
        if start:
            box.start()
        return box

    def sql(self, text: str, *args: Any) -> list[Any]:
        return self.postgres.sql(text, *args, url=self.url)

    def close(self) -> None:
        for box in self.boxes:
            if box.daemon is not None and box.daemon.poll() is None:
                box.daemon.kill()
            box.close()


@pytest.fixture
def house(tmp_path: Path, postgres: Postgres, nats_server: str) -> Iterator[House]:
    made = House(tmp_path, postgres, nats_server)
    try:
        yield made
    finally:
        made.close()


def _assert_one_clean_reply(text: str) -> None:
    assert [int(n) for n in re.findall(r"^chunk-(\d+) ", text, re.M)] == list(range(1, 11))


def test_the_essentials(house: House) -> None:
    box = house.box("essentials")
    ran = box.submit_py("demo", TEN % 0.2)
    queued = box.submit("demo", "echo", "second")
    watch = Watch(box, "demo")
    watch.wait_chunks(2)
    assert box.json("list")[0]["queued"] == 1
    box.kill()
    box.start()
    assert watch.wait() == 0
    _assert_one_clean_reply(watch.text())
    assert box.runctl("wait", queued).strip() == "succeeded"
    first, second = box.show(ran), box.show(queued)
    assert (first["attempt"], first["status"]) == (2, "succeeded")
    assert first["ended_at"] <= second["started_at"]
    assert [r["run"] for r in box.json("list", "demo")] == [queued, ran]

    hanging = box.submit_py("demo", "import time; print('up', flush=True); time.sleep(600)")
    waiting = box.submit("demo", "echo", "third")
    Watch(box, "demo", "--run", hanging).wait_chunks(1)
    box.runctl("purge", "demo", "--yes", code=6)
    assert box.term() == 0
    box.start()
    Watch(box, "demo", "--run", hanging).wait_chunks(1)
    assert box.show(hanging)["attempt"] == 2
    assert hanging in box.runctl("abort", "demo")
    assert box.runctl("wait", waiting).strip() == "succeeded"
    again = box.runctl("retry", hanging).strip()
    box.runctl("abort", "demo", "--queued", "--run", again)
    assert box.show(again)["retry_of"] == hanging
    box.runctl("purge", "demo", "--yes")
    assert box.json("status")["database"]["kind"] == "postgresql"


def _exit(box: Box, code: int) -> str:
    """The daemon's last line, once it has ended with ``code``."""
    assert box.daemon is not None
    assert box.daemon.wait(40) == code, box.log.read_text()
    line = box.log.read_text().splitlines()[-1]
    assert "Traceback" not in box.log.read_text()
    return line


def test_what_is_wrong_with_the_database_is_one_line(house: House, postgres: Postgres) -> None:
    port = free_port()
    for url, more, code, said in [
        (f"postgresql://u:hush@127.0.0.1:{port}/x", "start_timeout = '500ms'", 69, "reached"),
        ("postgresql://u:hush@127.0.0.1:1/x?sslmod=require", "", 78, "sslmod"),
        ("postgresql://u:hush@127.0.0.1:1", "", 78, "names no database"),
        ("postgresql://u:hush@127.0.0.1:1/x?channel_binding=require", "", 78, "channel_binding"),
        (postgres.url("nothing-there"), "", 78, "does not exist"),
        (postgres.url("postgres", sslmode="require"), "", 78, "SSL"),
    ]:
        box = house.box("bad", url=url, start=False)
        box.config.write_text(f"{more}\n{box.config.read_text()}")
        box.start(ready=False)
        line = _exit(box, code)
        assert said in line, line
        assert "hush" not in box.log.read_text()


def test_a_second_daemon_of_an_id_names_the_holder(house: House) -> None:
    first = house.box("same")
    second = house.box("same", start=False)
    second.start(ready=False)
    line = _exit(second, 75)
    assert first.daemon is not None
    assert f"pid {first.daemon.pid} on " in line
    first.kill()
    second.start()


def test_a_lost_lease_stops_all_runs(house: House) -> None:
    box = house.box("lost")
    run = box.submit_py(
        "demo",
        "import os, signal, time; signal.signal(15, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True); time.sleep(600)",
    )
    watch = Watch(box, "demo")
    watch.wait_chunks(1)
    pid = int(watch.text())
    house.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'runctld pid %' AND datname = current_database()"
    )
    assert "lost" in _exit(box, 75)
    wait_until(lambda: not alive(pid), "the run has ended", 2.5)
    box.start()
    wait_until(lambda: box.show(run)["attempt"] == 2, "replayed")


def test_postgres_away_for_a_while(house: House, tmp_path: Path) -> None:
    server = Postgres()
    try:
        server.start()
        house.url = server.database()
        house.postgres = server
        box = house.box("away")
        box.submit_py("demo", TEN % 0.2)
        watch = Watch(box, "demo")
        watch.wait_chunks(2)
        server.stop()
        assert "lost" in _exit(box, 75)
        box.start(ready=False)
        time.sleep(1)
        server.start()
        assert watch.wait() == 0
        _assert_one_clean_reply(watch.text())
    finally:
        server.close()


def _certificate(path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    cert, key = path / "server.crt", path / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_settings_hold_on_every_connection(house: House, tmp_path: Path) -> None:
    cert, key = _certificate(tmp_path)
    front = TlsFront(house.postgres, cert, key)
    try:
        base = house.url.replace(f":{house.postgres.port}/", f":{front.port}/")
        box = house.box("tls", url=f"{base}?sslmode=verify-full&sslrootcert={cert}")
        box.runctl("wait", box.submit("t", "true"))
        assert front.sessions >= 2, "DBOS's and the lease's"
        assert front.dropped == 0, "a connection did without TLS"
        for query in ("sslmode=verify-full", "sslmode=verify-full&sslrootcert=system"):
            other = house.box("other", url=f"{base}?{query}", start=False)
            other.start(ready=False)
            line = _exit(other, 78)
            assert "certificate" in line, line
    finally:
        house.close()
        front.close()
