"""What the verbs need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...protocol.model import RunIds
from ..execution.aborted_ends import Endings
from ..execution.pushed_runs import PushedRuns
from ..execution.registry import Registry
from ..execution.settings import Settings
from ..execution.wait_reasons import Waiting
from ..host.metrics import Meters
from ..output.inventory import Stored
from ..output.publisher import Streams
from ..peers.remote import Others
from ..processes.keeper_client import Keeper
from ..queue.admission import Backlog
from ..queue.engine import Durable
from ..upkeep.hooks import Hooks
from .announce import Announcer

if TYPE_CHECKING:
    from nats.aio.client import Client

    from ...config.schema import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """``hide`` masks what is secret in a text. ``cgroups``: whether each run has one. ``restart``
    has the program start again, soon; ``outlives``: commands go on meanwhile. ``began``: when we
    did, on the monotonic clock."""

    config: Config
    executor: str
    client: Client
    settings: Settings
    registry: Registry
    durable: Durable
    streams: Streams
    stored: Stored
    endings: Endings
    pushed: PushedRuns
    others: Others
    waiting: Waiting
    backlog: Backlog
    announcer: Announcer
    meters: Meters
    hooks: Hooks | None
    hide: Callable[[str], str]
    keeper: Keeper
    cgroups: bool
    restart: Callable[[], None]
    outlives: bool
    ids: RunIds = field(default_factory=RunIds)
    began: float = field(default_factory=time.monotonic)
