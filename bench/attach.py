"""``runctl attach`` to a finished run of many chunks, as a whole process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
from runctl.protocol import records, subjects
from runctl.protocol.model import Outcome, Status

from .harness import PATIENCE, Daemon, running, time_processes, wired
from .report import Row, Table

CHUNKS = 20_000
ATTACHES = 11

#: Writes the next line only when the one before was read, so that each is a chunk.
WRITER = f"""
import array, fcntl, os, termios, time
left = array.array("i", [0])
for n in range(1, {CHUNKS} + 1):
    os.write(1, b"%d\\n" % n)
    while fcntl.ioctl(1, termios.FIONREAD, left) or left[0]:
        time.sleep(0)
"""


async def bench_attach() -> list[Table]:
    """The chunks as the daemon stores them, and the worst case: a record for each."""
    text = b"".join(b"%d\n" % n for n in range(1, CHUNKS + 1))
    async with running() as daemon:
        file = daemon.folder / "reply.txt"
        file.write_bytes(text)
        async with wired(daemon) as link:
            found = await link.chunks(await link.submit("chunks", [sys.executable, "-c", WRITER]))
            written = sum(len(record.chunks) for _, record in found)
            if written != CHUNKS:
                raise RuntimeError(f"{CHUNKS} chunks were meant, {written} written")
            subject = await link.submit("records", ["true"])
            await link.chunks(subject)
        await fill(daemon, subject)
        table = Table("attach", f"A finished reply of {CHUNKS:,} chunks, whole process")
        table.aim = "at most 600 ms"
        # The last floor is the one to compare with: what attach cannot do without.
        time_row(table, "tail -n +1 of a file of the same content", tail(file))
        time_row(table, "python -c pass", [sys.executable, "-c", "pass"])
        imports = [sys.executable, "-c", "import click, nats"]
        baseline = time_row(table, "python -c 'import click, nats'", imports)
        for thread, what in (
            ("chunks", f"{len(found)} records"),
            ("records", f"{CHUNKS} records"),
        ):
            argv = daemon.runctl("attach", thread)
            check(argv, text)
            ours = time_row(table, f"runctl attach, {what}", argv, baseline)
            table.judge(f"at most 600 ms, {what}", ours.median <= 600)
            time_row(table, f"runctl attach --json, {what}", [*argv, "--json"], baseline)
        return [table]


def tail(file: Path) -> list[str]:
    return ["tail", "-n", "+1", str(file)]


def time_row(table: Table, name: str, argv: list[str], against: Row | None = None) -> Row:
    samples = time_processes(ATTACHES, argv)
    return table.add(name, samples, "ms", "floor" if against is None else "ours", against)


def check(argv: list[str], text: bytes) -> None:
    """What is measured is right: all of the text, and each chunk with its number."""
    if subprocess.run(argv, check=True, capture_output=True).stdout != text:
        raise RuntimeError("attach did not print what was written")
    events = subprocess.run([*argv, "--json"], check=True, capture_output=True).stdout
    lines = [msgspec.json.decode(line) for line in events.splitlines()]
    if [e["seq"] for e in lines if e["type"] == "chunk"] != list(range(1, CHUNKS + 1)):
        raise RuntimeError("attach --json did not print each chunk once")


async def fill(daemon: Daemon, subject: str) -> None:
    """Replace a run's records with one for each chunk, headed as the daemon heads them."""
    client = await daemon.connect()
    try:
        run = subject.rpartition(".")[2]
        written: list[records.Record] = [records.Reset(run, 1, 0.0)]
        for n in range(1, CHUNKS + 1):
            written.append(records.Chunks(1, n, 0.0, [records.Chunk("stdout", b"%d\n" % n)]))
        written.append(records.End(run, 1, CHUNKS, 0.0, Outcome(Status.SUCCEEDED, 0)))
        sequence = (await client.jetstream().get_last_msg(subjects.STREAM, subject)).seq or 0
        for n, record in enumerate(written):
            headers = {
                "Nats-Expected-Last-Subject-Sequence": str(sequence + n),
                records.SUMMARY_HEADER: records.summary(record),
            }
            if n == 0:
                headers["Nats-Rollup"] = "sub"
            await client.publish(subject, records.encode_record(record), headers=headers)
        await client.flush(timeout=int(PATIENCE))
        async with asyncio.timeout(PATIENCE):
            while True:
                last = await client.jetstream().get_last_msg(subjects.STREAM, subject)
                if last.seq == sequence + len(written):
                    return
                await asyncio.sleep(0.02)
    finally:
        await client.close()
