"""``connect``, and the ``Client`` that it gives: what a Python program asks of a daemon."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import msgspec

from ..config.schema import Config
from ..protocol import messages
from ..protocol.errors import BadRequest, Unavailable
from ..protocol.model import OnInterrupt, Run, ThreadRow, check_run_id, check_thread
from .patience import WAIT, Patience
from .shared_link import SharedLink

if TYPE_CHECKING:
    from .attachment import RunEvents

Row = TypeVar("Row", ThreadRow, messages.RunRow)
Page = TypeVar("Page", messages.Threads, messages.Runs)


class Listing(msgspec.Struct, Generic[Row], frozen=True):
    """``rows``, over which one iterates. ``silent``: executors that have running runs and did
    not answer, whose rows may be out of date."""

    rows: Sequence[Row] = ()
    silent: Sequence[messages.ExecutorStatus] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class Client:
    """What ``connect`` gives; of one event loop.

    One connection serves all methods, at the same time too. When it broke, the next call makes
    another one. ``links`` is that connection.

    Each method raises Unavailable when NATS or the daemon cannot be reached, Denied when NATS
    does not permit this user to ask, Busy when the daemon has too much to do even after 5 s
    (nothing was done: try again), and RequestError, of which these and all below are kinds but
    for Unavailable, for whatever else the daemon says. Their texts are one line that says what
    to do.
    """

    def __init__(self, config: Config, patience: Patience | None = None) -> None:
        """``patience``: with a daemon that restarts; None: as much as ``connect`` has."""
        self._config = config
        self._attached: list[RunEvents] = []
        self.links = SharedLink(config, patience or Patience(config, WAIT))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        attached, self._attached = self._attached, []
        try:
            for events in attached:
                await events.aclose()
        finally:
            await self.links.close()

    async def reach(self) -> None:
        """Connect now. Raises Unavailable."""
        await self.links.reach()

    async def submit(
        self,
        thread: str,
        prompt: str | None = None,
        *,
        argv: Sequence[str] = (),
        runner: str | None = None,
        run: str | None = None,
        cwd: str | os.PathLike[str] | None = None,
        on_interrupt: OnInterrupt | None = None,
    ) -> messages.Submitted:
        """Put a run at the end of the queue of ``thread``; its ``run`` id and ``status``.

        ``prompt``: text, at most 1 MiB of UTF-8. ``argv``: a command and its arguments, for a
        runner that takes one. ``runner``: None for "shell" with argv, else for the only or the
        "default" one. ``run``: an id of one's own; to submit the same again with it changes
        nothing, which makes it safe to repeat a submit that was not answered. ``cwd``: where
        the command runs; None for the current directory. ``on_interrupt``: "continue",
        "restart" or "fail", should its machine die under it; None for what the runner says.

        Raises: BadRequest, the thread, run id or work is malformed or too large, or no such
        runner; Refused, as the daemon is stopping, or another run has that id; QueueFull.
        """
        check_thread(thread)
        if run is not None:
            check_run_id(run)
        directory = find_directory() if cwd is None else os.path.abspath(cwd)
        request = messages.Submit(
            *(thread, runner, run, prompt, [*argv], directory), on_interrupt=on_interrupt
        )
        return await self.links.ask(request, messages.Submitted)

    @overload
    async def list(
        self, thread: None = None, *, status: str | None = None, limit: int | None = None
    ) -> Listing[ThreadRow]: ...

    @overload
    async def list(
        self, thread: str, *, status: str | None = None, limit: int | None = None
    ) -> Listing[messages.RunRow]: ...

    async def list(
        self, thread: str | None = None, *, status: str | None = None, limit: int | None = None
    ) -> Listing[ThreadRow] | Listing[messages.RunRow]:
        """All threads, a ``ThreadRow`` each, those of the latest runs first; with ``thread``,
        a ``RunRow`` for each of its runs, latest first. ``status``: only those, of a thread
        running, queued or idle. ``limit``: at most so many rows; None for all.

        Raises: BadRequest; NotFound, no such thread.
        """
        if thread is None:
            threads = messages.Threads
            return await self._read_pages(None, status, limit, threads, lambda page: page.threads)
        runs = messages.Runs
        thread = check_thread(thread)
        return await self._read_pages(thread, status, limit, runs, lambda page: page.runs)

    async def _read_pages(
        self,
        thread: str | None,
        status: str | None,
        limit: int | None,
        expect: type[Page],
        rows_of: Callable[[Page], Sequence[Row]],
    ) -> Listing[Row]:
        rows: list[Row] = []
        silent: list[messages.ExecutorStatus] = []
        after: int | None = 0
        while after is not None and (limit is None or len(rows) < limit):
            request = messages.List(thread, status, _count_missing(limit, rows), after)
            page = await self.links.ask(request, expect)
            rows += rows_of(page)
            silent += page.silent
            after = page.next
        return Listing(rows[:limit], silent)

    async def find_run(self, run: str, verb: str) -> messages.RunDetails:
        """``show``; what it raises says what may have been meant, for ``runctl verb``."""
        from .suggestions import find_run

        try:
            return await self.links.use(lambda link: find_run(link, run, verb))
        except Unavailable:
            check_run_id(run)  # nobody answers, and nothing can have that name
            raise

    async def show(self, run: str) -> messages.RunDetails:
        """Where ``run`` stands (``.run``, a ``Run``), and what was submitted. The beginning of
        an id is enough, if no other run's begins so. Times are RFC 3339 UTC.

        Raises: BadRequest, that is no run id; NotFound, no such run.
        """
        return await self.find_run(run, "show")

    async def wait(self, run: str, *, timeout: float | None = None) -> Run:
        """``run``, as in ``show``, once it has ended: its ``status`` is succeeded, failed,
        aborted or dead. Goes on waiting through restarts of the daemon and of nats-server.
        ``timeout``: seconds, from the first answer on.

        Raises: TimeoutError, it has not ended in time, and goes on; BadRequest; NotFound.
        """
        from .waiting import wait_for_end

        found = (await self.find_run(run, "wait")).run
        return await wait_for_end(self._config, self.links, found, timeout=timeout)

    async def abort(
        self, thread: str, *, run: str | None = None, queued: bool = False
    ) -> Sequence[str]:
        """End the running run of ``thread``, or ``run``, which may be queued; ``queued``: the
        thread's queued runs as well. The ids of the runs that were ended, once every process
        of theirs has ended.

        Raises: BadRequest; NotFound, no such thread or run; Refused, there is nothing to
        abort; NotGone, it is aborted, and some process still there 15 s after the grace.
        """
        check_thread(thread)
        if run is not None:
            check_run_id(run)
        request = messages.Abort(thread, run, queued)
        return (await self.links.ask(request, messages.Aborted)).runs

    async def retry(self, run: str) -> messages.Submitted:
        """Queue the work of ``run``, which failed, was aborted or is dead, again as a new run
        of its thread.

        Raises: BadRequest; NotFound; Refused, it did not end so; QueueFull.
        """
        name = (await self.find_run(run, "retry")).run.run
        return await self.links.ask(messages.Retry(name), messages.Submitted)

    def attach(self, thread: str, run: str | None = None) -> RunEvents:
        """The events of the thread's current or latest run, or of ``run``, from its first
        chunk on, live, until its ``End``: an async iterator of ``Reset``, ``Continue``,
        ``Chunk``, ``Gap`` and ``End``, each chunk once. Restarts of the daemon and of nats-server
        are waited out.

        Raises: BadRequest. Its first event raises NotFound, no such thread or run, and what
        all methods raise.
        """
        from .attachment import RunEvents

        events = RunEvents(self._config, self.links, thread, run)
        self._attached = [x for x in self._attached if not x.closed]
        self._attached.append(events)
        return events


@contextlib.asynccontextmanager
async def connect(
    config: Config | Path | str | None = None, *, wait: float = WAIT
) -> AsyncIterator[Client]:
    """A ``Client`` that is connected to NATS, for the block. ``config``: the daemon's
    configuration file; None to look where ``runctl`` looks for it. ``wait``: so long every
    method waits for a daemon that restarts, seconds; 0 for not at all. One that was stopped in
    order, or never ran, is not waited for.

    Raises: ConfigError, the configuration is missing or wrong; Unavailable, NATS cannot be
    reached, or no daemon has run; Denied.
    """
    if not isinstance(config, Config):
        from ..config.load import load

        config = load(None if config is None else Path(config), client=True)
    async with Client(config, Patience(config, wait)) as client:
        await client.reach()
        yield client


def find_directory() -> str:
    """The current one. Raises BadRequest."""
    try:
        return os.getcwd()
    except OSError:
        raise BadRequest("the current directory does not exist any more; cd elsewhere") from None


def _count_missing(limit: int | None, rows: Sequence[object]) -> int | None:
    return None if limit is None else limit - len(rows)
