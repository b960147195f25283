"""Work that is counted rather than timed, and so is steady on a noisy machine."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from .harness import Daemon, running, wired
from .processes import cpu_seconds, process_tree, switches
from .report import Table

RUNS = 200
LINES = 2000
WRITER = f"""
import os, time
for n in range({LINES}):
    os.write(1, b"x" * 99 + b"\\n")
    time.sleep(0.002)
"""


async def bench_counts() -> list[Table]:
    table = Table("counts", "What a run costs, counted")
    nothing, statements = await _statements(0), await _statements(RUNS)
    for what in ("reads", "writes", "commits"):
        each = (statements[what] - nothing[what]) / RUNS
        table.add(f"SQL {what} per run of /bin/true", [each], "", "count")
    if shutil.which("strace") is None:
        table.absent("fsyncs per run", "strace is not installed")
    else:
        try:
            for name, count in (await _syncs()).items():
                table.add(f"fsyncs of the {name} per run", [count / RUNS], "", "count")
        except RuntimeError as error:
            table.absent("fsyncs per run", str(error))
    await _output(table)
    return [table]


async def _runs(daemon: Daemon, count: int) -> None:
    async with wired(daemon) as link:
        for n in range(count):
            await link.chunks(await link.submit(f"t{n % 20}", ["/bin/true"]))


async def _statements(runs: int) -> Counter[str]:
    async with running() as daemon:
        daemon.stop()
        file = daemon.folder / "counts.json"
        daemon.program = ["-m", "bench.counted", str(file)]
        daemon.start()
        await daemon.wait_ready()
        await _runs(daemon, runs)
        daemon.stop()
        return Counter(json.loads(file.read_text()))


async def _syncs() -> dict[str, int]:
    """Raises RuntimeError, where processes cannot be traced."""
    async with running() as daemon:
        tree = process_tree(daemon)
        traces = {}
        for pid, name in tree.items():
            file = daemon.folder / f"strace-{pid}"
            argv = ["strace", "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", str(file)]
            traces[name] = (
                file,
                subprocess.Popen([*argv, "-p", str(pid)], stderr=subprocess.DEVNULL),
            )
        try:
            await asyncio.sleep(1)
            if any(tracer.poll() is not None for _, tracer in traces.values()):
                raise RuntimeError("strace may not trace here")
            await _runs(daemon, RUNS)
        finally:
            for _, tracer in traces.values():
                tracer.terminate()
                tracer.wait()
        return {name: _lines(file) for name, (file, _) in traces.items() if name != "keeper"}


def _lines(file: Path) -> int:
    """Those that began: strace shows the end of some in a line of its own."""
    return sum("sync(" in line for line in file.read_text().splitlines())


async def _output(table: Table) -> None:
    """A line each 2 ms, with nobody watching."""
    async with running() as daemon, wired(daemon, listen=False) as link:
        tree = process_tree(daemon)
        before = {name: (switches([pid]), cpu_seconds(pid)) for pid, name in tree.items()}
        subject = await link.submit("lines", [sys.executable, "-c", WRITER])
        await link.ended(subject)
        for pid, name in tree.items():
            if name == "keeper":
                continue
            switched, used = before[name]
            now = switches([pid])
            woken = sum(n - switched.get(thread, 0) for thread, n in now.items())
            table.add(f"{name}: context switches per line", [woken / LINES], "", "count")
            cpu = (cpu_seconds(pid) - used) / LINES * 1e6
            table.add(f"{name}: processor time per line", [cpu], "µs", "count")
        stored, messages = await link.stored()
        table.add("bytes stored per line of 100 B", [stored / LINES], "B", "count")
        table.add("lines per stored record", [LINES / max(1, messages - 2)], "", "count")
