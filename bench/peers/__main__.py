"""``python -m bench.peers [NAME ...]`` measures the peers alone, in simple lines."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Callable

from ..processes import Usage
from . import PEERS
from .base import Peer, Unable
from .install import Absent

SHORT: dict[str, Callable[[Peer], list[float] | Usage]] = {
    "idle": lambda peer: peer.idle(5),
    "first_output": lambda peer: peer.first_output(20),
    "watch_latency": lambda peer: peer.watch_latency(30, 0.1),
    "replay": lambda peer: peer.replay(),
    "listing": lambda peer: peer.listing(10),
}


def main() -> None:
    chosen = sys.argv[1:] or list(PEERS)
    if unknown := [name for name in chosen if name not in PEERS]:
        sys.exit(f"bench.peers: no peer {unknown[0]!r}; there are: {' '.join(PEERS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    for name in chosen:
        try:
            installed = PEERS[name].install()
            measure(PEERS[name](installed))
        except Absent as why:
            print(f"{name}: absent: {why}", flush=True)


def measure(peer: Peer) -> None:
    took = peer.installed.seconds
    print(f"{peer.name} {peer.version}, " + (f"installed in {took:.1f} s" if took else "there"))
    print(f"  durable: {peer.durable}", flush=True)
    began = time.monotonic()
    with peer:
        print(f"  ready after {time.monotonic() - began:.1f} s", flush=True)
        for what, take in SHORT.items():
            try:
                line = words(take(peer))
            except Unable as why:
                print(f"  {what:<14} –  {why}", flush=True)
            except Exception as error:
                print(f"  {what:<14} FAILED  {type(error).__name__}: {error}", flush=True)
            else:
                print(f"  {what:<14} {line}  [{peer.how.get(what, '')}]", flush=True)
    print(f"  {time.monotonic() - began:.1f} s in all", flush=True)


def words(found: list[float] | Usage) -> str:
    if isinstance(found, Usage):
        return (
            f"{found.cpu:.2f} % of a core, {found.wakeups:.1f} wake-ups/s,"
            f" RSS {found.rss_mib:.1f} MiB, PSS {found.pss_mib:.1f} MiB"
        )
    middle, worst = statistics.median(found), max(found)
    return f"n {len(found)}  median {middle:.2f} ms  max {worst:.2f} ms"


if __name__ == "__main__":
    main()
