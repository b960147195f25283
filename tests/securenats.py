"""Real nats-servers for the tests: one, or a cluster, with what their users need.

``Cluster(path, 3)`` starts three with JetStream, on loopback; ``kill`` and ``start`` take
a number. ``conf`` is added to each server's configuration (users, for example).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import nkeys
from conftest import wait_until
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pgserver import free_port
from runctl.supervisor.messaging.embedded_server import find_server_binary


class Certificates:
    """A CA in ``path``/ca.pem; ``make(name)`` gives NAME.pem and NAME-key.pem."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.ca = path, path / "ca.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{path.name} CA")])
        made = self._sign(self._name, self._key, [], ca=True)
        self.ca.write_bytes(made.public_bytes(serialization.Encoding.PEM))

    def make(self, name: str, *hosts: str) -> tuple[Path, Path]:
        """(certificate, key), for servers at ``hosts`` and for clients."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._sign(subject, key, list(hosts), ca=False)
        cert_file, key_file = self.path / f"{name}.pem", self.path / f"{name}-key.pem"
        cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert_file, key_file

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, hosts: list[str], *, ca: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False
            )
        )
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            made = made.add_extension(usage, critical=True)
        if names:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(self._key, hashes.SHA256())


class Nkey:
    """A new nkey; ``seed`` and ``public`` are as in files and configurations."""

    def __init__(self, kind: int = nkeys.PREFIX_BYTE_USER) -> None:
        self.seed = nkeys.encode_seed(os.urandom(32), kind).decode()
        self.public = self.pair.public_key.decode()

    @property
    def pair(self) -> nkeys.KeyPair:
        return nkeys.from_seed(bytearray(self.seed.encode()))

    def file(self, path: Path) -> Path:
        path.write_text(self.seed + "\n")
        path.chmod(0o600)
        return path

    def jwt(self, subject: str, name: str, nats: dict[str, Any], **claims: Any) -> str:
        """A NATS JWT of ``subject``, signed by us."""
        body = {"iat": int(time.time()), "iss": self.public, "name": name, "sub": subject}
        body |= {"nats": nats | {"version": 2}} | claims
        unhashed = json.dumps(body, sort_keys=True).encode()
        body["jti"] = base64.b32encode(hashlib.sha256(unhashed).digest()).decode().rstrip("=")
        head = _segment({"typ": "JWT", "alg": "ed25519-nkey"})
        text = f"{head}.{_segment(body)}"
        return f"{text}.{_base64(self.pair.sign(text.encode()))}"


def _segment(value: dict[str, Any]) -> str:
    return _base64(json.dumps(value, sort_keys=True).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class Operator:
    """An operator with one account that has JetStream; ``conf`` goes to the servers."""

    def __init__(self) -> None:
        operator, system = Nkey(nkeys.PREFIX_BYTE_OPERATOR), Nkey(nkeys.PREFIX_BYTE_ACCOUNT)
        self.account = Nkey(nkeys.PREFIX_BYTE_ACCOUNT)
        limits = dict.fromkeys(
            ("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1
        )
        limits["wildcards"] = True
        storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        signed = operator.jwt(
            operator.public, "O", {"type": "operator", "system_account": system.public}
        )
        accounts = {
            key.public: operator.jwt(key.public, name, {"type": "account", "limits": limits | more})
            for key, name, more in ((system, "SYS", {}), (self.account, "A", storage))
        }
        preload = "\n".join(f"{public}: {jwt}" for public, jwt in accounts.items())
        self.conf = (
            f"operator: {signed}\nsystem_account: {system.public}\n"
            f"resolver: MEMORY\nresolver_preload: {{\n{preload}\n}}\n"
        )

    def credentials(self, file: Path, **claims: Any) -> Path:
        """A user's .creds file; ``exp``: Unix seconds at which they expire."""
        user = Nkey()
        limits = {"subs": -1, "data": -1, "payload": -1}
        jwt = self.account.jwt(user.public, "U", {"type": "user", **limits}, **claims)
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            "************************* IMPORTANT *************************\n"
            "NKEY Seed printed below can be used to sign and prove identity.\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        return file


