"""The peers' figures, as rows of the tables that hold ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .peers import PEERS
from .peers.base import Peer, Unable
from .peers.install import Absent
from .processes import Usage
from .report import Table

#: table -> (method of a peer, unit)
FIGURES: dict[str, tuple[str, Callable[[Peer], list[float]]]] = {
    "submit": ("first_output", lambda peer: peer.first_output(20)),
    "watchers": ("watch_latency", lambda peer: peer.watch_latency(30, 0.1)),
    "attach": ("replay", lambda peer: peer.replay()),
    "list": ("listing", lambda peer: peer.listing(10)),
}
IDLE = 5.0


async def add_peers(tables: list[Table]) -> None:
    """Measure those figures of each peer whose tables are among ``tables``."""
    chosen = {table.key: table for table in tables if table.key in {*FIGURES, "idle"}}
    if not chosen:
        return
    for name, kind in PEERS.items():
        try:
            peer = kind(await asyncio.to_thread(kind.install))
            await asyncio.to_thread(_measure, peer, chosen)
        except Absent as why:
            for table in chosen.values():
                table.absent(name, str(why))
    for key in ("submit", "watchers"):
        if key in chosen:
            _compare(chosen[key])


def _compare(table: Table) -> None:
    """Our first row with each peer's."""
    ours = next(row for row in table.rows if row.kind == "ours")
    for row in table.rows:
        if row.kind == "peer":
            table.judge(f"ahead of {row.name}", ours.median < row.median)


def _measure(peer: Peer, tables: dict[str, Table]) -> None:
    title = f"{peer.name} {peer.version.partition('-')[0]}"
    with peer:
        for key, table in tables.items():
            try:
                if key == "idle":
                    _idle(title, table, peer.idle(IDLE))
                else:
                    what, take = FIGURES[key]
                    table.add(title, take(peer), "ms", "peer")
                    durable = f"; durable: {peer.durable}" if key == "submit" else ""
                    table.note(f"{peer.name}: {peer.how.get(what, what)}{durable}")
            except Unable as why:
                table.note(f"{peer.name}: – ({why})")
            except Exception as error:
                table.absent(peer.name, f"{type(error).__name__}: {error}")


def _idle(title: str, table: Table, found: Usage) -> None:
    table.add(title, [found.pss_mib], "MiB", "peer")
    table.add(f"{title}, processor", [found.cpu], "% of a core", "count")
    table.add(f"{title}, context switches", [found.wakeups], "/s", "count")
