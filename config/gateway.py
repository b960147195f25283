"""[gateway]: where it listens, and who may then be let in."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .read_keys import read_keys
from .schema import CommandRunner, Gateway, Runner
from .typed_table import Table

#: Where ``runctl gateway`` listens when nobody says where.
USUAL = "127.0.0.1:8420"
_HEADER = "[A-Za-z0-9-]{1,64}"
_ORIGIN = r"https?://(?:[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?"
_NAME = r"[A-Za-z0-9._-]{1,253}|\[?[0-9A-Fa-f:.]{2,45}\]?"


def read_gateway(table: Table) -> Gateway:
    gateway = Gateway(
        listen=table.text("listen"),
        hosts=table.texts("hosts"),
        origins=table.texts("origins"),
        trusted_proxies=table.texts("trusted_proxies"),
        user_header=table.text("user_header"),
        **read_keys(Gateway, table),
    )
    for name in gateway.hosts:
        if not re.fullmatch(_NAME, name):
            table.fail("hosts", f"{name!r} is no host name: give names without scheme and port")
    for origin in gateway.origins:
        if not re.fullmatch(_ORIGIN, origin):
            table.fail(
                "origins",
                f"{origin!r} is no origin: give scheme, host and port as browsers do, in small"
                ' letters, such as "https://app.example.com"',
            )
    if gateway.user_header is not None and not re.fullmatch(_HEADER, gateway.user_header):
        table.fail("user_header", "is no name of a header: use letters, digits and -")
    _check_proxies(gateway, table)
    if gateway.listen is not None:
        from .integrations import split_listen

        split_listen(gateway.listen, table)
        if (problem := find_open_door(gateway, gateway.listen)) is not None:
            table.fail("listen", problem)
    return gateway


def find_open_door(gateway: Gateway, listen: str) -> str | None:
    """Why nothing may listen at ``listen``, HOST:PORT; None if it may."""
    from .integrations import is_loopback, split_listen

    host, _ = split_listen(listen)
    if is_loopback(host) or gateway.tokens_file is not None or gateway.trusted_proxies:
        return None
    return (
        f"{host} can be reached from other machines, and nothing says who may do what: listen on"
        " 127.0.0.1, or set gateway.tokens_file, or trusted_proxies and user_header"
    )


def check_other_users(gateway: Gateway, runners: Mapping[str, Runner], table: Table) -> None:
    """What runs as another user could ask there for whatever the daemon's user may. Raises
    ConfigError."""
    if gateway.listen is None:
        return
    for name, runner in runners.items():
        if isinstance(runner, CommandRunner) and runner.user is not None:
            _refuse_user(gateway, name, table)


def find_other_users(gateway: Gateway, top: Table) -> None:
    """The same for a gateway, which listens wherever it was told to, and reads no runners. Raises
    ConfigError."""
    runners = top.values.get("runners")
    for name, runner in runners.items() if isinstance(runners, dict) else ():
        if isinstance(runner, dict) and "user" in runner:
            _refuse_user(gateway, name, top.table("gateway"))


def _refuse_user(gateway: Gateway, runner: str, table: Table) -> None:
    if gateway.tokens_file is None and not gateway.trusted_proxies:
        table.fail(
            "listen",
            f"runner {runner!r} runs as another user, whose programs could do there what the"
            " daemon's user may: set gateway.tokens_file",
        )


def _check_proxies(gateway: Gateway, table: Table) -> None:
    if bool(gateway.trusted_proxies) != (gateway.user_header is not None):
        lacking = "user_header" if gateway.trusted_proxies else "trusted_proxies"
        there = "trusted_proxies" if gateway.trusted_proxies else "user_header"
        table.fail(there, f"does nothing without {lacking}: set both, or none")
    if gateway.trusted_proxies:
        import ipaddress

        for text in gateway.trusted_proxies:
            try:
                ipaddress.ip_network(text)
            except ValueError:
                table.fail(
                    "trusted_proxies",
                    f"{text!r} is neither an address nor a network:"
                    ' write "10.1.0.7" or "10.1.0.0/24"',
                )
