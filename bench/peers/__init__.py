"""The programs that are measured beside runctl: installed, driven and ended here."""

from __future__ import annotations

from .base import Peer
from .circus import Circus
from .hapless import Hapless
from .langgraph import LangGraph
from .pm2 import Pm2
from .supervisor import Supervisor
from .task_spooler import TaskSpooler

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Supervisor, Circus, Pm2, TaskSpooler, Hapless, LangGraph)
}
