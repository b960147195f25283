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


def servers(nats: Nats) -> list[str]:
    return [url.strip() for url in nats.url.split(",") if url.strip()]


def not_installed(nats: Nats) -> str | None:
    """What ``nats.url`` needs that is not there, and what to do."""
    if not any(url.startswith(("ws://", "wss://")) for url in servers(nats)):
        return None
    if find_spec("aiohttp") is not None:
        return None
    return (
        "nats.url: ws:// and wss:// need a package that is not installed: pip install aiohttp,"
        " or use tls://"
    )


def where(nats: Nats) -> str:
    """The servers, for messages."""
    return ", ".join(map(hide_secrets, servers(nats)))


def options(nats: Nats) -> dict[str, Any]:
    """nats-py's options that say who we are, and how to know the server.

    Raises FileError, which names the key of a file that cannot be used."""
    found: dict[str, Any] = {"inbox_prefix": nats.inbox_prefix}
    if nats.tls_first or nats.certificate:
        found["tls_handshake_first"] = True
    if nats.certificate:
        found |= {"tls": pinned(nats.certificate), "tls_hostname": EMBEDDED_NAME}
    elif nats.tls:
        found["tls"] = _tls(nats)
    if nats.login is not None:
        login = nats.login
        found |= {"user": login.user, "password": login.password, "token": login.token}
    elif nats.credentials is not None:
        credentials = nats.credentials
        _check_seed(nats, "credentials", _read_credentials(nats, credentials)[1])
        # Read at each reconnection: a JWT is short-lived, and its file is replaced.
        found["user_jwt_cb"] = lambda: _reread(nats, credentials)[0]
        found["signature_cb"] = lambda nonce: _sign(_reread(nats, credentials)[1], nonce)
    elif nats.nkey is not None:
        seed = _SEED.search(_read(nats, "nkey", nats.nkey).replace(b"\r", b""))
        if seed is None:
            raise _unusable(nats, "nkey", "holds no user's seed (SU...): name an nkey seed file")
        _check_seed(nats, "nkey", seed[0])
        found["nkeys_seed_str"] = seed[0].decode()
    return found


@functools.lru_cache(maxsize=4)
def pinned(certificate: str) -> ssl.SSLContext:
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
    """A client, not connected. nats-py goes on without TLS when the server's first, plain
    words say that it has none, so whoever can change them would read everything: with
    ``nats.tls`` this client says nothing to such a server.

    ``now``: where the embedded server is, and how to know it, at the time of each connection."""
    client: Client
    if nats.certificate:
        client = _embedded_type()(now or (lambda: nats))
        return client
    if not nats.tls:
        return _client_type()()
    from nats.errors import Error

    class TlsClient(_client_type()):  # type: ignore[misc]
        def _connect_command(self) -> bytes:
            # Of this server: those of one configuration may differ.
            scheme = self._current_server.uri.scheme
            first = nats.tls_first or scheme == "wss"
            if scheme == "ws" or not (first or self._server_info.get("tls_required")):
                raise Error(_NO_TLS)
            return bytes(super()._connect_command())

    client = TlsClient()
    return client


@functools.cache
def _embedded_type() -> type[Any]:
    """nats-py keeps the addresses and the password that it was given: this asks anew."""
    import ssl

    from nats.aio.transport import TcpTransport

    class EmbeddedTransport(TcpTransport):
        def __init__(self, now: Callable[[], Nats]) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self._now = now
            self._nats = now()

        async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
            self._nats = self._now()
            await super().connect(urlparse(self._nats.url), buffer_size, connect_timeout)

        async def connect_tls(
            self, uri: Any, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
        ) -> None:
            context = pinned(self._nats.certificate)
            plain: Any = self._bare_io_reader
            try:
                await super().connect_tls(EMBEDDED_NAME, context, buffer_size, connect_timeout)
            except BaseException as error:
                # Our server says nothing before it was spoken to.
                if isinstance(error, TimeoutError) and plain is not None and plain._buffer:
                    raise ssl.SSLError(0, "it does not begin with TLS") from None
                raise
            finally:
                if self._io_reader is plain:
                    # It is closed, and nobody tells those who would wait for that.
                    self._io_reader = self._io_writer = None

        def __bool__(self) -> bool:  # else nats-py makes one of its own
            return True

    class EmbeddedClient(_client_type()):  # type: ignore[misc]
        def __init__(self, now: Callable[[], Nats]) -> None:
            super().__init__()
            self._now = now
            self._transport = EmbeddedTransport(now)

        def _connect_command(self) -> bytes:
            login = self._now().login
            assert login is not None
            self.options |= {"user": login.user, "password": login.password}
            return bytes(super()._connect_command())

    return EmbeddedClient


