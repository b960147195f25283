"""External NATS: TLS, credentials, contexts, clusters, streams of others, permissions."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import DEADLINE, Box, Watch, wait_until
from natsserver import Node
from runctl.client.link import Link, NotReady, dial
from runctl.client.requests import ask
from runctl.config.connection import new_client
from runctl.config.describe import describe
from runctl.config.load import load
from runctl.config.schema import Nats
from runctl.protocol import messages, records, subjects
from runctl.protocol.errors import Busy
from securenats import Certificates, Cluster, Nkey, Operator

DOCS = Path(__file__).parents[1] / "docs/nats.md"

TICKS = "import time\nfor i in range(%d): print(f'line-{i}', flush=True); time.sleep(%s)"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(size: int = 1, **options: Any) -> Cluster:
        made.append(Cluster(tmp_path / f"nats{len(made)}", size, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


#: Longer than any test waits: a start that is refused was refused at once.
PATIENT = 'start_timeout = "10m"\n'


def configure(box: Box, cluster: Cluster, nats: str = "", more: str = "") -> None:
    box.configure(f'{PATIENT}{more}[nats]\nurl = "{cluster.url}"\n{nats}')


def operator_file(path: Path, text: str) -> Path:
    """A configuration file with nothing but the section [nats]."""
    path.write_text(f"[nats]\n{text}")
    return path


def runctl(file: Path, *args: str, code: int, **env: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "runctl.cli.main", "-c", str(file), *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=os.environ | env,
    )
    assert done.returncode == code, (args, done)
    return done.stdout, done.stderr


def refused(box: Box, code: int, secret: str = "") -> str:
    """The one line with which a daemon that cannot start ends."""
    offset = box.log.stat().st_size if box.log.exists() else 0
    assert box.start(ready=False).wait(DEADLINE) == code, box.log.read_text()
    text = box.log.read_text()[offset:]
    line = text.strip().splitlines()[-1]
    assert line.startswith("runctld: "), text
    assert "Traceback" not in text
    assert not secret or secret not in text
    return line


def known_leader(cluster: Cluster) -> list[int]:
    """The number of the server that leads the stream; nothing at the moment, perhaps."""
    try:
        return [cluster.leader()]
    except (OSError, KeyError, ValueError, AssertionError):
        return []


# ---- TLS and who we are ------------------------------------------------------------------


def test_a_cluster_with_tls_and_nkeys_loses_a_server(
    stopped_box: Box, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    box, key = stopped_box, Nkey()
    certificates = Certificates(tmp_path / "tls")
    three = cluster(
        3,
        certificates=certificates,
        conf=f"authorization {{ users: [ {{ nkey: {key.public} }} ] }}\n",
    )
    keys = f'nkey = "{key.file(tmp_path / "user.nk")}"\ntls_ca = "{certificates.ca}"\n'
    configure(box, three, keys + "replicas = 3\n")
    box.start()
    runs = [box.submit_py(f"t{n}", TICKS % (40, 0.1)) for n in range(3)]
    watchers = [Watch(box, f"t{n}") for n in range(3)]
    for watcher in watchers:
        watcher.wait_chunks(5)
    (leader,) = wait_until(lambda: known_leader(three), "the stream's leader is known")
    three.kill(leader)
    for run, watcher in zip(runs, watchers, strict=True):
        assert watcher.wait() == 0, (box.complaints.read_text(), box.log.read_text())
        assert watcher.text() == "".join(f"line-{i}\n" for i in range(40))
        seqs = [e["seq"] for e in watcher.final() if e["type"] == "chunk"]
        assert seqs == list(range(1, len(seqs) + 1))
        assert box.show(run)["attempt"] == 1
    alone = operator_file(tmp_path / "ops.toml", f'url = "{three.url}"\n{keys}')
    out, _ = runctl(alone, "attach", "t1", "--no-follow", code=0)
    assert out == "".join(f"line-{i}\n" for i in range(40))
    three.start(leader)
    assert box.term() == 0
    assert "the stream RUNCTL" not in box.log.read_text(), "nothing was lost"


def test_credentials_files(
    stopped_box: Box, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    box, operator = stopped_box, Operator()
    server = cluster(conf=operator.conf)
    good = operator.credentials(tmp_path / "good.creds")
    configure(box, server, f'credentials = "{good}"\n')
    box.start()
    run = box.submit("t", "echo", "hello")
    box.runctl("wait", run)
    assert box.runctl("attach", "t", "--no-follow") == "hello\n"
    seed = re.findall(r"^SU\w+$", good.read_text(), re.M)[0]
    assert box.term() == 0
    assert seed not in box.log.read_text()

    other = Operator().credentials(tmp_path / "other.creds")
    configure(box, server, f'credentials = "{other}"\n')
    line = refused(box, 78, re.findall(r"^SU\w+$", other.read_text(), re.M)[0])
    assert "refused the credentials: correct nats.credentials" in line
    assert str(other) in line
    box.runctl("list", code=4)
    assert "refused the credentials: correct nats.credentials" in box.stderr

    for content, words in (
        ("nonsense", "is not a .creds file"),
        (
            good.read_text().replace(
                seed, seed[:30] + ("A" if seed[30] != "A" else "B") + seed[31:]
            ),
            "damaged",
        ),
    ):
        other.write_text(content)
        assert words in refused(box, 78, seed)
        box.runctl("list", code=4)
        assert words in box.stderr
        assert "nats.credentials" in box.stderr
        assert box.stderr.count("\n") == 1
    other.unlink()
    assert "nats.credentials" in refused(box, 78)
    box.runctl("list", code=4)
    assert "no such file" in box.stderr


def test_credentials_that_expire_end_the_daemon(
    stopped_box: Box, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    box, operator = stopped_box, Operator()
    server = cluster(conf=operator.conf)
    for life in (6, 20, 60):  # on a busy machine a start takes longer than on others
        file = operator.credentials(tmp_path / "user.creds", exp=int(time.time()) + life)
        configure(box, server, f'credentials = "{file}"\n')
        daemon = box.start(ready=False)
        code = daemon.wait(DEADLINE)
        if "ready: " in box.log.read_text():
            break
    assert code == 69
    assert "NATS closed the connection" in box.log.read_text()
    assert "expired" in box.log.read_text()


def test_a_key_log_that_cannot_be_written_is_named(
    stopped_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is connected to."""
    stopped_box.configure('[nats]\nurl = "tls://127.0.0.1:1"\n')
    monkeypatch.setenv("SSLKEYLOGFILE", "/no/such/keys")
    words = "SSLKEYLOGFILE: /no/such/keys cannot be written (No such file or directory): unset it"
    assert words in refused(stopped_box, 78)
    stopped_box.runctl("list", code=4)
    assert words in stopped_box.stderr
    assert stopped_box.stderr.count("\n") == 1


