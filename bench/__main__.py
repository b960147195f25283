"""Measures a real daemon, each figure beside a floor or a peer measured in the same run.

Every section has a daemon of its own in a temporary directory, on loopback. A section
that fails says why, and the others go on. ``python -m bench list idle`` runs only those
two; without names it is those of ``DOCUMENTED``, and docs/performance.md is written anew.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable

from .aborting import bench_abort
from .adoption import bench_adopt, bench_adopted
from .attach import bench_attach
from .batch import bench_batch
from .beside import add_peers
from .counts import bench_counts
from .durability import bench_durability
from .gateway import bench_gateway
from .gateway_submit import bench_gateway_submit
from .growth import bench_growth
from .history import bench_history
from .output import bench_output
from .report import Table, machine, print_table
from .restarts import bench_demo, bench_replay, bench_unfinished
from .resume import bench_resume
from .runs import bench_latency, bench_submit
from .standing import bench_idle, bench_list
from .starting import bench_start
from .stopping import bench_stop
from .void import bench_void
from .watchers import bench_watchers

Section = Callable[[], Awaitable[list[Table]]]

#: In the order of the document.
DOCUMENTED: dict[str, Section] = {
    "adopt": bench_adopt,
    "adopted": bench_adopted,
    "replay": bench_replay,
    "unfinished": bench_unfinished,
    "submit": bench_submit,
    "watchers": bench_watchers,
    "attach": bench_attach,
    "output": bench_output,
    "abort": bench_abort,
    "start": bench_start,
    "list": bench_list,
    "idle": bench_idle,
    "growth": bench_growth,
    "durability": bench_durability,
    "counts": bench_counts,
}
SECTIONS: dict[str, Section] = DOCUMENTED | {
    "batch": bench_batch,
    "gateway": bench_gateway,
    "gateway-submit": bench_gateway_submit,
    "latency": bench_latency,
    "resume": bench_resume,
    "stop": bench_stop,
    "void": bench_void,
    "demo": bench_demo,
    "history": bench_history,
}
#: Seconds, for one section, and for one that takes its time.
LIMIT = 240
LONG = {"history": 3600}


def main() -> None:
    chosen = sys.argv[1:] or list(DOCUMENTED)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        sys.exit(f"bench: no section {unknown[0]!r}; there are: {' '.join(SECTIONS)}")
    print("\n".join(machine()))
    print("* runctl   _ a floor: what cannot be beaten here   # counted, not timed")
    began = time.monotonic()
    found: list[Table] = []
    failed = 0
    for name in chosen:
        try:
            tables = asyncio.run(within(SECTIONS[name], LONG.get(name, LIMIT)))
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"\n{name}: FAILED: {type(error).__name__}: {error} ({where.name})", flush=True)
            continue
        for table in tables:
            print_table(table)
        found += tables
    asyncio.run(add_peers(found))
    beside = [table for table in found if any(row.kind == "peer" for row in table.rows)]
    if beside:
        print("\nBeside other programs")
        for table in beside:
            print_table(table)
    took = time.monotonic() - began
    print(f"\n{took:.0f} s in all")
    if not sys.argv[1:] and not failed:
        from . import document  # and matplotlib, which a single section does without

        document.write(found, took)
    sys.exit(1 if failed else 0)


async def within(section: Section, limit: float) -> list[Table]:
    async with asyncio.timeout(limit):
        return await section()


if __name__ == "__main__":
    main()
