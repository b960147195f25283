"""``status``: the daemon, NATS, the database, and the other executors."""

from __future__ import annotations

import os
import time

from ...config.nats_internals import read_server_version
from ...protocol import __version__, messages
from .context import Context


async def status(c: Context, r: messages.StatusRequest) -> messages.Reply:
    size, count = (0, 0) if r.brief else await c.streams.info()
    url = c.client.connected_url
    unfinished = list_unfinished(c)
    return messages.DaemonStatus(
        executor_id=c.executor,
        version=__version__,
        pid=os.getpid(),
        running=len(c.registry) + len(unfinished),
        queued=0 if r.brief else await c.durable.rows.count_runs("ENQUEUED"),
        nats=messages.NatsStatus(
            url=f"{url.scheme}://{url.hostname}:{url.port}" if url else "",
            embedded=c.config.nats.embedded,
            connected=c.client.is_connected,
            version=read_server_version(c.client),
            stream_bytes=size,
            stream_messages=count,
            warnings=c.streams.life.warnings,
            unfit=c.streams.life.unfit,
        ),
        database=messages.DatabaseStatus(
            url="sqlite" if c.config.database.embedded else "postgresql",
            kind="sqlite" if c.config.database.embedded else "postgresql",
        ),
        uptime=time.monotonic() - c.began,
        executors=[] if r.alone or r.brief else await list_executors(c),
        cgroups=c.cgroups,
        runners=sorted(c.settings.runners),
        metrics=c.config.metrics.listen,
        hooks=await hooks_status(c, r),
        unfinished=unfinished,
        keeper=messages.KeeperStatus(c.keeper.origin.pid, c.keeper.origin.version),
        keeper_silent=c.keeper.silent,
    )


def list_unfinished(c: Context) -> list[messages.UnfinishedRun]:
    return [
        messages.UnfinishedRun(x.run, x.thread, x.status, x.why)
        for x in c.durable.list_unfinished()
        if c.registry.get(x.run) is None
    ]


async def hooks_status(c: Context, r: messages.StatusRequest) -> messages.HooksStatus | None:
    if c.hooks is None:
        return None
    waiting = 0 if r.brief else await c.durable.rows.count_hooks()
    return messages.HooksStatus(c.hooks.delivered, c.hooks.failed, waiting)


async def list_executors(c: Context) -> list[messages.ExecutorStatus]:
    me = messages.ExecutorStatus(
        c.executor,
        "up",
        __version__,
        os.getpid(),
        len(c.registry) + len(list_unfinished(c)),
        time.monotonic() - c.began,
    )
    return sorted([me, *await c.others.status()], key=lambda x: x.executor_id)
