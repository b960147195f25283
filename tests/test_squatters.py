"""Another local user takes the embedded nats-server's port: nothing is told to it, nothing is
taken from it, and nothing is stopped by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nats
import pytest
from conftest import Box, Watch, wait_until
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from natsserver import embedded
from proc import children
from runctl.cli.health import local_checks, remote_checks
from runctl.client.link import Impostor, dial
from runctl.config import connection
from runctl.config.schema import Config
from runctl.protocol import messages, subjects
from runctl.protocol.endpoint import ENDPOINT_FILE
from runctl.protocol.errors import Unavailable
from runctl.supervisor.messaging.server_identity import COMMON_NAME, FILE, prepare_identity
from squatter import NOBODY, Squatter
from test_watch import Server

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

#: A run that is interrupted, and ends at its second attempt.
TWICE = """
import os, time
print('here', flush=True)
if os.environ['RUNCTL_ATTEMPT'] == '1':
    time.sleep(600)
"""


def told(box: Box) -> tuple[int, str]:
    """(port, password) that clients read."""
    found = json.loads((box.state / ENDPOINT_FILE).read_text())
    return int(found["url"].rpartition(":")[2]), found["password"]


def hellos_only(heard: bytes, *secrets: str) -> None:
    """TLS records of handshakes, and none of what is said after one."""
    for secret in (*secrets, "CONNECT", "PING", "SUB", "runctl."):
        assert secret.encode() not in heard, f"the squatter heard {secret}"
    while heard:
        assert heard[:2] == b"\x16\x03", heard[:100]
        heard = heard[5 + int.from_bytes(heard[3:5]) :]


@root
@pytest.mark.nightly
def test_who_takes_the_port_hears_no_secret_and_runs_nothing(box: Box) -> None:
    evil = box.path / "evil"
    box.path.chmod(0o777)
    order = messages.encode(messages.Submit("evil", argv=["touch", str(evil)]))
    subject = subjects.control_subject("submit")
    box.submit_py("t", TWICE)
    watcher = Watch(box, "t")
    watcher.wait_chunks(1)

    # While the nats-server is away for a moment.
    port, password = told(box)
    with Squatter(port, box.path, subject=subject, order=order) as squatter:

        def killed() -> bool:
            for server in children(box.pid, "nats-server"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)
            time.sleep(0.2)
            return squatter.bound

        wait_until(killed, "the squatter is quicker than the daemon once")
        squatter.wait_heard()
        wait_until(lambda: told(box)[0] != port, "the daemon moves to another port")
        wait_until(lambda: box.runctl("list", code=None), "it serves there")
        moved, second = told(box)
        assert second != password
        hellos_only(squatter.heard, password, second)
    assert f"port {port} was taken by another program; moving" in box.log.read_text()

    # While the daemon is down: the next command, and an attach that waits.
    box.kill()
    with Squatter(moved, box.path, subject=subject, order=order) as squatter:
        squatter.wait_bound()
        box.runctl("list", code=4)
        (line,) = box.stderr.splitlines()
        assert line.startswith(
            f"runctl: port {moved} of the embedded NATS server is answered by somebody else"
        )
        assert "start runctld" in line
        box.runctl("submit", "t", "--", "true", code=4)
        said = json.loads(box.runctl("doctor", "--json", code=None))["findings"]
        (found,) = (x for x in said if x["check"] == "nats port")
        assert found["state"] == "warn"
        who = f"somebody else (user id {NOBODY}) listens on {moved}, where our nats-server was"
        assert found["said"].startswith(who)
        assert watcher.process.poll() is None, "attach waits on"
        box.start()
        assert told(box)[0] != moved
        assert watcher.wait() == 0
        assert watcher.text() == "here\n"
        hellos_only(squatter.heard, password, second, told(box)[1])
    assert not evil.exists()
    assert {row["thread"] for row in box.json("list")} == {"t"}

    async def knock(secret: str) -> None:
        there = embedded(box.state)
        options = connection.make_options(there) | {"password": secret, "allow_reconnect": False}
        client = nats.NATS()
        try:
            await client.connect(there.url, error_cb=ignore, **options)
        finally:  # who is refused leaves its transport open
            await client.close()

    for old in (password, second):
        with pytest.raises(nats.errors.Error, match="Authorization Violation"):
            asyncio.run(knock(old))
    asyncio.run(knock(told(box)[1]))


async def ignore(_: Exception) -> None:
    pass


# ---- the command line alone ------------------------------------------------------------------


def test_doctor_knows_our_own_server_from_another(tmp_path: Path) -> None:
    def ports() -> list[tuple[str, str]]:
        _, reached, _ = asyncio.run(remote_checks.nats(server.config, None))
        found = local_checks.check_ports(server.config, ours=reached)
        return [(x.state, x.said.replace(str(server.port), "PORT")) for x in found]

    server = Server(tmp_path)
    try:
        assert ports() == [("ok", "our own nats-server answers there, without a daemon")]
    finally:
        server.kill()
    assert ports() == [("ok", "PORT is free")]
    with socket.create_server(("127.0.0.1", server.port)):
        (found,) = ports()
        mine = f"another program of the daemon's user (id {os.geteuid()}) listens on PORT"
        assert found[0] == "warn"
        assert found[1].startswith(mine)


@root
@pytest.mark.parametrize("kind", ["plain", "its own certificate", "silent"])
def test_runctl_tells_a_squatter_nothing(tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o777)
    state = tmp_path / "state"
    state.mkdir()
    server = Server(state)
    server.kill()
    pair = None
    if kind == "its own certificate":  # the same in all that can be read of it
        (tmp_path / "pair").mkdir()
        prepare_identity(tmp_path / "pair")
        pair = tmp_path / "pair" / "server.pem"
    with Squatter(server.port, tmp_path, pair=pair, talks=kind != "silent") as squatter:
        squatter.wait_bound()
        with pytest.raises(Unavailable) as caught:
            asyncio.run(dial(server.config))
        said = str(caught.value)
        if kind == "silent":
            assert f"127.0.0.1:{server.port} does not answer" in said
        else:
            assert isinstance(caught.value, Impostor)
            assert f"port {server.port} of the embedded NATS server" in said
        if pair is None:
            hellos_only(squatter.heard, '"p"')
        else:  # behind a handshake, which was not finished
            assert squatter.heard == b""


def test_an_older_daemons_server_is_told_no_password(tmp_path: Path) -> None:
    """It cannot be known by its certificate, so it may be anybody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        (tmp_path / "nats").mkdir()
        port = listener.getsockname()[1]
        (tmp_path / ENDPOINT_FILE).write_text(
            json.dumps({"url": f"nats://127.0.0.1:{port}", "user": "u", "password": "p"})
        )
        with pytest.raises(Unavailable, match=r"older runctld's.*; restart runctld"):
            asyncio.run(dial(Config(state_dir=tmp_path)))
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("certificate", ["x", "-----BEGIN CERTIFICATE-----\nxx\n", "\0", "é"])
def test_a_damaged_file_for_clients_is_one_line(tmp_path: Path, certificate: str) -> None:
    (tmp_path / "nats").mkdir()
    endpoint = {"url": "nats://127.0.0.1:1", "user": "u", "password": "p"}
    (tmp_path / ENDPOINT_FILE).write_text(json.dumps(endpoint | {"certificate": certificate}))
    with pytest.raises(Unavailable, match=r"client.json cannot be used .*; restart runctld"):
        asyncio.run(dial(Config(state_dir=tmp_path)))


