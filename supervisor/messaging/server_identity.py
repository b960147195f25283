"""The key pair by which clients know the embedded nats-server, in one file that is ours alone.

Its certificate is valid for ever, since it is not trusted for what it says but for being the
one that clients were given: RFC 5280, 4.1.2.5, has the end of year 9999 for that.
"""

from __future__ import annotations

import datetime
import logging
import os
import ssl
import stat
import time
from pathlib import Path
from typing import Any

from ...config.connection import EMBEDDED_NAME, pin_certificate
from ..host.private_files import write_private

log = logging.getLogger("runctld.broker")

#: Below the folder of the server: its certificate and its key, PEM.
FILE = "server.pem"
#: Another one when what is in the certificate changes: older ones are then replaced.
COMMON_NAME = "runctl embedded NATS server 1"
#: One that has no more than this left is replaced, seconds.
LEAST_LEFT = 90 * 86400.0
#: Also what else an operator's tools may call it; all of loopback is reached by the first.
_ADDRESSES = ("127.0.0.1", "::1")
_END = "-----END CERTIFICATE-----\n"


class _Unfit(Exception):
    """The file cannot be used; why, in some words."""


def prepare_identity(folder: Path) -> str:
    """The certificate, PEM, of the key pair in ``folder``; both are made where there are none
    that serve. Slow then. Raises OSError."""
    path = folder / FILE
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except (_Unfit, OSError, ValueError) as error:
        log.warning("%s cannot be used (%s): it is made anew", path, error)
    certificate, key = _make()
    write_private(path, (certificate + key).encode())
    return certificate


def _read(path: Path) -> str:
    """Raises _Unfit, OSError (SSLError among them), ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(fd, encoding="ascii") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise _Unfit("it is not our own")
        if found.st_mode & 0o077:
            raise _Unfit("others could read the key")
        certificate, end, _ = file.read(100_000).partition(_END)
    if not end:
        raise _Unfit("it holds no certificate")
    certificate += end
    shown = _handshake(path, certificate)
    if (("commonName", COMMON_NAME),) not in shown["subject"]:
        raise _Unfit("it is another version's")
    if ssl.cert_time_to_seconds(shown["notAfter"]) - time.time() < LEAST_LEFT:
        raise _Unfit(f"it expires on {shown['notAfter']}")
    return certificate


def _handshake(path: Path, certificate: str) -> dict[str, Any]:
    """What a client sees of the certificate, once it has taken the server that has the key
    pair in ``path``. Raises SSLError, ValueError."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = pin_certificate(certificate).wrap_bio(back, there, server_hostname=EMBEDDED_NAME)
    answering = server.wrap_bio(there, back, server_side=True)
    for _ in range(2):  # a hello, and what the other says to it
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = asking.getpeercert()
    if not shown:
        raise _Unfit("no handshake can be done with it")
    return dict(shown)


def _make() -> tuple[str, str]:
    """(certificate, key), PEM."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, COMMON_NAME)])
    names: list[x509.GeneralName] = [x509.DNSName(EMBEDDED_NAME)]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in _ADDRESSES]
    usage = [ExtendedKeyUsageOID.SERVER_AUTH]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Whatever the clock says here, or will say.
        .not_valid_before(datetime.datetime(1970, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    kept = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made.public_bytes(pem).decode(), kept.decode()
