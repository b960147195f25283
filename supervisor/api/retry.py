"""``retry``: a run that has ended is submitted again, under a new id."""

from __future__ import annotations

import msgspec

from ...config.submitters import takes_directory
from ...protocol import messages
from ...protocol.errors import NotFound, Refused
from ...protocol.model import Status
from ..queue.row_status import NO_RUNNER
from .context import Context
from .queries import find_run
from .submit import check_work, enqueue


async def retry(c: Context, r: messages.Retry) -> messages.Reply:
    found = await find_run(c, r.run)
    if found is None:
        raise NotFound(f"no run {r.run!r}; see: runctl list THREAD")
    spec, run = found
    if run.status not in (Status.FAILED, Status.ABORTED, Status.DEAD):
        raise Refused(
            f"run {r.run} is {run.status}; only failed, aborted or dead runs can be retried"
        )
    if (runner := c.settings.runners.get(spec.runner)) is not None:
        check_work(c, runner, spec.thread, spec.prompt, spec.argv)
        if not takes_directory(runner):
            spec = msgspec.structs.replace(spec, cwd=None)
    if spec.runner == NO_RUNNER:
        raise Refused(f"run {r.run} cannot be retried: {run.error}; submit it anew")
    return await enqueue(
        c, msgspec.structs.replace(spec, run=c.ids.new(), retry_of=spec.run), fresh=True
    )
