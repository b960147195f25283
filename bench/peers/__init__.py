"""The programs that are measured beside runctl: installed, driven and ended here."""

from __future__ import annotations

from .base import Peer
from .circus import Circus
from .hapless import Hapless
from .supervisor import Supervisor
from .task_spooler import TaskSpooler

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Supervisor, Circus, TaskSpooler, Hapless)
}
