"""An abort, until no process of the run is left, beside a plain killpg."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

from runctl.protocol import messages, records

from .harness import PATIENCE, running, wired
from .processes import alive
from .report import Table

ABORTS = 30
#: A shell with two children, each of which ends when it is told to.
TREE = "sleep 600 & sleep 600 & echo $$ $!; wait"


async def bench_abort() -> list[Table]:
    table = Table("abort", "Abort → every process of the run is gone")
    table.aim = "at most 20 ms above killpg"
    plain = [await asyncio.to_thread(_killpg) for _ in range(ABORTS)]
    floor = table.add("killpg(TERM), until all are gone", plain, "ms", "floor")
    samples = []
    async with running() as daemon, wired(daemon) as link:
        for n in range(ABORTS):
            subject = await link.submit(f"abort-{n}", ["/bin/sh", "-c", TREE])
            while not isinstance(record := (await link.next(subject))[1], records.Chunks):
                pass
            pids = [int(pid) for pid in record.chunks[0].data.split()]
            began = time.perf_counter()
            await link.ask(messages.Abort(f"abort-{n}", subject.rpartition(".")[2]))
            samples.append((time.perf_counter() - began) * 1000)
            if left := [pid for pid in pids if alive(pid)]:
                raise RuntimeError(f"aborted, and {left} are alive")
    ours = table.add("runctl abort, request → answer", samples, "ms", against=floor)
    table.judge("at most 20 ms above killpg", ours.median <= floor.median + 20)
    table.note("the answer is checked: nothing of the run is alive when it comes")
    return [table]


def _killpg() -> float:
    process = subprocess.Popen(
        ["/bin/sh", "-c", TREE], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    group = process.pid
    began = time.perf_counter()
    os.killpg(group, signal.SIGTERM)
    process.wait(PATIENCE)
    while _members(group):
        time.sleep(0.0005)
    took = (time.perf_counter() - began) * 1000
    process.stdout.close()
    return took


def _members(group: int) -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False