class Cluster:
    """``size`` servers with JetStream whose ports and stores survive their kills."""

    def __init__(
        self,
        path: Path,
        size: int = 3,
        *,
        conf: str = "",
        certificates: Certificates | None = None,
        tls_conf: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        """``tls_conf``: added to the block "tls", with ``certificates``."""
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.size, self.certificates = path, size, certificates
        self.ports = [free_port() for _ in range(size)]
        self._http = [free_port() for _ in range(size)]
        self._env = os.environ | (env or {})
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * size
        routes = [free_port() for _ in range(size)]
        for n in range(size):
            text = (
                f'server_name: n{n}\nlisten: "127.0.0.1:{self.ports[n]}"\n'
                f'http: "127.0.0.1:{self._http[n]}"\n'
                f'jetstream {{ store_dir: "{path / f"store{n}"}" }}\n'
            )
            if size > 1:
                urls = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
                text += (
                    f'cluster {{ name: c, listen: "127.0.0.1:{routes[n]}", routes: [{urls}] }}\n'
                )
            if certificates is not None:
                cert, key = certificates.make(f"n{n}", "127.0.0.1")
                text += f'tls {{ cert_file: "{cert}", key_file: "{key}"\n{tls_conf} }}\n'
            (path / f"n{n}.conf").write_text(text + conf)
        try:
            for n in range(size):
                self.start(n, wait=False)
            for n in range(size):
                self.wait(n)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        scheme = "nats" if self.certificates is None else "tls"
        return ",".join(f"{scheme}://127.0.0.1:{port}" for port in self.ports)

    def start(self, n: int = 0, *, wait: bool = True) -> None:
        with (self.path / f"n{n}.log").open("ab") as log:
            self._processes[n] = subprocess.Popen(
                [find_server_binary(), "-c", str(self.path / f"n{n}.conf")],
                stderr=log,
                env=self._env,
            )
        if wait:
            self.wait(n)

    def wait(self, n: int) -> None:
        """Until it serves JetStream; in a cluster, until that has a leader it knows."""
        process = self._processes[n]
        assert process is not None

        def ready() -> bool:
            assert process.poll() is None, (self.path / f"n{n}.log").read_text()
            try:
                health = self.get(n, "healthz")
                meta = self.get(n, "jsz").get("meta_cluster", {})
            except OSError:
                return False
            return health["status"] == "ok" and (self.size == 1 or bool(meta.get("leader")))

        wait_until(ready, f"NATS server {n} is ready")

    def leader(self) -> int:
        """The number of the server that leads the stream RUNCTL."""

        def leader() -> str:
            for n, process in enumerate(self._processes):
                if process is None:
                    continue
                try:
                    details = self.get(n, "jsz?streams=1&accounts=1").get("account_details", [])
                except OSError:  # one that starts, or is stopped
                    continue
                for account in details:
                    for stream in account.get("stream_detail", []):
                        if stream["name"] == "RUNCTL":
                            return str(stream["cluster"].get("leader", ""))
            return ""

        return int(wait_until(leader, "the stream RUNCTL has a leader").removeprefix("n"))

    def get(self, n: int, what: str) -> Any:
        """What the monitoring of server ``n`` says of ``what``."""
        url = f"http://127.0.0.1:{self._http[n]}/{what}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)

    def kill(self, n: int = 0) -> None:
        self.signal(n, signal.SIGKILL)
        process = self._processes[n]
        assert process is not None
        process.wait()
        self._processes[n] = None

    def signal(self, n: int, number: int) -> None:
        process = self._processes[n]
        assert process is not None
        process.send_signal(number)

    def close(self) -> None:
        for n, process in enumerate(self._processes):
            if process is not None:
                self.kill(n)