def test_a_key_log_where_only_the_server_asks_for_tls(
    stopped_box: Box,
    tmp_path: Path,
    cluster: Callable[..., Cluster],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = cluster(certificates=Certificates(tmp_path / "tls"), conf="")
    stopped_box.configure(f'[nats]\nurl = "nats://127.0.0.1:{server.ports[0]}"\n')
    for file, why in (("/no/such/keys", "No such file"), (str(tmp_path), "Is a directory")):
        monkeypatch.setenv("SSLKEYLOGFILE", file)
        words = f"SSLKEYLOGFILE: {file} cannot be written ({why}"
        assert words in refused(stopped_box, 78)
        stopped_box.runctl("list", code=4)
        assert words in stopped_box.stderr
        assert stopped_box.stderr.count("\n") == 1


def test_certificates_are_checked(
    stopped_box: Box, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    box = stopped_box
    ours, theirs = Certificates(tmp_path / "ours"), Certificates(tmp_path / "theirs")
    server = cluster(certificates=ours, tls_conf=f'ca_file: "{ours.ca}"\nverify: true\n', conf="")
    cert, key = ours.make("client")
    good = f'tls_ca = "{ours.ca}"\ntls_cert = "{cert}"\ntls_key = "{key}"\n'
    configure(box, server, good)
    box.start()
    box.runctl("status")
    assert box.term() == 0

    def both(nats: str, *words: str) -> None:
        configure(box, server, nats)
        line = refused(box, 78)
        box.runctl("list", code=4)
        for word in words:
            assert word in line
            assert word in box.stderr
        assert box.stderr.count("\n") == 1

    both(good.replace(str(ours.ca), str(theirs.ca)), "certificate", "nats.tls_ca")
    both("", "certificate", "nats.tls_ca")
    _, other_key = ours.make("other")
    both(good.replace(str(key), str(other_key)), "nats.tls_key", "is not the key of")
    both(good.replace(str(ours.ca), str(key)), "nats.tls_ca", "holds no certificate")
    both(good.replace(str(ours.ca), "/nowhere.pem"), "nats.tls_ca", "no such file")
    # The name is checked: the certificate is for 127.0.0.1 only.
    box.configure(f'[nats]\nurl = "tls://localhost:{server.ports[0]}"\n{good}')
    assert "give nats.url a name that is in it" in refused(box, 78)


def test_nothing_is_sent_to_a_server_without_tls(
    stopped_box: Box, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    box, ca = stopped_box, Certificates(tmp_path / "tls").ca
    server = cluster(conf="authorization { user: u, password: sesame }\n")
    port = server.ports[0]
    for nats in (
        f'url = "TLS://u:sesame@127.0.0.1:{port}"',
        f'url = "nats://u:sesame@127.0.0.1:{port}"\ntls_ca = "{ca}"',
    ):
        box.configure(f"{PATIENT}[nats]\n{nats}\n")
        assert "does not require TLS" in refused(box, 78, "sesame")
        box.runctl("list", code=4)
        assert "does not require TLS" in box.stderr
        assert "sesame" not in box.stderr
    box.configure(f'[nats]\nurl = "nats://u:sesame@127.0.0.1:{port}"\n')
    box.start()
    box.runctl("status")


def test_tls_first(stopped_box: Box, tmp_path: Path, cluster: Callable[..., Cluster]) -> None:
    box, certificates = stopped_box, Certificates(tmp_path / "tls")
    server = cluster(certificates=certificates, tls_conf="handshake_first: true\n")
    ca = f'tls_ca = "{certificates.ca}"\n'
    configure(box, server, ca + "tls_first = true\n")
    box.start()
    box.runctl("status")
    assert box.term() == 0
    plain = cluster()
    box.configure(f'[nats]\nurl = "{plain.url}"\n{ca}tls_first = true\n')
    assert "remove nats.tls_first" in refused(box, 78)


def test_unreachable_is_said_within_start_timeout(stopped_box: Box) -> None:
    stopped_box.configure('start_timeout = "1s"\n[nats]\nurl = "nats://u:sesame@127.0.0.1:9"\n')
    line = refused(stopped_box, 69, "sesame")
    assert "cannot be reached within 1 s" in line


def test_context_files(
    stopped_box: Box,
    tmp_path: Path,
    cluster: Callable[..., Cluster],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box, certificates = stopped_box, Certificates(tmp_path / "tls")
    server = cluster(
        certificates=certificates, conf="authorization { user: u, password: sesame }\n"
    )
    home = tmp_path / "xdg"
    (home / "nats/context").mkdir(parents=True)
    file = home / "nats/context/prod.json"
    context = {
        "description": "",
        "url": server.url,
        "user": "u",
        "password": "sesame",
        "ca": str(certificates.ca),
        "inbox_prefix": "_INBOX.me",
        "socks_proxy": "",
        "nsc": "",
    }
    file.write_text(json.dumps(context))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    box.configure('[nats]\ncontext = "prod"\n')
    box.start()
    box.runctl("wait", box.submit("t", "echo", "hello"))
    alone = operator_file(tmp_path / "ops.toml", f'context = "{file}"\n')
    out, _ = runctl(alone, "attach", "t", "--no-follow", code=0)
    assert out == "hello\n"
    loaded = load(alone)
    assert loaded.nats.inbox_prefix == "_INBOX.me"
    assert "sesame" not in describe(loaded) + repr(loaded)
    assert box.term() == 0

    file.write_text(json.dumps(context | {"password": "wrong-sesame"}))
    line = refused(box, 78, "wrong-sesame")
    assert f'correct "user" and "password", or "token", in {file}' in line
    for more, words in (
        ({"socks_proxy": "x:1"}, '"socks_proxy": runctl does not support it'),
        ({"ca": "ca.pem"}, '"ca": expected a file\'s whole path'),
        ({"user": 7}, '"user": expected a string'),
        ({"cert": "/c.pem"}, '"cert": needs "key"'),
    ):
        file.write_text(json.dumps(context | more))
        assert words in refused(box, 78, "sesame")
        _, err = runctl(alone, "list", code=4)
        assert words in err
        assert err.count("\n") == 1
    file.unlink()
    _, err = runctl(alone, "list", code=4)
    assert "no such file" in err
    assert "nats.context" in err


# ---- the stream --------------------------------------------------------------------------


def test_replicas_on_a_single_server(stopped_box: Box, cluster: Callable[..., Cluster]) -> None:
    configure(stopped_box, cluster(), "replicas = 3\n")
    line = refused(stopped_box, 78)
    assert "nats.replicas = 3 needs a NATS cluster" in line


STREAM: dict[str, Any] = {
    "name": "RUNCTL",
    "subjects": ["runctl.out.*.*"],
    "allow_rollup_hdrs": True,
    "allow_direct": True,
    "max_consumers": 100_000,
    "max_age": 24 * 3600 * 10**9,
    "max_bytes": 4 * 1024**3,
    "discard": "old",
    "duplicate_window": 10**9,
}


def remake_stream(box: Box, **settings: Any) -> dict[str, Any]:
    """Make the stream as somebody else would; the settings it then has."""

    async def main() -> dict[str, Any]:
        link = await dial(load(box.config, client=True))
        try:
            try:
                await link.api("STREAM.DELETE.RUNCTL")
            except Exception:
                pass
            async with asyncio.timeout(DEADLINE):
                while True:
                    try:
                        made = await link.api("STREAM.CREATE.RUNCTL", STREAM | settings)
                        return made["config"]
                    except NotReady:  # the old one's files are just being removed
                        await asyncio.sleep(0.1)
        finally:
            await link.close()

    return asyncio.run(main())


def stream_settings(box: Box) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        link: Link = await dial(load(box.config, client=True))
        try:
            found = await link.request("$JS.API.STREAM.INFO.RUNCTL", b"", DEADLINE)
            return json.loads(found)["config"]
        finally:
            await link.close()

    return asyncio.run(main())


@pytest.fixture
def shared(stopped_box: Box, cluster: Callable[..., Cluster]) -> Box:
    configure(stopped_box, cluster())
    return stopped_box


def test_a_stream_that_cannot_serve_is_refused_and_left_alone(shared: Box) -> None:
    for settings, words in (
        ({"subjects": ["runctl.out.*.*", "x"]}, ("subjects = runctl.out.*.*,x", "--subjects=")),
        ({"allow_rollup_hdrs": False}, ("allow_rollup_hdrs = false", "--allow-rollup")),
        ({"storage": "memory"}, ("storage = memory", "needs file", "nats stream rm")),
        ({"retention": "interest"}, ("retention = interest", "needs limits")),
        ({"max_msgs_per_subject": 5}, ("max_msgs_per_subject = 5", "no limit")),
        ({"max_msg_size": 1000}, ("max_msg_size = 1000", "at least")),
        ({"no_ack": True}, ("no_ack = true", "--ack")),
        ({"deny_purge": True, "allow_rollup_hdrs": False}, ("allow_rollup_hdrs",)),
    ):
        before = remake_stream(shared, **settings)
        line = refused(shared, 78)
        for word in words:
            assert word in line
        assert stream_settings(shared) == before


def test_other_differences_are_warnings(shared: Box) -> None:
    before = remake_stream(shared, max_bytes=1024**3, max_age=0, max_consumers=50)
    shared.start()
    shared.runctl("wait", shared.submit("t", "echo", "hello"))
    warnings = shared.json("status")["nats"]["warnings"]
    assert stream_settings(shared) == before
    found = {line.split(" has ")[1].split(" = ")[0] for line in warnings}
    assert {"max_bytes", "max_consumers"} <= found
    # As the nats command reads them: a number alone is at most 2**31 - 1.
    assert any(line.endswith("nats stream edit RUNCTL --max-bytes=4GiB") for line in warnings)
    for line in warnings:
        assert line in shared.log.read_text()
        assert "nats stream edit RUNCTL --" in line
    assert warnings[0] in shared.runctl("status")


# ---- permissions -------------------------------------------------------------------------


class Permitted:
    """A server with the permissions of docs/nats.md, a daemon, and its users' files."""

    def __init__(
        self, box: Box, cluster: Callable[..., Cluster], path: Path, conf: str = ""
    ) -> None:
        """``conf`` is added to the server's configuration."""
        text = DOCS.read_text()
        block = re.search(r"<!-- permissions -->\n```conf\n(.*?)```", text, re.S)
        assert block is not None
        keys = {name: Nkey() for name in ("RUNCTLD", "ALICE", "BOB")}
        self.box = box
        public = {name: key.public for name, key in keys.items()}
        self.server = cluster(conf=conf + block[1], env=public)
        files = {name: key.file(path / f"{name}.nk") for name, key in keys.items()}

        def nats(name: str, prefix: str) -> str:
            return f'nkey = "{files[name]}"\ninbox_prefix = "{prefix}"\n'

        url = f'url = "{self.server.url}"\n'
        configure(box, self.server, nats("RUNCTLD", "_INBOX.runctld"))
        self.alice = operator_file(path / "alice.toml", url + nats("ALICE", "_INBOX.alice"))
        self.bob = operator_file(path / "bob.toml", url + nats("BOB", "_INBOX.bob"))
        self.nosy = operator_file(path / "nosy.toml", url + nats("BOB", "_INBOX.alice"))
        self.lost = operator_file(path / "lost.toml", url + f'nkey = "{files["BOB"]}"\n')
        box.start()


@pytest.fixture
def permitted(stopped_box: Box, cluster: Callable[..., Cluster], tmp_path: Path) -> Permitted:
    return Permitted(stopped_box, cluster, tmp_path)


def ask_as(file: Path, subject: str, request: messages.Request) -> messages.Reply:
    async def main() -> messages.Reply:
        link = await dial(load(file, client=True))
        try:
            answer = await link.request(subject, messages.encode(request), DEADLINE)
            return messages.decode_reply(answer)
        finally:
            await link.close()

    return asyncio.run(main())


def test_an_operator_may_all(permitted: Permitted) -> None:
    alice = permitted.alice
    run = runctl(alice, "submit", "t", "--", sys.executable, "-uc", TICKS % (6000, 0.1), code=0)[
        0
    ].strip()
    wait_until(lambda: _running(alice, run), "it runs")
    runctl(alice, "abort", "t", code=0)
    runctl(alice, "wait", run, code=5)
    again = runctl(alice, "retry", run, code=0)[0].strip()
    runctl(alice, "abort", "t", "--run", again, code=0)
    runctl(alice, "purge", "t", "--yes", code=0)
    assert json.loads(runctl(alice, "status", "--json", code=0)[0])["nats"]["connected"]
    assert "does not allow" not in permitted.box.log.read_text()
    assert permitted.box.term() == 0
    assert "does not allow" not in permitted.box.log.read_text()


def _running(file: Path, run: str) -> bool:
    return json.loads(runctl(file, "show", run, "--json", code=0)[0])["status"] == "running"


def test_a_watcher_may_watch_and_not_act(permitted: Permitted) -> None:
    bob = permitted.bob
    run = runctl(
        permitted.alice, "submit", "t", "--", sys.executable, "-uc", TICKS % (60, 0.1), code=0
    )[0].strip()
    box = permitted.box
    box.config, daemon_config = bob, box.config
    watcher = Watch(box, "t")
    box.config = daemon_config
    watcher.wait_chunks(3)
    for verb, *args in (
        ("abort", "t"),
        ("submit", "t", "--", "true"),
        ("retry", run),
        ("purge", "t", "--yes"),
    ):
        _, err = runctl(bob, verb, *args, code=6)
        assert err == (
            f"runctl: NATS does not allow this user to {verb};"
            f" ask for publish permission on runctl.ctl.any.{verb}\n"
        )
    assert [r["thread"] for r in json.loads(runctl(bob, "list", "--json", code=0)[0])] == ["t"]
    runctl(bob, "show", run, code=0)
    runctl(bob, "status", code=0)
    runctl(bob, "wait", run, code=0)
    assert watcher.wait() == 0
    assert watcher.text() == "".join(f"line-{i}\n" for i in range(60))
    out, err = runctl(bob, "attach", "t", "--no-follow", code=0)
    assert out == "".join(f"line-{i}\n" for i in range(60))
    assert err == ""
    # So much that the server asks for flow control, which is a subject as well.
    much = "import os\nfor _ in range(512): os.write(1, b'x' * 65536)"
    runctl(permitted.alice, "submit", "u", "-a", "--", sys.executable, "-c", much, code=0)
    out, err = runctl(bob, "attach", "u", "--no-follow", code=0)
    assert len(out) == 512 * 65536
    assert err == ""
    # What he leaves behind does not live for long.
    asked = {"ack_policy": "none", "inactive_threshold": 86400 * 10**9}
    with pytest.raises(Exception, match="inactive threshold exceeds"):
        make_consumer(bob, asked)
    assert make_consumer(bob, {"ack_policy": "none"})["inactive_threshold"] == 300 * 10**9


def make_consumer(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration that it then has."""

    async def main() -> dict[str, Any]:
        link = await dial(load(file, client=True))
        try:
            body = {"stream_name": subjects.STREAM, "config": config}
            return (await link.api(f"CONSUMER.CREATE.{subjects.STREAM}", body))["config"]
        finally:
            await link.close()

    return asyncio.run(main())


def test_a_verb_counts_on_its_own_subject_only(permitted: Permitted) -> None:
    """Or whoever may list could abort, by asking for it where lists are asked for."""
    request = messages.Submit("t", argv=["true"])
    reply = ask_as(permitted.bob, subjects.control_subject("list"), request)
    assert isinstance(reply, messages.Problem)
    assert reply.code == "bad-request"
    assert runctl(permitted.alice, "list", "--json", code=0)[0].strip() == "[]"


def test_an_inbox_that_is_not_ours_is_named(permitted: Permitted) -> None:
    for file, prefix in ((permitted.nosy, "_INBOX.alice"), (permitted.lost, "_INBOX")):
        for args in (("list",), ("attach", "t")):
            _, err = runctl(file, *args, code=6)
            assert f"hear answers below {prefix}: set nats.inbox_prefix" in err
            assert err.count("\n") == 1


def test_a_daemon_without_its_permissions_says_so(permitted: Permitted) -> None:
    box = permitted.box
    assert box.term() == 0
    box.configure(PATIENT + permitted.alice.read_text())
    line = refused(box, 78)
    assert "does not allow this user to" in line
    assert "docs/nats.md" in line


# ---- nuisances ---------------------------------------------------------------------------

SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)")


async def _flood(file: Path, count: int, payload: bytes, reply: str = "") -> None:
    """``count`` requests to list, whose answers nobody hears."""
    link = await dial(load(file, client=True))
    try:
        for n in range(count):
            await link.nc.publish(subjects.control_subject("list"), payload, reply=reply % n)
            if link.nc.pending_data_size > 2**20:
                await link.nc.flush()
        await link.nc.flush()
    finally:
        await link.close()


@pytest.mark.nightly
def test_a_flood_of_lists_keeps_nobody_from_the_executor(permitted: Permitted) -> None:
    """Of one who may only watch: others are answered while he waits, and his own turn comes
    once in a while."""
    runctl(permitted.alice, "submit", "t", "--", *SLEEP, code=0)
    wanted = 4000
    answers: list[bytes] = []

    async def main() -> tuple[list[messages.Reply], int]:
        all_there = asyncio.Event()
        bob = await dial(load(permitted.bob, client=True))
        alice = await dial(load(permitted.alice, client=True))

        async def heard(message: Any) -> None:
            answers.append(message.data)
            if len(answers) == wanted:
                all_there.set()

        try:
            await bob.nc.subscribe("_INBOX.bob.flood.*", cb=heard, pending_msgs_limit=0)
            for n in range(wanted):
                subject, reply = subjects.control_subject("list"), f"_INBOX.bob.flood.{n}"
                await bob.nc.publish(subject, messages.encode(messages.List()), reply=reply)
            await bob.nc.flush()
            kinds: list[tuple[messages.Request, Any]] = [
                (messages.List(), messages.Threads),
                (messages.Submit("u", argv=["true"]), messages.Submitted),
                (messages.Abort("t"), messages.Aborted),
            ]
            found = [
                await ask(alice, request, expect, timeout=DEADLINE) for request, expect in kinds
            ]
            served = sum(b'"threads"' in answer for answer in answers)
            await all_there.wait()
            return found, served
        finally:
            await bob.close()
            await alice.close()

    found, served = asyncio.run(main())
    assert [type(reply) for reply in found] == [
        messages.Threads,
        messages.Submitted,
        messages.Aborted,
    ]
    assert served < wanted / 4
    replies = [messages.decode_reply(answer) for answer in answers]
    refused = [reply for reply in replies if isinstance(reply, messages.Problem)]
    assert {reply.code for reply in refused} == {"busy"}
    assert len(refused) < wanted
    log = permitted.box.log.read_text()
    assert log.count(" requests to list, the last of '_INBOX.bob'") == 1


@pytest.mark.nightly
def test_a_flood_costs_no_connection_but_the_one_that_watchers_share(
    stopped_box: Box, cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """NATS cuts a connection on which more waits than it may; output goes over another."""
    permitted = Permitted(stopped_box, cluster, tmp_path, "max_pending: 2MB\n")
    box, server = permitted.box, permitted.server

    def connections() -> Any:
        try:
            return server.get(0, "connz")["connections"]
        except TimeoutError:  # it is busy
            return None

    def numbers() -> dict[str, int]:
        found = wait_until(connections, "its monitoring answers")
        found = [x for x in found if x.get("name", "").startswith("runctld ")]
        return {x["name"]: x["cid"] for x in found}

    wait_until(lambda: len(numbers()) == 2, "both are there")
    before = numbers()
    os.kill(box.pid, signal.SIGSTOP)  # it reads nothing: as slow as can be
    try:
        # More than the sockets between them hold.
        asyncio.run(_flood(permitted.bob, 600, b"x" * 65536, "_INBOX.forged%d.x"))
        wait_until(lambda: numbers() != before, "NATS has cut a connection")
    finally:
        os.kill(box.pid, signal.SIGCONT)
    (main,) = (name for name in before if not name.endswith(" for watchers"))
    wait_until(lambda: len(numbers()) == 2, "it is connected again")
    assert numbers()[main] == before[main]
    runctl(permitted.alice, "submit", "t", "-a", "--", "true", code=0)
    wait_until(
        lambda: ask_as(permitted.bob, subjects.control_subject("list"), messages.List()), "lists"
    )


def test_who_is_busy_is_asked_again(nats_server: str, tmp_path: Path) -> None:
    async def main() -> None:
        link = await dial(load(operator_file(tmp_path / "x.toml", f'url = "{nats_server}"\n')))
        busy = [messages.Problem("busy", "too many")] * 2
        left: list[messages.Reply] = [*busy, messages.Aborted(["r"])]

        async def answer(message: Any) -> None:
            await message.respond(messages.encode(left.pop(0)))

        subject = subjects.control_subject("abort")
        try:
            await link.nc.subscribe(subject, cb=answer)
            assert (await ask(link, messages.Abort("t"), messages.Aborted)).runs == ["r"]
            left += busy
            with pytest.raises(Busy, match="too many"):
                await ask(link, messages.Abort("t"), messages.Aborted, patience=0)
            assert len(left) == 1
        finally:
            await link.close()

    asyncio.run(main())


# ---- acks --------------------------------------------------------------------------------


async def test_a_refused_publish_is_not_taken_for_stored(cluster: Callable[..., Cluster]) -> None:
    """JetStream's refusals carry a sequence too; a fenced writer must not go on."""
    import trio_asyncio
    from runctl.config.schema import Config, Nats
    from runctl.supervisor.messaging.connection import connect
    from runctl.supervisor.output.backpressure import Backpressure
    from runctl.supervisor.output.publisher import Streams

    config = Config(state_dir=Path(), nats=Nats(cluster().url))
    async with trio_asyncio.open_loop(), connect(config, "e", None) as connection:
        streams = Streams(connection.client, Backpressure())
        await streams.open(config)
        subject = subjects.out_subject("t", "r")
        first = await streams.publish(subject, records.Reset("r", 1, 0.0), 0)
        assert first is not None
        record = records.Chunks(1, 1, 0.0, [records.Chunk("stdout", b"x")])
        assert await streams.publish(subject, record, first + 7) is None
        assert (await streams.tail(subject)).sequence == first
        assert await streams.publish(subject, record, first) is not None


def test_a_flush_whose_answer_is_lost_asks_again(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.start()

    async def main() -> None:
        client = new_client(Nats(node.url))
        wait: Any = 0.05
        await client.connect([node.url], reconnect_time_wait=wait, max_reconnect_attempts=-1)
        assert node.pid is not None
        os.kill(node.pid, signal.SIGSTOP)
        flush = asyncio.create_task(client.flush())
        await asyncio.sleep(0.2)  # its question is on its way, and is never answered
        node.kill()
        node.start()
        await flush
        await client.close()

    try:
        asyncio.run(main())
    finally:
        node.kill()


def test_an_attempt_that_failed_leaves_no_connection() -> None:
    """nats-py forgets those whose server answers, but does not let it in."""
    info = b'INFO {"server_id": "x", "max_payload": 1048576}\r\n'
    left: list[socket.socket] = []

    def asked(listener: socket.socket) -> socket.socket:
        """Of a client that did not give up before its time."""
        while True:
            line, _ = listener.accept()
            with suppress(ConnectionError):
                line.sendall(info)
                heard = b""
                while data := line.recv(4096):
                    heard += data
                    if b"PING\r\n" in heard:
                        return line
            line.close()

    def serve(listener: socket.socket) -> None:
        for answer in (b"PONG\r\n", b"-ERR 'not now'\r\n", b"PONG\r\n"):
            line = asked(listener)
            line.sendall(answer)
            left.append(line)
            if len(left) == 1:
                line.shutdown(socket.SHUT_WR)
        while heard := line.recv(4096):
            line.sendall(b"PONG\r\n" * heard.count(b"PING\r\n"))

    async def main(url: str) -> None:
        client = new_client(Nats(url))
        again = asyncio.Event()

        async def on_reconnected() -> None:
            again.set()

        wait: Any = 0.01
        await client.connect(url, reconnect_time_wait=wait, reconnected_cb=on_reconnected)
        await again.wait()
        left[1].settimeout(DEADLINE)
        assert await asyncio.to_thread(left[1].recv, 1) == b""
        await client.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=[listener], daemon=True)
        thread.start()
        asyncio.run(main(f"nats://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join()
    for line in left:
        line.close()
