"""Measures a real daemon, each figure beside a baseline taken in the same run.

Every section has a daemon of its own in a temporary directory, on loopback. A section
that fails says why, and the others go on. ``python -m bench list idle`` runs only
those two.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable

from .attach import bench_attach
from .report import print_machine
from .restarts import bench_demo, bench_replay
from .resume import bench_resume
from .runs import bench_latency, bench_submit
from .standing import bench_idle, bench_list
from .stopping import bench_stop
from .watchers import bench_watchers

SECTIONS: dict[str, Callable[[], Awaitable[None]]] = {
    "idle": bench_idle,
    "submit": bench_submit,
    "latency": bench_latency,
    "list": bench_list,
    "replay": bench_replay,
    "attach": bench_attach,
    "watchers": bench_watchers,
    "resume": bench_resume,
    "stop": bench_stop,
    "demo": bench_demo,
}


def main() -> None:
    chosen = sys.argv[1:] or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        sys.exit(f"bench: no section {unknown[0]!r}; there are: {' '.join(SECTIONS)}")
    print_machine()
    failed = 0
    for name in chosen:
        try:
            asyncio.run(within(SECTIONS[name]))
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"\n{name}: FAILED: {type(error).__name__}: {error} ({where.name})", flush=True)
    sys.exit(1 if failed else 0)


async def within(section: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(180):
        await section()


if __name__ == "__main__":
    main()
