"""Which thread a run is of, and what is stored of it."""

from __future__ import annotations

from typing import NamedTuple

from ..protocol import messages, subjects
from ..protocol.errors import NotFound
from .service import Service
from .tail import Tail, read_tail
from .tokens import Caller


class Found(NamedTuple):
    """``tail``: the run's last record; where nothing is stored ``details`` is what the daemon
    says."""

    thread: str
    tail: Tail | None
    details: messages.RunDetails | None


async def find_run(service: Service, caller: Caller, run: str) -> Found:
    """As its output says, which needs no daemon; else as the daemon does. Raises as
    ``Service.ask``; NotFound too of a thread that ``caller`` may not know of."""
    subject = f"{subjects.SUBJECT_PREFIX}.*.{run}"
    tail = await service.links.use(lambda link: read_tail(link, subject))
    found: Found | None = None
    if tail is not None:
        try:
            found = Found(tail.thread, tail, None)
        except ValueError:  # another program's
            pass
    if found is None:
        shown = await service.ask(caller, messages.Show(run), messages.RunDetails)
        found = Found(shown.run.thread, None, shown)
    if not caller.may_see(found.thread):
        raise NotFound(f"no run {run!r}; see: runctl list THREAD")
    return found
