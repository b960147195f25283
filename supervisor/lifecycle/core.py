"""The parts of a daemon that need no connection to NATS."""

from __future__ import annotations

from dataclasses import dataclass

from ...config.schema import Config
from ..api.metrics_endpoint import Scrape
from ..cluster.members import Members
from ..execution.registry import Registry
from ..execution.settings import Settings
from ..host.metrics import Meters
from ..queue.engine import Durable
from .foundation import Foundation


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """``config``: with limits that this machine's disk has room for."""

    base: Foundation
    config: Config
    registry: Registry
    settings: Settings
    meters: Meters
    scrape: Scrape | None
    durable: Durable
    members: Members | None
