"""How long a watcher waits for its reply to go on after the owner's SIGKILL.

``python -m bench.recovery [KILLS]``: a run is watched from another executor, its owner
killed; the time to the first replayed chunk, p50 and max over the kills. Once with the
owner restarted at once under its ID, once with a takeover after 2 s by a peer. Three
executors, a PostgreSQL and a NATS server of their own, all on loopback.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from .machines import Machines

CODE = """
import time
for i in range(10_000):
    print(i, flush=True)
    time.sleep(0.02)
"""
SETTINGS = "[queue]\nmax_attempts = 1000\n"
AFTER = 2.0
TAKEOVER = f"{SETTINGS}[takeover]\nenabled = true\nafter = '{AFTER:g}s'\n"


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for title, settings, restart in [
        ("restart under the same ID", SETTINGS, True),
        (f"takeover, after = {AFTER:g} s", TAKEOVER, False),
    ]:
        with tempfile.TemporaryDirectory(prefix="runctl-bench-", ignore_cleanup_errors=True) as d:
            took = asyncio.run(measure(Path(d), settings, kills, restart))
        print(
            f"{title:<28} n {len(took):>3}   p50 {statistics.median(took):6.2f} s"
            f"   max {max(took):6.2f} s",
            flush=True,
        )


async def measure(path: Path, settings: str, kills: int, restart: bool) -> list[float]:
    machines = Machines(path, settings)
    took = []
    try:
        await machines.start()
        run = await machines.submit("demo", [sys.executable, "-u", "-c", CODE])
        watch = await machines.watch("demo", run)
        for attempt in range(1, kills + 1):
            await watch.wait_chunk(attempt)
            owner = await machines.owner(run)
            owner.kill()
            began = time.monotonic()
            if restart:
                owner.start()
            took.append(await watch.wait_chunk(attempt + 1) - began)
            if not restart:  # back before the next kill: three executors each time
                owner.start()
            await owner.wait_ready()
    finally:
        await machines.close()
    return took


if __name__ == "__main__":
    main()
