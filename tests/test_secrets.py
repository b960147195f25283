"""Secrets of the configuration are in no output, log, JSON, process list, environment of a
command, or file of ours, whether things go well or not.

Each secret is a canary: a text that is nowhere else, and that is looked for everywhere."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import DEADLINE, Box, Daemon, Watch, wait_until
from pgserver import free_port
from proc import children, read_proc
from runctl.config.describe import describe
from runctl.config.load import load
from runctl.config.schema import FileError
from runctl.config.secrets import Masker
from runctl.protocol.endpoint import Endpoint
from runctl.supervisor.host.logs import Plain
from securenats import Cluster

DB, NATS, TOKEN, API, FILE_KEY, ENV, BASE, CONTEXT = (
    f"canary-{name}-7b1f" for name in ("db", "nats", "token", "api", "file", "env", "base", "ctx")
)
CANARIES = (DB, NATS, TOKEN, API, FILE_KEY, ENV, BASE, CONTEXT, "canary")
SLEEP = "import time; print('up', flush=True); time.sleep(600)"


def clean(text: str, what: str) -> None:
    for canary in CANARIES:
        at = text.find(canary)
        assert at < 0, f"{what} shows {canary}: {text[max(0, at - 200) : at + 100]}"


def files_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Each file and what it holds; without those that are removed meanwhile."""
    for path, _, names in os.walk(folder):
        for file in (Path(path) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                if file.is_file():
                    yield file, file.read_bytes()


class Loud(Box):
    """A daemon that logs all it can, and what its environment gives it. ``shared``: which
    of its variables clients have as well."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.env: dict[str, str] = {}
        self.shared: tuple[str, ...] = ()
        self.options = ["-v"]

    def start(self, *, ready: bool = True, cold: bool = False) -> Daemon:
        # "env" becomes the daemon, whose own command line then holds no variable.
        self.prefix = ["env", *(f"{name}={value}" for name, value in self.env.items())]
        return super().start(ready=ready, cold=cold)

    def popen(self, *args: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        env = os.environ | {name: self.env[name] for name in self.shared}
        return super().popen(*args, env=env, **kwargs)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def loud(tmp_path: Path) -> Iterator[Loud]:
    box = Loud(tmp_path)
    try:
        yield box
    finally:
        box.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A NATS server that wants a password."""
    conf = f'authorization {{ users: [ {{ user: me, password: "{NATS}" }} ] }}\n'
    made = Cluster(tmp_path_factory.mktemp("nats"), 1, conf=conf)
    yield made
    made.close()


@pytest.fixture(scope="module")
def database(postgres: Any) -> Iterator[str]:
    """The URL, without a password, of a database that wants one."""
    hba = postgres.data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text("host all canary_user 127.0.0.1/32 scram-sha-256\n" + before)
    name = postgres.database().rpartition("/")[2]
    postgres.sql(f"CREATE ROLE canary_user LOGIN PASSWORD '{DB}'")
    postgres.sql(f"GRANT ALL ON DATABASE {name} TO canary_user")
    postgres.sql("SELECT pg_reload_conf()")
    place = f"127.0.0.1:{postgres.port}/{name}"

    def wanted() -> bool:
        try:
            postgres.sql("SELECT 1", url=f"postgresql://canary_user:wrong@{place}")
        except asyncpg.InvalidPasswordError:
            return True
        return False  # what it had before lets everybody in

    wait_until(wanted, "the password is asked for")
    yield place
    hba.write_text(before)
    postgres.sql("SELECT pg_reload_conf()")


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, guarded: Cluster, database: str
) -> Iterator[Loud]:
    """A daemon with a secret in every key that takes one."""
    path = tmp_path_factory.mktemp("served")
    box = Loud(path)
    key = path / "key"
    key.write_text(FILE_KEY)
    box.env = {
        "DB_URL": f"postgresql://%63anary_user:{DB}@{database}",
        "NATS_PASSWORD": NATS,
        "NATS_HOST": "127.0.0.1",
        "API_KEY": API,
        "BASE_KEY": BASE,
        "PGPASSWORD": DB,
        "MY_TOKEN": ENV,
        "HARMLESS": "yes",
    }
    box.shared = ("NATS_PASSWORD", "NATS_HOST")
    box.configure(
        'executor_id = "e"\nstart_timeout = "20s"\n'
        '[database]\nurl = "${DB_URL}"\n'
        f'[nats]\nurl = "nats://me:${{NATS_PASSWORD}}@${{NATS_HOST}}:{guarded.ports[0]}"\n'
        "[runners.key]\nkind = 'chat'\nmodel = 'm'\nretry = '0s'\napi_key = '${API_KEY}'\n"
        f"base_url = 'http://u:${{BASE_KEY}}@127.0.0.1:{free_port()}/v1?api-key=${{BASE_KEY}}'\n"
        "[runners.file]\nkind = 'chat'\nmodel = 'm'\nretry = '0s'\n"
        f"api_key_file = '{key}'\nbase_url = 'http://127.0.0.1:{free_port()}/v1'\n"
        "[runners.asks]\nkind = 'command'\nargv = ['env']\n"
        "env = { API_KEY = '${API_KEY}', MY_TOKEN = '${MY_TOKEN}' }\n"
        "[runners.shown]\nkind = 'command'\nargv = ['true', '${API_KEY}']\n"
    )
    try:
        box.start()
        yield box
    finally:
        box.close()


