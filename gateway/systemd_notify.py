"""What systemd hears of a gateway that is a service: that it listens, stops, and that its loop
turns. A manager that is not there, or does not read, is no fault of ours."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

from ..protocol.service_manager import read_notify_address, read_watchdog

log = logging.getLogger("runctl.gateway")


class Notifier:
    """Without $NOTIFY_SOCKET all of it does nothing."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._address = read_notify_address(env)
        self._watchdog = read_watchdog(env)

    def tell(self, *lines: str) -> None:
        """A datagram of ``KEY=value`` lines."""
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
            plain.setblocking(False)
            try:
                plain.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                log.debug("%s: %s", lines[0], error)

    async def beat(self) -> None:
        """As long as the loop turns, until cancelled."""
        while self._watchdog is not None:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 2)
