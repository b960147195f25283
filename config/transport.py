"""Where we connect and cannot know who answers, or can be listened to on the way.

Looked at is what a configuration says, not what is found there: a server that offers TLS today is
believed without it tomorrow, by whoever stands in between. A name that is not this machine's is
another machine's, also that of a Kubernetes service.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from .access import Problem
from .schema import ChatRunner, Config, ConfigError, Nats
from .secrets import hide_secrets

#: What libpq does without sslmode.
_PREFER = "prefer"
_VERIFIED = ("verify-ca", "verify-full")
_LISTENED = "whoever is on the way reads it, and can change it"
#: The exporter's own variables, which add a key to what is sent.
_TRACE_HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")


def check_transport(config: Config) -> None:
    """Raises ConfigError, of the first problem: in production only."""
    if config.environment == "production":
        for key, said, fix in transport_problems(config):
            raise ConfigError(f"{key}: {said}; {fix}")


def transport_problems(
    config: Config, environ: Mapping[str, str] = os.environ
) -> Iterator[Problem]:
    """Those that no ``insecure = true`` allows. ``environ``: the daemon's, by default ours. No
    password, key or path of a URL is in them."""
    return (problem for problem, allowed in _problems(config, environ) if not allowed)


def allowed_problems(config: Config, environ: Mapping[str, str] = os.environ) -> Iterator[Problem]:
    """Those that ``insecure = true`` allows."""
    return (problem for problem, allowed in _problems(config, environ) if allowed)


def _problems(config: Config, environ: Mapping[str, str]) -> Iterator[tuple[Problem, bool]]:
    database, hooks, traces = config.database, config.hooks, config.traces
    for key, url, file in (
        ("database.url", database.url, database.url_file),
        ("database.lease_url", database.lease_url, database.lease_url_file),
    ):
        if url not in ("", "sqlite"):
            for problem in _postgres(key if file is None else f"{key}_file", url, environ):
                yield problem, database.insecure
    yield from ((problem, config.nats.insecure) for problem in _nats(config.nats))
    for runner in config.runners.values():
        if isinstance(runner, ChatRunner):
            key = f"runners.{runner.name}.base_url"
            has_key = runner.api_key is not None or runner.api_key_file is not None
            lost = "the API key" if has_key else ""
            for problem in _http(key, runner.base_url, lost, environ):
                yield problem, runner.insecure
    if isinstance(hooks.on_end, str):
        parts = urlsplit(hooks.on_end)
        lost = "the secrets in its headers" if hooks.headers else ""
        if not lost and (parts.path not in ("", "/") or parts.query):
            lost = "its path, which may be a key"
        for problem in _http("hooks.on_end", hooks.on_end, lost, environ):
            yield problem, hooks.insecure
    if traces.endpoint is not None:
        lost = "the secrets in its headers" if any(map(environ.get, _TRACE_HEADERS)) else ""
        for problem in _http("traces.endpoint", traces.endpoint, lost, environ):
            yield problem, traces.insecure


def _postgres(key: str, url: str, environ: Mapping[str, str]) -> Iterator[Problem]:
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        read = conninfo_to_dict(url)
    except ProgrammingError:
        return  # whoever connects says so
    given = {name: str(value) for name, value in read.items() if value is not None}
    hosts = _postgres_hosts(given, environ)
    remote = [host for host in hosts if not _is_here(host)]
    system = "system" in (given.get("sslrootcert"), environ.get("PGSSLROOTCERT"))
    mode = given.get("sslmode") or environ.get("PGSSLMODE") or ("" if system else _PREFER)
    if not remote or mode in _VERIFIED or (system and not mode):
        return
    if mode == "disable":
        how = f"without TLS (sslmode=disable): {_LISTENED}"
    elif mode == "require":
        how = "with TLS, and no certificate is checked (sslmode=require): anybody may answer there"
    else:
        how = f"with TLS only if whoever answers offers it (sslmode={_shown(mode)}): {_LISTENED}"
    said = f"{_are(remote)} reached {how}"
    yield Problem(
        key,
        said,
        "add sslmode=verify-full, and sslrootcert=FILE or =system, to the URL,"
        f" or set {_insecure('database')}",
    )


def _postgres_hosts(given: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """Names and addresses that libpq, or asyncpg, may connect to; "" is a socket of ours."""
    named = given.get("host") or environ.get("PGHOST", "")
    addresses = given.get("hostaddr") or environ.get("PGHOSTADDR", "")
    service = given.get("service") or environ.get("PGSERVICE", "")
    if service and not named and not addresses:
        return [f"service {service}"]  # in a file that names a host, most likely
    found = [host.strip() for text in (named, addresses) for host in text.split(",")]
    # libpq ends a password at the first "@": the rest of it then stands before the host.
    return ["its host"] if any(host.find("@") > 0 for host in found) else found


def _nats(nats: Nats) -> Iterator[Problem]:
    if nats.embedded or nats.tls:
        return
    urls = [urlsplit(url.strip()) for url in nats.url.split(",")]
    remote = [parts for parts in urls if not _is_here(parts.hostname or "")]
    if not remote:
        return
    hosts = [parts.hostname or "" for parts in remote]
    secret = nats.login is not None or any("@" in parts.netloc for parts in urls)
    lost = ", and takes the password or token" if secret else ""
    web = any(parts.scheme == "ws" for parts in urls)
    first = "use wss://" if web else "use tls://, or set tls_ca"
    yield Problem(
        "nats.url" if nats.context is None else "nats.context",
        f"{_are(hosts)} reached without TLS: {_LISTENED}, output and submits alike{lost}",
        f"{first}, or set {_insecure('nats')}",
    )


def _http(key: str, url: str, lost: str, environ: Mapping[str, str]) -> Iterator[Problem]:
    """``lost``: what else than the bodies is of use to whoever listens."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http" or _is_here(host):
        return
    if not lost and hide_secrets(url) != url:
        lost = "the secret in its URL"
    also = f", and takes {lost}" if lost else ""
    yield Problem(
        key,
        f"{_are([host])} reached without TLS: {_LISTENED}{also}",
        f"use https://, or set {_insecure(key.rpartition('.')[0])}",
    )


def _insecure(section: str) -> str:
    return f"{section}.insecure = true where nobody else is on the way"


def _is_here(host: str) -> bool:
    """Whether that is this machine: a socket's path, its name, or an address of loopback, in each
    of the ways to write it that ``getaddrinfo`` takes."""
    if host == "" or host.startswith(("/", "@")):
        return True
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1, 0x7f000001
        except (OSError, ValueError):
            return False
    mapped = getattr(address, "ipv4_mapped", None)
    address = address if mapped is None else mapped
    return address.is_loopback or address.is_unspecified


def _are(hosts: list[str]) -> str:
    different = list(dict.fromkeys(map(_shown, hosts)))
    return f"{', '.join(different)} {'is' if len(different) == 1 else 'are'}"


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]
