"""How to connect to NATS, for the daemon and the command line alike: nats-py's options
from a ``Nats``, a client that keeps to TLS, and words for why NATS does not let us in.

The embedded server is known by its certificate alone, which clients read beside its address
in a file of their user's: whoever else answers at its port hears a ClientHello, and no more.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from .files import MOST_KEYS, read_bounded
from .nats import CONTEXT_KEYS
from .outgoing import key_log_problem
from .schema import FileError, Nats
from .secrets import hide_secrets

if TYPE_CHECKING:
    import ssl

    from nats.aio.client import Client

_CREDENTIALS = re.compile(
    rb"-BEGIN NATS USER JWT-+\s+(\S+)\s+-+END NATS USER JWT-"
    rb".*-BEGIN USER NKEY SEED-+\s+(\S+)\s+-+END USER NKEY SEED-",
    re.DOTALL,
)
_SEED = re.compile(rb"^SU[A-Z2-7]{56}$", re.MULTILINE)
_DENIED = re.compile(
    r'permissions violation for (publish|subscription)( to|) "([^"]*)"', re.IGNORECASE
)


#: The name in the embedded server's certificate, by whatever address it is reached.
EMBEDDED_NAME = "localhost"
#: What is said of a server that has no TLS.
NO_TLS = "nats: the server does not require TLS"


def list_servers(nats: Nats) -> list[str]:
    return [url.strip() for url in nats.url.split(",") if url.strip()]


def find_missing_package(nats: Nats) -> str | None:
    """What ``nats.url`` needs that is not there, and what to do."""
    if not any(url.startswith(("ws://", "wss://")) for url in list_servers(nats)):
        return None
    if find_spec("aiohttp") is not None:
        return None
    return (
        "nats.url: ws:// and wss:// need a package that is not installed: pip install aiohttp,"
        " or use tls://"
    )


def name_servers(nats: Nats) -> str:
    """The servers, for messages."""
    return ", ".join(map(hide_secrets, list_servers(nats)))


def make_options(nats: Nats) -> dict[str, Any]:
    """nats-py's options that say who we are, and how to know the server.

    Raises FileError, which names the key of a file that cannot be used; ConfigError, when the
    nats-py that is installed lacks what is used of it."""
    from . import nats_internals  # noqa: F401

    found: dict[str, Any] = {"inbox_prefix": nats.inbox_prefix}
    if nats.tls_first or nats.certificate:
        found["tls_handshake_first"] = True
    if nats.certificate:
        found |= {"tls": pin_certificate(nats.certificate), "tls_hostname": EMBEDDED_NAME}
    elif nats.tls:
        found["tls"] = _make_tls_context(nats)
    if nats.login is not None:
        login = nats.login
        found |= {"user": login.user, "password": login.password, "token": login.token}
    elif nats.credentials is not None:
        credentials = nats.credentials
        _check_seed(nats, "credentials", _read_credentials(nats, credentials)[1])
        # Read at each reconnection: a JWT is short-lived, and its file is replaced.
        found["user_jwt_cb"] = lambda: _read_again(nats, credentials)[0]
        found["signature_cb"] = lambda nonce: _sign(_read_again(nats, credentials)[1], nonce)
    elif nats.nkey is not None:
        seed = _SEED.search(_read_keys(nats, "nkey", nats.nkey).replace(b"\r", b""))
        if seed is None:
            raise _make_error(nats, "nkey", "holds no user's seed (SU...): name an nkey seed file")
        _check_seed(nats, "nkey", seed[0])
        found["nkeys_seed_str"] = seed[0].decode()
    return found


@functools.lru_cache(maxsize=4)
def pin_certificate(certificate: str) -> ssl.SSLContext:
    """Takes the server that has this certificate, PEM, and no other. Raises ValueError or
    SSLError (an OSError): it is none."""
    import ssl

    if not certificate.isascii():
        raise ValueError("its certificate is not ASCII")
    # Not create_default_context: it would log keys for SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=certificate)
    return context


def new_client(nats: Nats, now: Callable[[], Nats] | None = None) -> Client:
    """A client, not connected. With ``nats.tls`` it says nothing to a server without TLS.

    ``now``: where the embedded server is, and how to know it, at the time of each connection."""
    from . import nats_internals

    if nats.certificate:
        return nats_internals.EmbeddedClient(now or (lambda: nats), pin_certificate)
    if nats.tls:
        return nats_internals.TlsClient(first=nats.tls_first)
    return nats_internals.SturdyClient()


def explain_refusal(nats: Nats, cause: Exception) -> str | None:
    """Why the server will not have us, or we not the server, and what to do; None when
    ``cause`` may pass by itself."""
    import ssl

    if (problem := key_log_problem(cause)) is not None:
        return f"{problem.said}: {problem.fix}"
    text = str(cause).lower()
    if nats.certificate:
        return _explain_embedded_refusal(nats, cause)
    if "authorization violation" in text or "authentication expired" in text:
        kind = next((k for k in ("credentials", "nkey") if getattr(nats, k) is not None), None)
        if kind is not None:
            what = f"{_name_key(nats, kind)} ({getattr(nats, kind)})"
        elif nats.login is not None:
            what = f'"user" and "password", or "token", in {nats.context}'
        elif "@" in nats.url:
            what = "the user and password in nats.url"
        elif nats.tls_cert is not None:
            what = f"{_name_key(nats, 'tls_cert')} ({nats.tls_cert})"
        else:
            return (
                f"NATS at {name_servers(nats)} wants credentials:"
                " set nats.credentials, nats.nkey or nats.context"
            )
        how = "which have expired" if "expired" in text else "or have the server accept them"
        return f"NATS at {name_servers(nats)} refused the credentials: correct {what}, {how}"
    if NO_TLS in text or str(cause) == NO_TLS:
        return (
            f"NATS at {name_servers(nats)} does not require TLS, so nothing was sent to it:"
            " set up TLS there, or use nats:// and no nats.tls_ key"
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message.rstrip(".")
        fix = "give nats.url a name that is in it"
        if "mismatch" not in reason.lower():
            fix = f"set {_name_key(nats, 'tls_ca')} to the file of the CA that signed it"
        return (
            f"the certificate of NATS at {name_servers(nats)} is not valid for us ({reason}): {fix}"
        )
    if isinstance(cause, ssl.SSLError):
        reason = (cause.reason or "no reason given").replace("_", " ").lower()
        if "wrong version number" in reason or "record layer" in reason:
            fix = f"it does not begin with TLS: remove {_name_key(nats, 'tls_first')}"
        elif "certificate" in reason or "unknown ca" in reason:
            keys = f"{_name_key(nats, 'tls_cert')} and {_name_key(nats, 'tls_key')}"
            fix = f"set {keys} to what it accepts"
        else:
            fix = "compare its TLS settings with ours"
        return f"NATS at {name_servers(nats)} refused TLS ({reason}): {fix}"
    return None


def is_other_server(nats: Nats, cause: Exception) -> bool:
    """Whether ``cause`` says that somebody else answered where the embedded server was."""
    import ssl

    return bool(nats.certificate) and isinstance(cause, ssl.SSLError)


def _explain_embedded_refusal(nats: Nats, cause: Exception) -> str | None:
    if is_other_server(nats, cause):
        port = urlparse(nats.url).port
        reason = str(
            getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or cause.args[-1]
        )
        return (
            f"port {port} of the embedded NATS server is answered by somebody else"
            f" ({reason.replace('_', ' ').lower().rstrip('.')}), who was told nothing; see who it"
            f" is with: ss -ltnp sport = :{port}, and start runctld, which takes another port"
        )
    if "authorization violation" in str(cause).lower():
        return f"NATS at {name_servers(nats)} has another password by now; restart runctld"
    return None


def read_denial(cause: Exception) -> tuple[str, str] | None:
    """("publish" or "subscribe", the subject in lower case) when ``cause`` says that the
    server does not permit it."""
    found = _DENIED.search(str(cause))
    if found is None:
        return None
    return "publish" if found[1].lower() == "publish" else "subscribe", found[3].lower()


def _name_key(nats: Nats, key: str) -> str:
    """How the operator knows ``key``."""
    if nats.context is not None:
        return f'"{CONTEXT_KEYS.get(key, key)}" in {nats.context}'
    return f"nats.{key}"


def _make_error(nats: Nats, key: str, problem: str) -> FileError:
    return FileError(f"{_name_key(nats, key)}: {getattr(nats, key)}: {problem}")


def _read_keys(nats: Nats, key: str, file: Path) -> bytes:
    try:
        return read_bounded(file, MOST_KEYS)
    except FileNotFoundError:
        problem = "no such file: correct the path, or put the file there"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}): make it a file that this user may read"
    raise _make_error(nats, key, problem)


def _read_credentials(nats: Nats, file: Path) -> tuple[bytes, bytes]:
    """(JWT, seed)"""
    found = _CREDENTIALS.search(_read_keys(nats, "credentials", file))
    if found is None:
        raise _make_error(
            nats, "credentials", "is not a .creds file (a JWT and a seed): name one of `nsc`"
        )
    return found[1], found[2]


def _read_again(nats: Nats, file: Path) -> tuple[bytes, bytes]:
    try:
        return _read_credentials(nats, file)
    except FileError as error:
        raise OSError(str(error)) from None  # nats-py tries again after these, and only these


def _check_seed(nats: Nats, key: str, seed: bytes) -> None:
    import nkeys

    try:
        # nkeys itself leaves the checksum unread.
        raw = base64.b32decode(seed + b"=" * (-len(seed) % 8))
        good = nkeys.crc16(raw[:-2]) == int.from_bytes(raw[-2:], "little")
        nkeys.from_seed(bytearray(seed)).wipe()
    except Exception:  # many kinds, some of which show the seed
        good = False
    if not good:
        raise _make_error(nats, key, "its seed is damaged (checksum): copy the file again")


def _sign(seed: bytes, nonce: str) -> bytes:
    import nkeys

    pair = nkeys.from_seed(bytearray(seed))
    try:
        return base64.b64encode(pair.sign(nonce.encode()))
    finally:
        pair.wipe()


def _make_tls_context(nats: Nats) -> ssl.SSLContext:
    """Names are checked against certificates as ever: create_default_context does."""
    import ssl

    for key in ("tls_ca", "tls_cert", "tls_key"):
        file = getattr(nats, key)
        if file is not None:
            _read_keys(nats, key, file)
    try:
        context = ssl.create_default_context(cafile=nats.tls_ca)
    except ssl.SSLError:
        raise _make_error(nats, "tls_ca", "holds no certificate: name a PEM file") from None
    except OSError as error:
        raise FileError(explain_refusal(nats, error) or str(error)) from None
    if nats.tls_cert is not None:
        assert nats.tls_key is not None
        if b"ENCRYPTED" in _read_keys(nats, "tls_key", nats.tls_key):
            raise _make_error(nats, "tls_key", "is encrypted: store it without a password")
        try:
            context.load_cert_chain(nats.tls_cert, nats.tls_key)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise _make_error(
                    nats, "tls_key", f"is not the key of {nats.tls_cert}: name the right one"
                ) from None
            raise _make_error(
                nats, "tls_cert", f"cannot be used with {nats.tls_key}: name two PEM files"
            ) from None
    return context