@functools.cache
def _client_type() -> type[Client]:
    """nats-py stops reading for good, without a word, at a subject that is not UTF-8 and at
    some headers, which whoever may publish can send us: this reads on. And a flush whose
    answer went with its connection is in vain: this asks again. What does not end as the
    protocol has it, nats-py keeps in memory for as long as it comes: this ends the connection."""
    from nats.aio.client import Client
    from nats.errors import FlushTimeoutError, ProtocolError
    from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

    class BoundedParser(Parser):
        async def parse(self, data: bytes = b"") -> None:
            try:
                await super().parse(data)
            except ProtocolError:
                raise
            except Exception as error:
                raise ProtocolError(f"nats: {error!r}") from None
            line = self.state == AWAITING_CONTROL_LINE
            if (len(self.buf) if line else self.needed) > (MOST_LINE if line else MOST_MESSAGE):
                raise ProtocolError("nats: more is sent than a server may send")

    class SturdyClient(Client):
        def __init__(self) -> None:
            super().__init__()
            self._ps = BoundedParser(self)

        async def _connect_to_server(self, s: Any) -> None:
            if self._transport is not None:  # of an attempt that failed: it is only forgotten
                self._transport.close()  # type: ignore[no-untyped-call]
            await super()._connect_to_server(s)

        async def _process_err(self, err_msg: str) -> None:
            await super()._process_err(err_msg[:MOST_WORDS])

        async def flush(self, timeout: int = 10) -> None:
            for left in range(timeout, 0, -FLUSH):
                try:
                    return await super().flush(min(FLUSH, left))
                except FlushTimeoutError:
                    if left <= FLUSH:
                        raise

        async def _process_msg(
            self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
        ) -> None:
            await super()._process_msg(sid, _utf8(subject), _utf8(reply), data, headers)

        async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
            try:
                return await super()._process_headers(headers)
            except Exception:  # as if it had none
                return None

    return SturdyClient


def _utf8(text: bytes) -> bytes:
    return text if text is None or text.isascii() else text.decode(errors="replace").encode()


#: A server's longest line, which is its INFO with the addresses of a cluster; its longest
#: message (NATS has 64 MiB as the highest max_payload, headers on top); and what is kept of its
#: errors.
MOST_LINE = 1024 * 1024
MOST_MESSAGE = 72 * 1024 * 1024
MOST_WORDS = 2000
#: One PING's answer is waited for so long, seconds.
FLUSH = 2
_NO_TLS = "nats: the server does not require TLS"


