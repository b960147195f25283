"""Void records are deleted one by one when an attempt continues: how long that takes, on one server
and on a cluster of three."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nats
import trio_asyncio
from runctl.protocol.subjects import STREAM, SUBJECT_PREFIX, out_subject
from runctl.supervisor.output.inventory import Stored

from .report import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the servers of the tests
from natsserver import Cluster, Node

COUNTS = (10, 200, 2000)
ROUNDS = 5
#: Of a record, bytes.
SIZE = 512

aio = trio_asyncio.aio_as_trio


async def bench_void() -> list[Table]:
    return await asyncio.to_thread(trio_asyncio.run, _measure)


async def _measure() -> list[Table]:
    table = Table("void", "Deleting what is void before an attempt continues")
    with tempfile.TemporaryDirectory(prefix="runctl-bench-") as name:
        for where, replicas, servers in (
            ("one server", 1, Node(_folder(name, "one"))),
            ("a cluster of three", 3, Cluster(_folder(name, "three"))),
        ):
            servers.start()
            try:
                for count in COUNTS:
                    published, deleted = await _rounds(servers.url, replicas, count)
                    floor = table.add(
                        f"{where}: {count} records are published", published, "ms", "floor"
                    )
                    table.add(f"{where}: {count} are deleted", deleted, "ms", against=floor)
            finally:
                servers.close()
    return [table]


def _folder(name: str, part: str) -> Path:
    folder = Path(name, part)
    folder.mkdir()
    return folder


async def _rounds(url: str, replicas: int, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds: until all are acknowledged, and until all are deleted."""
    client: Any = await aio(nats.connect)(url.split(","))
    published, deleted = [], []
    try:
        await aio(_make_stream)(client, replicas)
        stored, subject = Stored(client), out_subject("t", "r")
        for _ in range(ROUNDS):
            began = time.perf_counter()
            sequences = await aio(_publish)(client, subject, count)
            published.append((time.perf_counter() - began) * 1000)
            began = time.perf_counter()
            await stored.remove(sequences)
            deleted.append((time.perf_counter() - began) * 1000)
    finally:
        await aio(client.close)()
    return published, deleted


async def _make_stream(client: Any, replicas: int) -> None:
    """Tried until the cluster has a leader."""
    for _ in range(300):
        try:
            await client.jetstream().add_stream(
                name=STREAM, subjects=[f"{SUBJECT_PREFIX}.>"], num_replicas=replicas
            )
            return
        except Exception:
            await asyncio.sleep(0.1)
    raise TimeoutError("the cluster has no leader")


async def _publish(client: Any, subject: str, count: int) -> list[int]:
    stream, data, found = client.jetstream(timeout=30), bytes(SIZE), []
    for at in range(0, count, 256):
        some = [stream.publish(subject, data) for _ in range(min(256, count - at))]
        found += [ack.seq for ack in await asyncio.gather(*some)]
    return found