def test_a_server_that_was_replaced_meanwhile_is_found(tmp_path: Path) -> None:
    """Another password, between what was read and what is true when it is used."""
    state = tmp_path / "state"
    state.mkdir()
    server = Server(state)
    file = state / ENDPOINT_FILE
    right = file.read_bytes()
    file.write_bytes(right.replace(b'"password":"p"', b'"password":"old"'))

    async def main() -> None:
        task = asyncio.create_task(dial(server.config))
        await asyncio.sleep(0)  # it has read the file
        file.write_bytes(right)
        await (await task).close()

    try:
        asyncio.run(main())
        file.write_bytes(right.replace(b'"password":"p"', b'"password":"old"'))
        with pytest.raises(Unavailable, match="another password by now; restart runctld"):
            asyncio.run(dial(server.config))
    finally:
        server.kill()


# ---- the key pair -----------------------------------------------------------------------------


def certificate_of(
    path: Path,
    *,
    common_name: str = COMMON_NAME,
    left: timedelta = timedelta(days=3650),
    host: str = "localhost",
) -> None:
    """A pair like ours, made by others."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, common_name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=4000))
        .not_valid_after(datetime.now(UTC) + left)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form, bare = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, form, bare))
    path.chmod(0o600)


def test_the_key_pair_is_kept_and_is_ours_alone(tmp_path: Path) -> None:
    made = prepare_identity(tmp_path)
    file = tmp_path / FILE
    before = file.read_bytes()
    assert prepare_identity(tmp_path) == made
    assert file.read_bytes() == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [x.name for x in tmp_path.iterdir()] == [FILE]
    certificate_of(file)
    assert prepare_identity(tmp_path) != made, "one that serves is taken"
    assert b"BEGIN PRIVATE KEY" in file.read_bytes()


def _swap(file: Path) -> None:
    """The certificate of one, the key of another."""
    certificate, mark, _ = file.read_bytes().partition(b"-----BEGIN PRIVATE")
    certificate_of(file)
    file.write_bytes(certificate + mark + file.read_bytes().partition(mark)[2])


DAMAGE: dict[str, Any] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[:400]),
    "no key": lambda file: file.write_bytes(file.read_bytes().partition(b"-----BEGIN PRIV")[0]),
    "not text": lambda file: file.write_bytes(b"\xff\0" * 500),
    "a bit": lambda file: file.write_bytes(file.read_bytes().replace(b"MII", b"MIJ", 1)),
    "another key": _swap,
    "expired": lambda file: certificate_of(file, left=timedelta(days=-1)),
    "expires soon": lambda file: certificate_of(file, left=timedelta(days=30)),
    "an older version's": lambda file: certificate_of(file, common_name="runctl 0"),
    "another host's": lambda file: certificate_of(file, host="example.org"),
    "open to others": lambda file: file.chmod(0o644),
    "a link": lambda file: (file.rename(file.with_name("x")), file.symlink_to("x")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_pair_that_does_not_serve_is_made_anew(tmp_path: Path, damage: str) -> None:
    made = prepare_identity(tmp_path)
    file = tmp_path / FILE
    DAMAGE[damage](file)
    again = prepare_identity(tmp_path)
    assert again != made
    assert prepare_identity(tmp_path) == again
    assert stat.S_IMODE(file.lstat().st_mode) == 0o600
