"""What a service manager's environment says to a service: where to tell it that we live, and how
often (systemd's sd_notify(3), sd_watchdog_enabled(3))."""

from __future__ import annotations

import os
from collections.abc import Mapping


def read_notify_address(env: Mapping[str, str]) -> str | None:
    """Of a datagram socket; None when there is no manager. "@" is an abstract name's first byte."""
    text = env.get("NOTIFY_SOCKET")
    if not text:
        return None
    return "\0" + text[1:] if text.startswith("@") else text


def read_watchdog(env: Mapping[str, str]) -> float | None:
    """Within how many seconds it is to hear of us, again and again; None when it need not, or
    another process is meant."""
    try:
        if int(env.get("WATCHDOG_PID") or os.getpid()) != os.getpid():
            return None
        return int(env.get("WATCHDOG_USEC") or 0) / 1e6 or None
    except ValueError:
        return None
