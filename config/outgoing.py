"""What the environment asks of outgoing connections: proxies and certificates.

httpx reads these variables, and fails on what it cannot read before it connects to anything:
here is what that is, in words, for the daemon and for ``doctor``. Values are never quoted,
since a proxy's URL may hold a password.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import NamedTuple
from urllib.parse import urlsplit


class Problem(NamedTuple):
    """``said``: what is wrong; ``fix``: what to do about it."""

    said: str
    fix: str


def proxy_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    """Of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in either case. Lower case wins, as
    with curl and ``urllib.request.getproxies``."""
    excepted = _variable(environ, "NO_PROXY")
    hosts = [host.strip() for host in (excepted[1] if excepted else "").split(",")]
    if "*" in hosts:
        return
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        if (found := _variable(environ, name)) is not None:
            yield from _proxy(*found)
    for host in hosts:
        if excepted and host and not _readable(host):
            bare = host.strip("[]")
            fix = f"write {bare} there" if _is_ipv6(bare) and bare != host else "remove it there"
            yield Problem(f"{excepted[0]} holds {host!r}, which cannot be read", fix)


def certificate_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    """Of SSL_CERT_FILE, SSL_CERT_DIR and SSLKEYLOGFILE."""
    if file := environ.get("SSL_CERT_FILE"):
        fix = "name a file of PEM certificates, or unset it"
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
        except ssl.SSLError:
            yield Problem(f"SSL_CERT_FILE: {file} holds no certificates", fix)
        except OSError as error:
            yield Problem(f"SSL_CERT_FILE: {file}: {error.strerror}", fix)
    elif (folder := environ.get("SSL_CERT_DIR")) and not os.path.isdir(folder):
        said = f"SSL_CERT_DIR: {folder} is no directory"
        yield Problem(said, "name a directory of certificates, or unset it")
    if keys := environ.get("SSLKEYLOGFILE"):
        there = keys if os.path.exists(keys) else os.path.dirname(keys) or "."
        if os.path.isdir(keys) or not os.access(there, os.W_OK):
            yield Problem(f"SSLKEYLOGFILE: {keys} cannot be written", "unset it")


def key_log_problem(error: BaseException) -> Problem | None:
    """Of SSLKEYLOGFILE, when it is the reason for ``error``: whoever makes a TLS context opens
    that file, to log the keys of connections."""
    keys = os.environ.get("SSLKEYLOGFILE")
    if not keys or not isinstance(error, OSError) or error.filename != keys:
        return None
    return Problem(f"SSLKEYLOGFILE: {keys} cannot be written ({error.strerror})", "unset it")


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str] | None:
    """(its name as it is written, its value), if it has one."""
    for spelt in (name.lower(), name):
        if value := environ.get(spelt):
            return spelt, value
    return None


def _proxy(name: str, value: str) -> Iterator[Problem]:
    url = value if "://" in value else f"http://{value}"
    scheme = url.partition("://")[0].lower()
    if scheme in ("socks5", "socks5h"):
        if find_spec("socksio") is None:
            yield Problem(
                f"{name} names a SOCKS proxy, and the package socksio is not installed",
                "pip install socksio where runctl is installed, or unset it",
            )
    elif scheme not in ("http", "https"):
        yield Problem(
            f"{name} names a proxy of a kind that is not known ({scheme[:20]!r})",
            "use http://, https:// or socks5://, or unset it",
        )
        return
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        yield Problem(f"{name} is no URL of a proxy", "write http://HOST:PORT there, or unset it")


def _readable(host: str) -> bool:
    """Whether httpx can tell an entry of NO_PROXY from others: it makes a URL of it."""
    import httpx

    if "://" in host:
        url = host
    elif _is_ipv6(host.split("/")[0]):
        url = f"all://[{host}]"
    else:
        url = f"all://*{host}"
    try:
        httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return True


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