# ---- what commands get ----------------------------------------------------------------------


def test_commands_do_not_inherit_the_secrets(served: Loud) -> None:
    run = served.submit("t", "env")
    served.runctl("wait", run)
    text = served.runctl("attach", "t", "--no-follow")
    clean(text, "a command's environment")
    names = {line.partition("=")[0] for line in text.splitlines()}
    assert not names & set(served.env) - {"NATS_HOST", "HARMLESS"}
    assert {"NATS_HOST", "HARMLESS", "PATH", "RUNCTL_THREAD"} <= names


def test_a_runner_gets_what_it_asks_for(served: Loud) -> None:
    served.runctl("wait", served.runctl("submit", "a", "--runner", "asks", "x").strip())
    lines = served.runctl("attach", "a", "--no-follow").splitlines()
    assert f"API_KEY={API}" in lines
    assert f"MY_TOKEN={ENV}" in lines
    assert not any(line.startswith(("DB_URL=", "NATS_PASSWORD=")) for line in lines)
    served.runctl("purge", "a", "--yes")


def test_no_process_below_shows_a_secret(served: Loud) -> None:
    served.submit_py("s", SLEEP)
    Watch(served, "s").wait_chunks(1)  # before, it may be between its fork and its exec
    daemon = served.pid
    below = children(daemon, Path(sys.executable).name)
    assert len(below) >= 2, "the keeper, and the command"
    for pid in below:
        for what in ("cmdline", "environ"):
            text = read_proc(pid, what).decode(errors="replace")
            clean(text, f"{what} of {pid}")
    clean(Path(f"/proc/{daemon}/cmdline").read_text(), "the daemon's command line")
    served.runctl("abort", "s")


# ---- what is said ----------------------------------------------------------------------------


def test_neither_log_nor_answers_nor_files_show_a_secret(served: Loud) -> None:
    box = served
    for runner in ("key", "file"):
        run = box.runctl("submit", "chat", "--runner", runner, "hello").strip()
        box.runctl("wait", run, code=1)
        clean(box.runctl("show", run), "show")
        assert "cannot connect" in box.show(run)["error"]
    for args in (("status",), ("list",), ("list", "chat"), ("attach", "chat", "--no-follow")):
        for more in ((), ("--json",)):
            clean(box.runctl(*args, *more, code=None) + box.stderr, str(args))
    checked = subprocess.run(
        [sys.executable, "-m", "runctl.supervisor.main", "-c", str(box.config), "--check"],
        env={**os.environ, **box.env},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0
    clean(checked.stdout + checked.stderr, "--check")
    assert 'argv = ["true", "***"]' in checked.stdout
    assert (
        "# not in the environment of commands: API_KEY, BASE_KEY, DB_URL, MY_TOKEN,"
        " NATS_PASSWORD, PGPASSWORD\n" in checked.stdout
    )
    clean(box.text(), "the log")
    for file, held in files_below(box.state):
        clean(held.decode(errors="replace"), str(file))


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ('[nats]\nurl = "nats://me:canary-wrong@{nats}"', 78),
        ('[nats]\nurl = "nats://me:canary-pw@127.0.0.1:{closed}"', 69),
        ('[nats]\nurl = "nats://me:canary%40pw@no-such-host.invalid:1"', 69),
        ('[nats]\ncontext = "{path}/token.json"', 78),
        ('[nats]\ncredentials = "{path}/seed"\nurl = "nats://{nats}"', 78),
        ('[database]\nurl = "postgresql://c:canary-pw@127.0.0.1:{closed}/d"', 69),
        ('[database]\nurl = "postgresql://%63anary_user:canary-pw@{database}"', 78),
        ('[database]\nurl = "postgresql://%63anary_user@{database}?password=canary-pw"', 78),
        ('[database]\nurl = "postgresql://u:canary%zzpw@{database}"', 78),
        ('[database]\nurl = "postgresql://u:canary-pw@{database}?sslpassword=canary&nope=1"', 78),
        ('[runners.c]\nkind="chat"\nmodel="m"\nbase_url="ftp://u:canary@h"\napi_key="canary"', 78),
    ],
)
def test_no_failure_shows_a_secret(
    loud: Loud, guarded: Cluster, database: str, config: str, code: int
) -> None:
    nats = f"127.0.0.1:{guarded.ports[0]}"
    path = loud.path
    (path / "token.json").write_text(json.dumps({"url": f"nats://{nats}", "token": "canary-token"}))
    (path / "seed").write_text("SUcanary\nSUACANARY" + "A" * 49 + "\n")
    text = config
    for name, value in (
        ("nats", nats),
        ("closed", str(free_port())),
        ("path", str(path)),
        ("database", database),
    ):
        text = text.replace("{" + name + "}", value)
    patience = "300ms" if code == 69 else "20s"
    loud.configure(f'executor_id = "e"\nstart_timeout = "{patience}"\n{text}\n')
    assert loud.start(ready=False).wait(DEADLINE) == code, loud.text()
    said = loud.text()
    assert said.strip().splitlines()[-1].startswith("runctld: ")
    assert "Traceback" not in said
    clean(said.replace("canary_user", ""), "the log")
    if "[nats]" in config:
        loud.runctl("list", code=4)
        clean(loud.stderr, "runctl")