def why_refused(nats: Nats, cause: Exception) -> str | None:
    """Why the server will not have us, or we not the server, and what to do; None when
    ``cause`` may pass by itself."""
    import ssl

    if (problem := key_log_problem(cause)) is not None:
        return f"{problem.said}: {problem.fix}"
    text = str(cause).lower()
    if nats.certificate:
        return _why_not_embedded(nats, cause)
    if "authorization violation" in text or "authentication expired" in text:
        kind = next((k for k in ("credentials", "nkey") if getattr(nats, k) is not None), None)
        if kind is not None:
            what = f"{_key(nats, kind)} ({getattr(nats, kind)})"
        elif nats.login is not None:
            what = f'"user" and "password", or "token", in {nats.context}'
        elif "@" in nats.url:
            what = "the user and password in nats.url"
        elif nats.tls_cert is not None:
            what = f"{_key(nats, 'tls_cert')} ({nats.tls_cert})"
        else:
            return (
                f"NATS at {where(nats)} wants credentials:"
                " set nats.credentials, nats.nkey or nats.context"
            )
        how = "which have expired" if "expired" in text else "or have the server accept them"
        return f"NATS at {where(nats)} refused the credentials: correct {what}, {how}"
    if _NO_TLS in text or str(cause) == _NO_TLS:
        return (
            f"NATS at {where(nats)} does not require TLS, so nothing was sent to it:"
            " set up TLS there, or use nats:// and no nats.tls_ key"
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message.rstrip(".")
        fix = "give nats.url a name that is in it"
        if "mismatch" not in reason.lower():
            fix = f"set {_key(nats, 'tls_ca')} to the file of the CA that signed it"
        return f"the certificate of NATS at {where(nats)} is not valid for us ({reason}): {fix}"
    if isinstance(cause, ssl.SSLError):
        reason = (cause.reason or "no reason given").replace("_", " ").lower()
        if "wrong version number" in reason or "record layer" in reason:
            fix = f"it does not begin with TLS: remove {_key(nats, 'tls_first')}"
        elif "certificate" in reason or "unknown ca" in reason:
            fix = f"set {_key(nats, 'tls_cert')} and {_key(nats, 'tls_key')} to what it accepts"
        else:
            fix = "compare its TLS settings with ours"
        return f"NATS at {where(nats)} refused TLS ({reason}): {fix}"
    return None


def other_server(nats: Nats, cause: Exception) -> bool:
    """Whether ``cause`` says that somebody else answered where the embedded server was."""
    import ssl

    return bool(nats.certificate) and isinstance(cause, ssl.SSLError)


def _why_not_embedded(nats: Nats, cause: Exception) -> str | None:
    if other_server(nats, cause):
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
        return f"NATS at {where(nats)} has another password by now; restart runctld"
    return None


def denied(cause: Exception) -> tuple[str, str] | None:
    """("publish" or "subscribe", the subject in lower case) when ``cause`` says that the
    server does not permit it."""
    found = _DENIED.search(str(cause))
    if found is None:
        return None
    return "publish" if found[1].lower() == "publish" else "subscribe", found[3].lower()


def _key(nats: Nats, key: str) -> str:
    """How the operator knows ``key``."""
    if nats.context is not None:
        return f'"{CONTEXT_KEYS.get(key, key)}" in {nats.context}'
    return f"nats.{key}"


def _unusable(nats: Nats, key: str, problem: str) -> FileError:
    return FileError(f"{_key(nats, key)}: {getattr(nats, key)}: {problem}")


def _read(nats: Nats, key: str, file: Path) -> bytes:
    try:
        return read_bounded(file, MOST_KEYS)
    except FileNotFoundError:
        problem = "no such file: correct the path, or put the file there"
    except OSError as error:
        problem = f"cannot be read ({error.strerror}): make it a file that this user may read"
    raise _unusable(nats, key, problem)


def _read_credentials(nats: Nats, file: Path) -> tuple[bytes, bytes]:
    """(JWT, seed)"""
    found = _CREDENTIALS.search(_read(nats, "credentials", file))
    if found is None:
        raise _unusable(
            nats, "credentials", "is not a .creds file (a JWT and a seed): name one of `nsc`"
        )
    return found[1], found[2]


def _reread(nats: Nats, file: Path) -> tuple[bytes, bytes]:
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
        raise _unusable(nats, key, "its seed is damaged (checksum): copy the file again")


def _sign(seed: bytes, nonce: str) -> bytes:
    import nkeys

    pair = nkeys.from_seed(bytearray(seed))
    try:
        return base64.b64encode(pair.sign(nonce.encode()))
    finally:
        pair.wipe()


def _tls(nats: Nats) -> ssl.SSLContext:
    """Names are checked against certificates as ever: create_default_context does."""
    import ssl

    for key in ("tls_ca", "tls_cert", "tls_key"):
        file = getattr(nats, key)
        if file is not None:
            _read(nats, key, file)
    try:
        context = ssl.create_default_context(cafile=nats.tls_ca)
    except ssl.SSLError:
        raise _unusable(nats, "tls_ca", "holds no certificate: name a PEM file") from None
    except OSError as error:
        raise FileError(why_refused(nats, error) or str(error)) from None
    if nats.tls_cert is not None:
        assert nats.tls_key is not None
        if b"ENCRYPTED" in _read(nats, "tls_key", nats.tls_key):
            raise _unusable(nats, "tls_key", "is encrypted: store it without a password")
        try:
            context.load_cert_chain(nats.tls_cert, nats.tls_key)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise _unusable(
                    nats, "tls_key", f"is not the key of {nats.tls_cert}: name the right one"
                ) from None
            raise _unusable(
                nats, "tls_cert", f"cannot be used with {nats.tls_key}: name two PEM files"
            ) from None
    return context
