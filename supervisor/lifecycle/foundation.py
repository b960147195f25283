"""What the start has made before anything is connected."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from ...config.schema import Config
from ...config.secrets import Masker
from ..cluster.lease_guard import Fence
from ..host.systemd_notify import Notifier
from ..messaging.embedded_server import Broker
from ..messaging.gateway_process import GatewayProcess
from ..processes.keeper_client import Keeper


@dataclass(frozen=True, slots=True, kw_only=True)
class Foundation:
    """``config`` came from ``file``, or from a default place. ``broker``: the embedded
    nats-server, which runs; None for an external one. ``home``: what names the state directory.
    ``cgroups``: whether each run has one. ``outlives``: whether commands go on without us.
    ``began``: when the daemon did, on the monotonic clock. ``hide`` masks what is secret.
    ``gateway``: None unless one is to listen."""

    config: Config
    file: Path | None
    executor: str
    home: str
    keeper: Keeper
    loop: asyncio.AbstractEventLoop
    fence: Fence
    notifier: Notifier
    broker: Broker | None
    gateway: GatewayProcess | None
    hide: Masker
    cgroups: bool
    outlives: bool
    began: float