def test_the_embedded_servers_credential_is_in_its_two_files_only(loud: Loud) -> None:
    loud.start()
    loud.runctl("wait", loud.submit("t", "env"))
    password = json.loads((loud.state / "nats/client.json").read_text())["password"]
    holders = {file.name for file, held in files_below(loud.state) if password.encode() in held}
    assert holders == {"client.json", "server.conf"}
    said = loud.text() + loud.runctl("status", "--json") + loud.runctl("attach", "t", "--no-follow")
    assert password not in said
    for pid in children(loud.pid, "nats-server"):
        for what in ("cmdline", "environ"):
            assert password.encode() not in read_proc(pid, what)


# ---- parts -----------------------------------------------------------------------------------


@pytest.mark.short
@pytest.mark.parametrize("key", ["user", "password", "token", "creds", "nkey"])
def test_references_to_secrets_elsewhere_are_refused(tmp_path: Path, key: str) -> None:
    context = tmp_path / "c.json"
    context.write_text(json.dumps({"user": "u", "url": "nats://h", key: "op://vault/canary/field"}))
    config = tmp_path / "runctld.toml"
    config.write_text(f'[nats]\ncontext = "{context}"\n')
    with pytest.raises(FileError, match="which runctl does not fetch") as caught:
        load(config)
    assert "canary" not in str(caught.value)
    assert f'"{key}"' in str(caught.value)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KEY", API)
    monkeypatch.setenv("DB_HOST", "h")
    file = tmp_path / "runctld.toml"
    file.write_text(
        'executor_id = "e"\n[database]\nurl = "postgresql://u:canary%40db@${DB_HOST}/d"\n'
        f'[nats]\nurl = "nats://me:{NATS}@a,nats://{TOKEN}@b"\n'
        f'[runners.c]\nkind = "chat"\nmodel = "m"\nbase_url = "http://u:{BASE}@h?key=k3y-"\n'
        'api_key = "${KEY}"\n'
        f'[runners.x]\nkind = "command"\nenv = {{ MY_TOKEN = "{ENV}", LANG = "C.UTF-8" }}\n'
    )
    return load(file)


@pytest.mark.short
def test_nothing_secret_is_in_a_repr(config: Any) -> None:
    clean(repr(config), "the configuration")
    assert "canary" not in repr(Endpoint("nats://h", "runctl", "canary"))
    clean(describe(config), "--check")
    assert config.withheld == {"KEY"}


@pytest.mark.short
def test_texts_of_others_are_masked(config: Any) -> None:
    hide = Masker(config)
    for secret in ("canary%40db", "canary@db", NATS, TOKEN, API, BASE, ENV, "k3y-"):
        assert hide(f"cannot use '{secret}': bad") == "cannot use '***': bad"
    assert hide(f"x{NATS}y") == "x***y"
    for plain in ("C.UTF-8", "a postgresql database", "me", "monkey"):
        assert hide(plain) == plain
    record = logging.LogRecord("n", logging.INFO, "f", 1, "url %s", (f"nats://{TOKEN}@b",), None)
    assert Plain(hide).format(record).endswith("INFO n: url nats://***@b")


@pytest.mark.short
def test_tracebacks_are_masked(config: Any) -> None:
    code = (
        "import sys, threading\n"
        "from runctl.config.load import load\n"
        "from runctl.config.secrets import Masker\n"
        "from runctl.supervisor.host.traceback_mask import mask_tracebacks\n"
        "from pathlib import Path\n"
        "mask_tracebacks(Masker(load(Path(sys.argv[1]))))\n"
        "def fail(): raise ValueError('cannot use ' + sys.argv[2])\n"
        "t = threading.Thread(target=fail); t.start(); t.join()\n"
        "fail()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config.source), NATS], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("ValueError: cannot use ***") == 2
    clean(done.stderr, "a traceback")
